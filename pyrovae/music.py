"""Sequences of chords as MIDI files, to listen to."""

from pathlib import Path

from torch import Tensor

from pyrovae.arguments import check_whole, is_number
from pyrovae.batches import as_batch, check_finite
from pyrovae.checkpoint import write_whole

TICKS = 480  # of a quarter note


def write_midi(roll: Tensor, path: str | Path, *, tempo: float = 100.0, lowest: int = 21) -> None:
    """Write a piano roll as a MIDI file: a step is a quarter note, and a key that stays struck is held.

    Args:
        roll: `(T, K)`, keys that are struck (above 0.5) at each step.
        path: of the file.
        tempo: quarter notes a minute, 4 to 1000; a file holds no longer ones.
        lowest: MIDI pitch of the first key; 21 for a piano's 88.

    Raises:
        ValueError: for what is no piano roll, NaN or infinity in it, pitches outside 0 to 127, or such a tempo.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_midi(torch.eye(88)[[39, 43, 46]], f"{folder}/arpeggio.mid")
    """
    if not isinstance(roll, Tensor) or roll.dim() != 2 or len(roll) < 1:
        found = f"shape {tuple(roll.shape)}" if isinstance(roll, Tensor) else type(roll).__name__
        raise ValueError(f"Expected roll (T, K) to be a tensor, T at least 1; got {found}")
    check_finite(as_batch({"roll": roll}), "batch")
    check_whole(0, lowest=lowest)
    if lowest > 128 - roll.shape[1]:
        raise ValueError(
            f"Expected roll (T, K), its K pitches from lowest={lowest} within 0 to 127; got shape {tuple(roll.shape)}"
        )
    if not is_number(tempo) or not 4 <= tempo <= 1000:
        raise ValueError(f"Expected tempo from 4 to 1000 quarter notes a minute; got {tempo!r}")
    import mido

    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo))])
    struck = (roll > 0.5).int()
    waited = 0
    for before, now in zip([struck[0] * 0, *struck], [*struck, struck[0] * 0], strict=True):
        for kind, changed in (("note_off", before > now), ("note_on", now > before)):
            for key in changed.nonzero().flatten().tolist():
                track.append(mido.Message(kind, note=lowest + key, velocity=64, time=waited))
                waited = 0
        waited += TICKS
    file = mido.MidiFile(ticks_per_beat=TICKS, tracks=[track])
    write_whole(Path(path), file.save)
