"""Minibatches: what is one, and where they come from."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from pyrovae.arguments import check_whole
from pyrovae.sequences import ended

Batch = dict[str, Tensor]


def as_batch(batch: Any, name: str = "batch") -> Batch:
    """A dict of tensors from a dict, a tensor (`{"x": tensor}`), a pair (`{"x": x, "y": y}`) or a whole `Data`.

    Of sequences x `(N, T, D)` that come with their lengths `(N,)`, what lies beyond these becomes zero.

    Raises:
        ValueError: for anything else, for tensors of unequal length, an empty batch, lengths that are not from 1 to T,
            and tensors that are sparse, complex, quantized or without values (meta).
    """
    if isinstance(batch, Data):
        return next(batch.batches(len(batch)))
    if isinstance(batch, Tensor):
        batch = {"x": batch}
    elif isinstance(batch, list | tuple) and len(batch) in (1, 2):
        batch = dict(zip("xy", batch, strict=False))
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise ValueError(f"Expected {name} to be a tensor, a pair (x, y) or a dict of tensors; got {_kind(batch)}")
    for key, value in batch.items():
        if not isinstance(key, str):
            raise ValueError(f"Expected the keys of {name} to be names of arguments; got {key!r}")
        if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            what = "meta" if value.is_meta else value.dtype if value.layout == torch.strided else value.layout
            raise ValueError(f"Expected {name}[{key!r}] to be a dense tensor of real numbers; got {what}")
    lengths = {key: len(value) if value.dim() else None for key, value in batch.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"Expected the tensors of {name} to have one common first dimension N; got {lengths}")
    if 0 in lengths.values():
        raise ValueError(f"Expected {name} to hold at least one datum; got an empty set")
    return ended(dict(batch), name)


def _kind(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{kind} with " + ", ".join(f"{key!r}: {type(value).__name__}" for key, value in batch.items())
    if isinstance(batch, list | tuple) and batch:
        return f"{kind} of {len(batch)}, the first a {type(batch[0]).__name__}"
    if isinstance(batch, Iterable | Dataset) and not isinstance(batch, np.ndarray):
        kind += ". DataLoader(data_set, batch_size=100) and data.in_epochs(stream, steps=1000) make minibatches"
    return kind


def num_rows(batch: Batch) -> int:
    """N, the common first dimension of a batch."""
    return len(next(iter(batch.values())))


def _detached(batch: Batch) -> Batch:
    """Data as they are, but for gradients: what is trained, or run without them, are programs alone."""
    return {key: value.detach() if value.requires_grad else value for key, value in batch.items()}


def check_finite(batch: Batch, name: str) -> None:
    """Raises ValueError, with the place, where a floating-point tensor holds NaN or infinity."""
    for key, value in batch.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            where = torch.nonzero(~torch.isfinite(value))[0].tolist()
            found = value[tuple(where)].item()
            raise ValueError(f"Expected finite values in {name}[{key!r}]; got {found} at index {where}")


class Data:
    """Tensors of one length N in memory, handed out in minibatches.

    Args:
        tensors: dict of tensors `(N, ...)`, a single tensor (named `x`) or a pair (`x`, `y`).
        dynamic: draw `x` anew from Bernoulli(x) each time that it is shown; `x` then holds
            probabilities (dynamic binarization, Burda et al. 2016).
        show: a function of a minibatch that gives what is handed out in its place, each time anew: an augmentation,
            or draws of another program's latents, `lambda batch: {**batch, "x": m1.encode(batch["x"], sample=True)}`.
        check: look for NaN, infinity and wrong values; off only for tensors that were looked through before.

    Raises:
        ValueError: for NaN or infinity, an empty set, unequal lengths, or `dynamic` with values outside [0, 1].

    Example:
        >>> data = Data(torch.arange(6.).reshape(3, 2))
        >>> [batch["x"].shape[0] for batch in data.batches(2)]
        [2, 1]
    """

    def __init__(
        self,
        tensors: Any,
        *,
        dynamic: bool = False,
        show: Callable[[Batch], Batch] | None = None,
        check: bool = True,
    ):
        self.tensors = _detached(as_batch(tensors, "data"))
        self.dynamic, self.show = dynamic, show
        if show is not None and not callable(show):
            raise ValueError(f"Expected show to be a function of a minibatch; got {type(show).__name__}")
        if dynamic and not ("x" in self.tensors and self.tensors["x"].is_floating_point()):
            found = ", ".join(f"{key} of {value.dtype}" for key, value in self.tensors.items())
            raise ValueError(f"Expected x, of floats, among the tensors of dynamic data; got {found}")
        if check:
            check_finite(self.tensors, "data")
        if check and dynamic:
            check_unit_interval(self.tensors["x"])

    @property
    def fixed(self) -> bool:
        """Whether what is handed out is what is held."""
        return not self.dynamic and self.show is None

    def __len__(self) -> int:
        return num_rows(self.tensors)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def select(self, *keys: str) -> "Data":
        """The same data with these tensors alone, for a program that takes no others."""
        return self._with({key: self.tensors[key] for key in keys})

    def rows(self, index: Tensor | slice) -> "Data":
        """The data at `index`."""
        return self._with({key: value[index] for key, value in self.tensors.items()})

    def to(self, device: torch.device | str | None) -> "Data":
        """The same data on another device."""
        return self._with({key: value.to(device) for key, value in self.tensors.items()})

    def _with(self, tensors: Batch) -> "Data":
        return Data(tensors, dynamic=self.dynamic and "x" in tensors, show=self.show, check=False)

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """All data once, in minibatches of `batch_size`; the last one may be smaller.

        Args:
            batch_size: number of data in a minibatch.
            shuffle: source of a random order, and of dynamic binarization; None keeps the order
                (and binarizes, where that is dynamic, from torch's global generator).
        """
        check_whole(batch_size=batch_size)
        order = None
        if shuffle is not None:
            order = self._order(shuffle)
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self._shown(rows if order is None else order[rows], shuffle)

    def endless(self, batch_size: int, shuffle: torch.Generator) -> Iterator[Batch]:
        """Minibatches of `batch_size`, or of all data where there are fewer, in one random order after the other."""
        size = min(batch_size, len(self))
        order = self._order(shuffle)
        while True:
            if len(order) < size:
                order = torch.cat([order, self._order(shuffle)])
            yield self._shown(order[:size], shuffle)
            order = order[size:]

    def _order(self, shuffle: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=shuffle).to(next(iter(self.tensors.values())).device)

    def _shown(self, rows: slice | Tensor, shuffle: torch.Generator | None) -> Batch:
        batch = {
            key: value[rows] if isinstance(rows, slice) else value.index_select(0, rows)
            for key, value in self.tensors.items()
        }
        if self.dynamic:
            batch["x"] = _bernoulli(batch["x"], shuffle)
        if self.show is None:
            return batch
        shown = self.show(batch)
        if not isinstance(shown, dict):
            raise ValueError(f"Expected show to give a minibatch, a dict of tensors; got {type(shown).__name__}")
        return shown


def _bernoulli(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of 0 and 1; probabilities are rounded to multiples of 2^-16.

    Noise of 16 bits, four numbers for each that is drawn, costs a fifth of floats. It comes from the CPU's generator,
    so that a seed gives the same bits on every device.
    """
    count = math.ceil(probability.numel() / 4)
    noise = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator).view(torch.int16)
    noise = noise[: probability.numel()].view(probability.shape).to(probability.device)
    return (probability * 2**16 - (2**15 + 0.5)).gt_(noise)


