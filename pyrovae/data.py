"""Data sets, how they are binarized, and minibatches from memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyrovae import sources
from pyrovae.sequences import ended

Batch = dict[str, Tensor]
Binarize = Literal["none", "dynamic", "static", "threshold"]


def as_batch(batch: Any, name: str = "batch") -> Batch:
    """A dict of tensors from a dict, a tensor (`{"x": tensor}`), a pair (`{"x": x, "y": y}`) or a whole `Data`.

    Of sequences x `(N, T, D)` that come with their lengths `(N,)`, what lies beyond these becomes zero.

    Raises:
        ValueError: for anything else, for tensors of unequal length, an empty batch, and lengths that are not from 1
            to T.
    """
    if isinstance(batch, Data):
        return next(batch.batches(len(batch)))
    if isinstance(batch, Tensor):
        batch = {"x": batch}
    elif isinstance(batch, list | tuple) and len(batch) in (1, 2):
        batch = dict(zip("xy", batch, strict=False))
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise ValueError(
            f"Expected {name} to be a tensor, a pair (x, y) or a dict of tensors; got {type(batch).__name__}"
        )
    lengths = {key: len(value) if value.dim() else None for key, value in batch.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"Expected the tensors of {name} to have one common first dimension N; got {lengths}")
    if 0 in lengths.values():
        raise ValueError(f"Expected {name} to hold at least one datum; got an empty set")
    return ended(dict(batch), name)


def num_rows(batch: Batch) -> int:
    """N, the common first dimension of a batch."""
    return len(next(iter(batch.values())))


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
        self.tensors = as_batch(tensors, "data")
        self.dynamic, self.show = dynamic, show
        if dynamic and "x" not in self.tensors:
            raise ValueError(f"Expected x among the tensors of dynamic data; got {', '.join(self.tensors)}")
        if check:
            check_finite(self.tensors, "data")
        if check and dynamic:
            _check_unit_interval(self.tensors["x"])

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
        if batch_size < 1:
            raise ValueError(f"Expected batch_size to be at least 1; got {batch_size}")
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
        return batch if self.show is None else self.show(batch)


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


def split_labels(data: Any, per_class: int = 10, seed: int = 0) -> tuple[Data, Data]:
    """A few labelled data, equally many of each class, and all others without their labels.

    Args:
        data: a `Data`, or a dict, with integer labels y `(N,)`; or a pair (x, y).
        per_class: how many of each class keep their label.
        seed: of the choice.

    Returns:
        The labelled data, class by class, and the unlabelled ones, which lack y; no datum is in both.

    Raises:
        ValueError: for data without integer labels, per_class < 1, a class with fewer data, or where none is left.

    Example:
        >>> labeled, unlabeled = split_labels((torch.rand(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])), per_class=1)
        >>> labeled["y"].tolist(), len(unlabeled), list(unlabeled.tensors)
        ([0, 1], 4, ['x'])
    """
    data = data if isinstance(data, Data) else Data(data)
    if "y" not in data.tensors or data["y"].is_floating_point() or data["y"].dim() != 1:
        found = f"y of {data['y'].dtype}, {tuple(data['y'].shape)}" if "y" in data.tensors else ", ".join(data.tensors)
        raise ValueError(f"Expected data with integer labels y (N,); got {found}")
    if per_class < 1:
        raise ValueError(f"Expected per_class to be at least 1; got {per_class}")
    y = data["y"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    chosen = []
    for label in y.unique():
        rows = order[y[order] == label][:per_class]
        if len(rows) < per_class:
            raise ValueError(f"Expected at least per_class={per_class} data of each class; got {len(rows)} of {label}")
        chosen.append(rows)
    chosen = torch.cat(chosen)
    rest = torch.ones_like(y, dtype=torch.bool)
    rest[chosen] = False
    if not bool(rest.any()):
        raise ValueError(f"Expected more data than are labelled; got {len(y)}, with per_class={per_class} all of them")
    return data.rows(chosen), data.rows(rest.nonzero().squeeze(1)).select(*(key for key in data.tensors if key != "y"))


def count(data: "Data | DataLoader[Any]") -> int | None:
    """N, where it is known beforehand."""
    if isinstance(data, Data):
        return len(data)
    return len(data.dataset) if isinstance(data.dataset, Sized) else None


def stream(
    data: "Data | DataLoader[Any]",
    batch_size: int | None = None,
    *,
    shuffle: torch.Generator | None = None,
    device: torch.device | None = None,
    name: str = "data",
) -> Iterator[Batch]:
    """Minibatches on a device; a DataLoader's are its own, and checked for NaN and infinity as they come."""
    if isinstance(data, Data):
        yield from data.to(device).batches(batch_size or len(data), shuffle=shuffle)
        return
    for loaded in data:
        batch = as_batch(loaded, name)
        check_finite(batch, name)
        yield {key: value.to(device) for key, value in batch.items()}


