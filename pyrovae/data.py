"""Data sets, how they are binarized, and minibatches from memory."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = dict[str, Tensor]
Binarize = Literal["none", "dynamic", "static", "threshold"]

# Addresses and checksums as torchvision has them.
IDX_SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
LABELLED = ("digits", *IDX_SOURCES)
NAMES = ("digits", *IDX_SOURCES, "binarized-mnist", "frey-faces")


def as_batch(batch: Any, name: str = "batch") -> Batch:
    """A dict of tensors from a dict, a tensor (`{"x": tensor}`), a pair (`{"x": x, "y": y}`) or a whole `Data`.

    Raises:
        ValueError: for anything else, for tensors of unequal length and for an empty batch.
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
    return dict(batch)


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
        check: look for NaN, infinity and wrong values; off only for tensors that were looked through before.

    Raises:
        ValueError: for NaN or infinity, an empty set, unequal lengths, or `dynamic` with values outside [0, 1].

    Example:
        >>> data = Data(torch.arange(6.).reshape(3, 2))
        >>> [batch["x"].shape[0] for batch in data.batches(2)]
        [2, 1]
    """

    def __init__(self, tensors: Any, *, dynamic: bool = False, check: bool = True):
        self.tensors = as_batch(tensors, "data")
        self.dynamic = dynamic
        if dynamic and "x" not in self.tensors:
            raise ValueError(f"Expected x among the tensors of dynamic data; got {', '.join(self.tensors)}")
        if check:
            check_finite(self.tensors, "data")
        if check and dynamic:
            _check_unit_interval(self.tensors["x"])

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

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
        return Data(tensors, dynamic=self.dynamic and "x" in tensors, check=False)

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """All data once, in minibatches of `batch_size`; the last one may be smaller.

        Args:
            batch_size: number of data in a minibatch.
            shuffle: source of a random order, and of dynamic binarization; None keeps the order
                (and binarizes, where that is dynamic, from torch's global generator).
        """
        if batch_size < 1:
            raise ValueError(f"Expected batch_size to be at least 1; got {batch_size}")
        if shuffle is None:
            indices: Sequence[Any] = [slice(i, i + batch_size) for i in range(0, len(self), batch_size)]
        else:
            device = next(iter(self.tensors.values())).device
            indices = torch.randperm(len(self), generator=shuffle).to(device).split(batch_size)
        for index in indices:
            batch = {key: value[index] for key, value in self.tensors.items()}
            if self.dynamic:
                # uniform noise from the CPU's generator, so that a seed gives the same bits on every device
                noise = torch.rand(batch["x"].shape, generator=shuffle).to(batch["x"].device)
                batch["x"] = (noise < batch["x"]).to(batch["x"].dtype)
            yield batch


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
        shape: of one datum before it was flattened: (channels, height, width) for images.
        train, val, test: the parts.
    """

    name: str
    binarize: Binarize
    shape: tuple[int, ...]
    train: Data
    val: Data
    test: Data


def load(name_or_path: str | Path, binarize: Binarize = "none", *, labels: bool = False, seed: int = 0) -> Splits:
    """Load a data set as float32 vectors `(N, D)`, bytes scaled to [0, 1].

    - `digits`: 1,797 handwritten digits of 8 x 8 pixels (UCI, through scikit-learn; embedded), cut 1437/180/180.
    - `mnist`, `fashion-mnist`: 28 x 28, cut 50000/10000/10000; from the folder that the environment variable
      `PYROVAE_DATA` names, or else downloaded once, its checksum verified, into the user's cache.
    - `binarized-mnist`: the fixed binarization of Larochelle and Murray (2011), 50000/10000/10000, from `PYROVAE_DATA`.
    - `frey-faces`: 1,965 frames of 28 x 20 from one film, cut in the order of time (neighbours in time are
      nearly equal, so a random cut would put test images into training), from `PYROVAE_DATA`.
    - a path to `.npy` (N, ...) or `.npz`: arrays `train`, `val` (or `valid`) and `test`, or a single `x` with
      an optional `y`, which is cut 80/10/10 at random, always in the same way.

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
    if name == "digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        parts = _cut_at_random((digits.images / 16).astype(np.float32), digits.target)
    elif name in IDX_SOURCES:
        parts = _read_idx_set(name)
    elif name == "binarized-mnist":
        archive = _known_arrays(name, "binarized_mnist.npz", "train", "valid", "test")
        bits = [np.unpackbits(part, axis=1).reshape(-1, 28, 28) for part in archive]
        parts = [(part.astype(np.float32), None) for part in bits]
    elif name == "frey-faces":
        (images,) = _known_arrays(name, "frey_faces.npz", "images")
        parts = [(part, None) for part in np.split(images, [int(0.8 * len(images)), int(0.9 * len(images))])]
    elif Path(name).suffix in (".npy", ".npz"):
        parts = _read_own(Path(name))
    else:
        guess = get_close_matches(name, NAMES, 1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"Expected a data set ({', '.join(NAMES)}) or a .npy or .npz file; got {name!r}{hint}")
    if labels and parts[0][1] is None:
        raise ValueError(f"Expected a data set with labels; got {name!r}, which has none")
    shape = _datum_shape(parts[0][0])
    batches: list[Batch] = []
    for x, y in parts:
        batches.append({"x": _as_vectors(x)})
        if labels and y is not None:
            batches[-1]["y"] = torch.from_numpy(y.astype(np.int64))
    return batches, shape


def _datum_shape(x: np.ndarray) -> tuple[int, ...]:
    return (1, *x.shape[1:]) if x.ndim == 3 else x.shape[1:]


def _as_vectors(x: np.ndarray) -> Tensor:
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    elif x.dtype.kind not in "fb":
        raise ValueError(f"Expected an array of floats, bytes (uint8) or booleans; got {x.dtype}")
    if x.size == 0:
        raise ValueError(f"Expected at least one datum in each part; got shape {x.shape}")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32).reshape(len(x), -1))


def _cut_at_random(x: np.ndarray, y: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray | None]]:
    order = np.random.default_rng(0).permutation(len(x))
    held_out = math.ceil(len(x) / 10)
    cuts = np.split(order, [len(x) - 2 * held_out, len(x) - held_out])
    return [(x[cut], None if y is None else y[cut]) for cut in cuts]


def _read_own(path: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
    if not path.exists():
        raise FileNotFoundError(f"Expected a data file; got {path}, which does not exist")
    arrays = _arrays(path)
    if "val" in arrays:
        arrays["valid"] = arrays.pop("val")
    if {"train", "valid", "test"} <= arrays.keys():
        parts = [arrays[part] for part in ("train", "valid", "test")]
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(f"Expected parts of one datum's shape in {path}; got {[part.shape for part in parts]}")
        return [(part, None) for part in parts]
    if "x" not in arrays:
        raise ValueError(f"Expected {path} to hold train, val and test, or x; got {', '.join(arrays) or 'nothing'}")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or len(x) < 10:
        raise ValueError(f"Expected at least 10 data in an array (N, ...); got shape {x.shape} in {path}")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise ValueError(f"Expected whole-number labels y of shape {x.shape[:1]}; got {y.dtype} {y.shape} in {path}")
    return _cut_at_random(x, y)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive by their names, or that of an .npy file as x; pickled objects are refused."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {"x": found}
    except (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected a NumPy file without pickled objects; got {path}: {error}") from error


def _known_arrays(name: str, file: str, *keys: str) -> list[np.ndarray]:
    """Arrays of the file of a set that has no checked download."""
    path = _known_file(name, file)
    arrays = _arrays(path)
    if not set(keys) <= arrays.keys():
        raise ValueError(f"Expected {path} to hold {', '.join(keys)}; got {', '.join(arrays)}")
    return [arrays[key] for key in keys]


def _data_folder() -> Path | None:
    """The folder named by PYROVAE_DATA, or None where the variable is not set."""
    folder = os.environ.get("PYROVAE_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"Expected PYROVAE_DATA to name a folder; got {folder!r}, which is none")
    return Path(folder)


def _known_file(name: str, file: str) -> Path:
    folder, place = _data_folder(), Path(name.replace("-", "_")) / file
    if folder is None or not (folder / place).exists():
        got = "PYROVAE_DATA unset" if folder is None else f"PYROVAE_DATA={folder} without {place}"
        raise FileNotFoundError(f"Expected {place} in the folder that PYROVAE_DATA names, for {name!r}; got {got}")
    return folder / place


def _read_idx_set(name: str) -> list[tuple[np.ndarray, np.ndarray | None]]:
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(_read_idx(_idx_file(name, f"{part}-images-idx3-ubyte.gz")))
        labels.append(_read_idx(_idx_file(name, f"{part}-labels-idx1-ubyte.gz")))
    return [
        (images[0][:50_000], labels[0][:50_000]),
        (images[0][50_000:], labels[0][50_000:]),
        (images[1], labels[1]),
    ]


def _idx_file(name: str, file: str) -> Path:
    folder = _data_folder()
    if folder is not None and (folder / name / file).exists():
        return folder / name / file
    import pooch

    address, hashes = IDX_SOURCES[name]
    try:
        return Path(
            pooch.retrieve(address + file, known_hash=hashes[file], fname=file, path=pooch.os_cache("pyrovae") / name)
        )
    except OSError as error:
        raise FileNotFoundError(
            f"Expected {name}/{file} in the folder that PYROVAE_DATA names, or a network to download it; got {error}"
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """An idx file: two zero bytes, the type (8: bytes), the rank, the sizes (big-endian), the values."""
    try:
        with gzip.open(path) as file:
            content = file.read()
        zeros, kind, rank = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
        if (zeros, kind) != (0, 8) or math.prod(shape) != len(values):
            raise ValueError("header and length disagree")
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"Expected a gzipped idx file of bytes; got {path}: {error}") from error
    return values.reshape(shape)