def as_data(data: Any, name: str = "data") -> "Data | DataLoader[Any]":
    """A `Data` from tensors; a `Data` or a torch `DataLoader` as it is.

    Raises:
        ValueError: as `as_batch`; for NaN or infinity.
    """
    if isinstance(data, Data | DataLoader):
        return data
    data = Data(as_batch(data, name), check=False)
    check_finite(data.tensors, name)
    return data


def count(data: "Data | DataLoader[Any]") -> int | None:
    """N, where it is known beforehand."""
    if isinstance(data, Data):
        return len(data)
    whole = data.batch_sampler is None and not isinstance(data.sampler, BatchSampler)  # minibatches of any size
    return None if whole or not isinstance(data.dataset, Sized) else len(data.dataset)


def stream(
    data: "Data | DataLoader[Any]",
    batch_size: int | None = None,
    *,
    shuffle: torch.Generator | None = None,
    device: torch.device | None = None,
    name: str = "data",
) -> Iterator[Batch]:
    """Minibatches on a device; a DataLoader's are its own, checked for NaN and infinity as they come, and not kept."""
    if isinstance(data, Data):
        yield from data.to(device).batches(batch_size or len(data), shuffle=shuffle)
        return
    for loaded in data:
        batch = _detached(as_batch(loaded, name))
        check_finite(batch, name)
        yield {key: value.to(device) for key, value in batch.items()}


def check_unit_interval(x: Tensor) -> None:
    """Raises ValueError for values that are no probabilities."""
    if not bool(((x >= 0) & (x <= 1)).all()):  # NaN included
        raise ValueError(f"Expected values in [0, 1] to binarize; got {x.min().item():g} to {x.max().item():g}")
