"""Piano rolls as MIDI files, as chords of the known set, and as pictures."""

import json
import os
from pathlib import Path

import matplotlib as mpl
import mido
import pytest
import torch

from pyrovae import plots
from pyrovae.data import load
from pyrovae.music import write_midi

mpl.use("Agg")


def roll_of(path):
    """The notes that sound during each quarter note of a MIDI file."""
    file, sounding, now, steps = mido.MidiFile(path), set(), 0, {}
    for message in file.tracks[0]:
        for step in range(now // file.ticks_per_beat, (now + message.time) // file.ticks_per_beat):
            steps[step] = set(sounding)
        now += message.time
        if message.type == "note_on":
            assert message.note not in sounding
            sounding.add(message.note)
        elif message.type == "note_off":
            sounding.remove(message.note)
    assert not sounding
    return [steps[step] for step in range(now // file.ticks_per_beat)]


def test_a_midi_file_sounds_as_its_roll(tmp_path):
    roll = (torch.rand(20, 88) > 0.9).float()
    roll[-1, 3] = 1
    roll[7] = 0  # a rest
    write_midi(roll, tmp_path / "a.mid", tempo=60)
    assert roll_of(tmp_path / "a.mid") == [{21 + key for key in step.nonzero().flatten().tolist()} for step in roll]
    assert mido.MidiFile(tmp_path / "a.mid").length == pytest.approx(20)
    write_midi(torch.ones(1, 2), tmp_path / "b.mid", lowest=60)
    assert roll_of(tmp_path / "b.mid") == [{60, 61}]


@pytest.mark.parametrize(
    ("roll", "settings", "message"),
    [
        (torch.zeros(3), {}, r"Expected roll \(T, K\).*got shape \(3,\)"),
        (torch.zeros(0, 88), {}, r"got shape \(0, 88\)"),
        (torch.zeros(3, 88), {"lowest": 60}, "within 0 to 127"),
        (torch.zeros(3, 88), {"tempo": 0}, "Expected tempo from 4 to 1000.*got 0"),
    ],
)
def test_what_is_no_roll_writes_nothing(roll, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_midi(roll, tmp_path / "a.mid", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_chorales_are_the_chords_of_the_file():
    splits = load("jsb-chorales")
    path = Path(os.environ["PYROVAE_DATA"]) / "jsb_chorales" / "jsb-chorales-quarter.json"
    chorales = json.loads(path.read_text())
    for part, name, steps in (("train", "train", 13_807), ("val", "valid", 4_602), ("test", "test", 4_725)):
        data = getattr(splits, part)
        assert data["lengths"].sum() == steps
        for roll, length, chords in zip(data["x"], data["lengths"], chorales[name], strict=True):
            assert len(chords) == length
            assert [set((step.nonzero().flatten() + 21).tolist()) for step in roll[:length]] == [
                set(map(int, chord)) for chord in chords
            ]
            assert not roll[length:].any()


def test_chorales_from_a_file_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    (tmp_path / "jsb_chorales").mkdir()
    for content in ("no json", '{"train": []}', '{"train": [[[200]]], "valid": [[[60]]], "test": [[[60]]]}'):
        (tmp_path / "jsb_chorales" / "jsb-chorales-quarter.json").write_text(content)
        with pytest.raises(ValueError, match=r"Expected train, valid and test, .*; got .*jsb-chorales-quarter.json"):
            load("jsb-chorales")


def test_pictures_of_sequences_are_their_values():
    x, lengths = torch.rand(3, 6, 4), torch.tensor([6, 2, 4])
    figure = plots.sequences({"data": x, "doubled": 2 * x}, lengths, n=2)
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["data", "doubled"]
    for i, axes in enumerate(figure.axes):
        shown = torch.from_numpy(axes.images[0].get_array().data)
        expected = (1 + i % 2) * x[i // 2, : lengths[i // 2]].T
        assert torch.equal(shown, expected)
    rolls = torch.zeros(1, 3, 88)
    rolls[0, 1, 40] = rolls[0, 2, 45] = 1
    assert plots.sequences({"rolls": rolls}, torch.tensor([3])).axes[0].images[0].get_array().shape == (6, 3)
    plots.sequences({"silence": torch.zeros(1, 3, 88)}, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"Expected data \(N, T, D\) of lengths \(N,\) up to T; got \(3, 4\), 3"):
        plots.sequences({"data": x[:, 0]}, lengths)
