"""Data sets, how they are binarized, and minibatches from memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from pyrovae import sources
from pyrovae.arguments import check_one_of, check_seed, check_whole
from pyrovae.sequences import ended
from pyrovae.streams import Blocks as Blocks
from pyrovae.streams import OnDisk as OnDisk
from pyrovae.streams import as_floats
from pyrovae.streams import in_epochs as in_epochs

Batch = dict[str, Tensor]
Binarize = Literal["none", "dynamic", "static", "threshold"]


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
        self.tensors = as_batch(tensors, "data")
        self.tensors = _detached(self.tensors)
        self.dynamic, self.show = dynamic, show
        if show is not None and not callable(show):
            raise ValueError(f"Expected show to be a function of a minibatch; got {type(show).__name__}")
        if dynamic and not ("x" in self.tensors and self.tensors["x"].is_floating_point()):
            found = ", ".join(f"{key} of {value.dtype}" for key, value in self.tensors.items())
            raise ValueError(f"Expected x, of floats, among the tensors of dynamic data; got {found}")
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
    check_whole(per_class=per_class)
    check_seed(seed)
    y = data["y"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(int(seed))).to(y.device)
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

    All of it is read into memory; a file that is larger is read by `OnDisk`.

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
    check_one_of(get_args(Binarize), binarize=binarize)
    check_seed(seed)
    parts, shape = _read(str(name_or_path), labels)
    generator = torch.Generator().manual_seed(int(seed))
    data = [_binarized(part, binarize, generator, train=i == 0) for i, part in enumerate(parts)]
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
        batches.append({"x": _as_floats(x) if sequences else _as_floats(x).reshape(len(x), -1)})
        if labels and y is not None:
            batches[-1]["y"] = torch.from_numpy(y.astype(np.int64))
        if lengths is not None:
            batches[-1]["lengths"] = torch.from_numpy(lengths.astype(np.int64))
    return batches, shape


def _datum_shape(x: np.ndarray) -> tuple[int, ...]:
    return (1, *x.shape[1:]) if x.ndim == 3 else x.shape[1:]


def _as_floats(x: np.ndarray) -> Tensor:
    if x.size == 0:
        raise ValueError(f"Expected at least one datum in each part; got shape {x.shape}")
    return as_floats(x)
