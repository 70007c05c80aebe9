"""Sequences of unequal length: padded to one tensor, their lengths beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def step_mask(lengths: Tensor, num_steps: int) -> Tensor:
    """Which steps belong to sequences of these lengths `(*)`: `(*, T)`, bool.

    Example:
        >>> step_mask(torch.tensor([1, 3]), 3).int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    return torch.arange(num_steps, device=lengths.device) < lengths.unsqueeze(-1)


def pad(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sequences `(T_i, D)` as the batch `{"x": (N, T, D), "lengths": (N,)}`, T the longest, zeros behind each end.

    Raises:
        ValueError: for no sequences, one of length 0, or steps of unequal size, dtype or device.

    Example:
        >>> batch = pad([torch.ones(2, 3), torch.ones(5, 3)])
        >>> batch["x"].shape, batch["lengths"]
        (torch.Size([2, 5, 3]), tensor([2, 5]))
    """
    if not isinstance(sequences, Sequence | Tensor) or (isinstance(sequences, Tensor) and sequences.dim() != 3):
        raise ValueError(f"Expected sequences to be a list of tensors (T, D); got {type(sequences).__name__}")
    if not len(sequences):
        raise ValueError("Expected sequences to hold at least one; got none")
    for i, sequence in enumerate(sequences):
        if not isinstance(sequence, Tensor) or sequence.layout != torch.strided or sequence.is_meta:
            raise ValueError(
                f"Expected sequences to be dense tensors (T, D); got {type(sequence).__name__} at index {i}"
            )
        first = sequences[0]
        if sequence.dim() != 2 or len(sequence) < 1 or sequence.shape[1] != first.shape[-1]:
            size = first.shape[-1] if first.dim() else "D"
            raise ValueError(
                f"Expected sequences of shape (T, {size}), T at least 1; got {tuple(sequence.shape)} at index {i}"
            )
        if sequence.dtype != first.dtype or sequence.device != first.device:
            raise ValueError(
                f"Expected sequences of one dtype on one device; got {sequence.dtype} on {sequence.device} at index "
                f"{i}, after {first.dtype} on {first.device}"
            )
    x = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return {"x": x, "lengths": torch.tensor([len(sequence) for sequence in sequences], device=x.device)}


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of sequences without the steps that lie beyond all of its lengths; any other as it is.

    For `Data(..., show=trim)`: a minibatch is then as long as its longest sequence. Where loss or program are compiled,
    each length would be compiled by itself.

    Example:
        >>> trim({"x": torch.zeros(2, 9, 3), "lengths": torch.tensor([2, 5])})["x"].shape
        torch.Size([2, 5, 3])
    """
    if not are_sequences(batch):
        return batch
    return {**batch, "x": batch["x"][:, : int(batch["lengths"].max())]}


def ended(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A batch of sequences x `(N, T, D)` with zeros beyond their lengths `(N,)`; any other as it is.

    Raises:
        ValueError: for lengths that are no whole numbers, one for each sequence, from 1 to T.
    """
    if not are_sequences(batch):
        return batch
    x, lengths = batch["x"], batch["lengths"]
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"Expected {name}['lengths'] to be whole numbers (N,); got {lengths.dtype} {tuple(lengths.shape)}"
        )
    bad = (lengths < 1) | (lengths > x.shape[1])
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected {name}['lengths'] from 1 to {x.shape[1]}, the steps of x; got {int(lengths[where])} at {where}"
        )
    return {**batch, "x": x.masked_fill(~step_mask(lengths, x.shape[1]).unsqueeze(-1), 0)}


def are_sequences(batch: dict[str, Tensor]) -> bool:
    """Whether a batch is of sequences x `(N, T, D)` and their lengths."""
    return "lengths" in batch and "x" in batch and batch["x"].dim() == 3
