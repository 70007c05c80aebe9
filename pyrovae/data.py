"""Data sets, and how they are binarized."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyrovae import sources
from pyrovae.arguments import check_one_of, check_seed, check_whole
from pyrovae.batches import Batch as Batch
from pyrovae.batches import Data as Data
from pyrovae.batches import as_batch as as_batch
from pyrovae.batches import check_unit_interval
from pyrovae.streams import Blocks as Blocks
from pyrovae.streams import OnDisk as OnDisk
from pyrovae.streams import as_floats
from pyrovae.streams import in_epochs as in_epochs

Binarize = Literal["none", "dynamic", "static", "threshold"]


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
    try:
        data = [_binarized(part, binarize, generator, train=i == 0) for i, part in enumerate(parts)]
    except ValueError as error:
        raise ValueError(f"{error}, in {name_or_path}") from error
    return Splits(str(name_or_path), binarize, shape, *data)


def _binarized(part: Batch, binarize: Binarize, generator: torch.Generator, train: bool) -> Data:
    x = part["x"]
    if binarize == "threshold":
        check_unit_interval(x)
        x = (x > 0.5).float()
    elif binarize == "static" or (binarize == "dynamic" and not train):
        check_unit_interval(x)
        x = (torch.rand(x.shape, generator=generator) < x).float()
    return Data({**part, "x": x}, dynamic=binarize == "dynamic" and train)


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
    if x.size == 0:
        raise ValueError(f"Expected at least one datum in each part; got shape {x.shape}, in {name}")
    try:
        return as_floats(x)
    except ValueError as error:
        raise ValueError(f"{error}, in {name}") from error