@dataclass(frozen=True)
class Splits:
    """A data set in three parts that do not overlap.

    Attributes:
        name: as given to `load`.
        binarize: how the values became binary.
        shape: of one datum before it was flattened: (channels, height, width) for images; of sequences, of a step.
        train, val, test: the parts.
    """

    name: str
    binarize: Binarize
    shape: tuple[int, ...]
    train: Data
    val: Data
    test: Data


def load(name_or_path: str | Path, binarize: Binarize = "none", *, labels: bool = False, seed: int = 0) -> Splits:
    """Load a data set as float32 vectors `(N, D)`, bytes scaled to [0, 1]; sequences `(N, T, D)` with their lengths.

    - `digits`: 1,797 handwritten digits of 8 x 8 pixels (UCI, through scikit-learn; embedded), cut 1437/180/180.
    - `mnist`, `fashion-mnist`: 28 x 28, cut 50000/10000/10000; from the folder that the environment variable
      `PYROVAE_DATA` names, or else downloaded once, its checksum verified, into the user's cache.
    - `binarized-mnist`: the fixed binarization of Larochelle and Murray (2011), 50000/10000/10000, from `PYROVAE_DATA`.
    - `frey-faces`: 1,965 frames of 28 x 20 from one film, cut in the order of time (neighbours in time are
      nearly equal, so a random cut would put test images into training), from `PYROVAE_DATA`.
    - `jsb-chorales`: 382 chorales by J. S. Bach in quarter notes (Boulanger-Lewandowski et al. 2012), cut 229/76/77:
      sequences of up to 160 steps of 88 keys, struck or not, from `PYROVAE_DATA`.
    - a path to `.npy` (N, ...) or `.npz`: arrays `train`, `val` (or `valid`) and `test`, or a single `x` with
      an optional `y`, which is cut 80/10/10 at random, always in the same way; with `lengths` (N,) x are sequences
      (N, T, D).

    Args:
        name_or_path: one of the names above, or a path.
        binarize: `dynamic`: training images drawn anew from Bernoulli(x) each time that they are shown, the
            other two parts once, from `seed`; `static`: all parts drawn once; `threshold`: x > 0.5; `none`.
        labels: also give the integer labels `y` `(N,)`.
        seed: of the binarization that is drawn once.

    Raises:
        ValueError: for an unknown name or option, a file of the wrong kind, or values that cannot be binarized.
        FileNotFoundError: where the files of a known set are missing.

    Example:
        >>> digits = load("digits", binarize="dynamic")
        >>> len(digits.train), len(digits.val), len(digits.test), digits.shape
        (1437, 180, 180, (1, 8, 8))
    """
    if binarize not in get_args(Binarize):
        raise ValueError(f"Expected binarize to be one of {', '.join(get_args(Binarize))}; got {binarize!r}")
    parts, shape = _read(str(name_or_path), labels)
    generator = torch.Generator().manual_seed(seed)
    try:
        data = [_binarized(part, binarize, generator, train=i == 0) for i, part in enumerate(parts)]
    except ValueError as error:
        raise ValueError(f"{error}, in {name_or_path}") from error
    return Splits(str(name_or_path), binarize, shape, *data)


def _binarized(part: Batch, binarize: Binarize, generator: torch.Generator, train: bool) -> Data:
    x = part["x"]
    if binarize == "threshold":
        _check_unit_interval(x)
        x = (x > 0.5).float()
    elif binarize == "static" or (binarize == "dynamic" and not train):
        _check_unit_interval(x)
        x = (torch.rand(x.shape, generator=generator) < x).float()
    return Data({**part, "x": x}, dynamic=binarize == "dynamic" and train)


def _check_unit_interval(x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1)).all()):  # NaN included
        raise ValueError(f"Expected values in [0, 1] to binarize; got {x.min().item():g} to {x.max().item():g}")


def _read(name: str, labels: bool) -> tuple[list[Batch], tuple[int, ...]]:
    """Three parts with x flattened, and the shape of one datum."""
    parts = sources.read(name)
    if labels and parts[0].y is None:
        raise ValueError(f"Expected a data set with labels; got {name!r}, which has none")
    sequences = parts[0].lengths is not None
    shape = parts[0].x.shape[2:] if sequences else _datum_shape(parts[0].x)
    batches: list[Batch] = []
    for x, y, lengths in parts:
        values = _as_floats(x, name)
        batches.append({"x": values if sequences else values.reshape(len(x), -1)})
        if labels and y is not None:
            batches[-1]["y"] = torch.from_numpy(y.astype(np.int64))
        if lengths is not None:
            batches[-1]["lengths"] = torch.from_numpy(lengths.astype(np.int64))
    return batches, shape


def _datum_shape(x: np.ndarray) -> tuple[int, ...]:
    return (1, *x.shape[1:]) if x.ndim == 3 else x.shape[1:]


def _as_floats(x: np.ndarray, name: str) -> Tensor:
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    elif x.dtype.kind not in "fb":
        raise ValueError(f"Expected an array of floats, bytes (uint8) or booleans; got {x.dtype}, in {name}")
    if x.size == 0:
        raise ValueError(f"Expected at least one datum in each part; got shape {x.shape}, in {name}")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
