"""Where data sets come from: embedded, from files, or downloaded once and verified. Arrays as they are stored."""

import gzip
import json
import math
import os
import struct
import zipfile
import zlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
NAMES = ("digits", *IDX_SOURCES, "binarized-mnist", "frey-faces", "jsb-chorales")
LOWEST, HIGHEST = 21, 108  # the keys of a piano, as MIDI counts pitches


class Part(NamedTuple):
    """Data `(N, ...)`, their labels `(N,)`, if any, and their lengths `(N,)`, where data are sequences `(N, T, D)`."""

    x: np.ndarray
    y: np.ndarray | None = None
    lengths: np.ndarray | None = None


def read(name: str) -> list[Part]:
    """Training, validation and test data of a known set or a file.

    Raises:
        ValueError: for an unknown name, or a file of the wrong kind.
        FileNotFoundError: where the files of a known set are missing.
    """
    parts: list[Part]
    if name == "digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        parts = _cut_at_random((digits.images / 16).astype(np.float32), digits.target)
    elif name in IDX_SOURCES:
        parts = _read_idx_set(name)
    elif name == "binarized-mnist":
        archive = _known_arrays(name, "binarized_mnist.npz", "train", "valid", "test")
        bits = [np.unpackbits(part, axis=1).reshape(-1, 28, 28) for part in archive]
        parts = [Part(part.astype(np.float32)) for part in bits]
    elif name == "frey-faces":
        (images,) = _known_arrays(name, "frey_faces.npz", "images")
        parts = [Part(part) for part in np.split(images, [int(0.8 * len(images)), int(0.9 * len(images))])]
    elif name == "jsb-chorales":
        parts = _read_chorales(_known_file(name, "jsb-chorales-quarter.json"))
    elif Path(name).suffix in (".npy", ".npz"):
        parts = _read_own(Path(name))
    else:
        guess = get_close_matches(name, NAMES, 1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"Expected a data set ({', '.join(NAMES)}) or a .npy or .npz file; got {name!r}{hint}")
    return parts


def _cut_at_random(x: np.ndarray, y: np.ndarray | None, lengths: np.ndarray | None = None) -> list[Part]:
    order = np.random.default_rng(0).permutation(len(x))
    held_out = math.ceil(len(x) / 10)
    cuts = np.split(order, [len(x) - 2 * held_out, len(x) - held_out])
    return [Part(x[cut], *(None if each is None else each[cut] for each in (y, lengths))) for cut in cuts]


def _read_own(path: Path) -> list[Part]:
    if not path.exists():
        raise FileNotFoundError(f"Expected a data file; got {path}, which does not exist")
    arrays = _arrays(path)
    if "val" in arrays:
        arrays["valid"] = arrays.pop("val")
    if {"train", "valid", "test"} <= arrays.keys():
        parts = [arrays[part] for part in ("train", "valid", "test")]
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(f"Expected parts of one datum's shape in {path}; got {[part.shape for part in parts]}")
        return [Part(part) for part in parts]
    if "x" not in arrays:
        raise ValueError(f"Expected {path} to hold train, val and test, or x; got {', '.join(arrays) or 'nothing'}")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or len(x) < 10:
        raise ValueError(f"Expected at least 10 data in an array (N, ...); got shape {x.shape} in {path}")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise ValueError(f"Expected whole-number labels y of shape {x.shape[:1]}; got {y.dtype} {y.shape} in {path}")
    lengths = arrays.get("lengths")
    if lengths is not None and (x.ndim != 3 or lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu"):
        raise ValueError(
            f"Expected sequences x (N, T, D) and whole-number lengths (N,); "
            f"got {x.shape} and {lengths.dtype} {lengths.shape} in {path}"
        )
    return _cut_at_random(x, y, lengths)


def _read_chorales(path: Path) -> list[Part]:
    """Chords, lists of MIDI pitches, as piano rolls: 88 keys at each step."""
    try:
        chorales = json.loads(path.read_text())
        return [_piano_rolls(chorales[part]) for part in ("train", "valid", "test")]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"Expected {path} to hold train, valid and test, lists of lists of chords; got {error!r}"
        ) from error


def _piano_rolls(sequences: list[list[list[float]]]) -> Part:
    lengths = np.array([len(chords) for chords in sequences])
    rolls = np.zeros((len(sequences), lengths.max(), HIGHEST - LOWEST + 1), np.float32)
    for roll, chords in zip(rolls, sequences, strict=True):
        for step, chord in zip(roll, chords, strict=False):
            keys = [int(pitch) - LOWEST for pitch in chord]
            if keys and not 0 <= min(keys) <= max(keys) < len(step):
                raise ValueError(f"pitches {chord}, not all from {LOWEST} to {HIGHEST}")
            step[keys] = 1
    return Part(rolls, lengths=lengths)


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


def _read_idx_set(name: str) -> list[Part]:
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(_read_idx(_idx_file(name, f"{part}-images-idx3-ubyte.gz")))
        labels.append(_read_idx(_idx_file(name, f"{part}-labels-idx1-ubyte.gz")))
    return [
        Part(images[0][:50_000], labels[0][:50_000]),
        Part(images[0][50_000:], labels[0][50_000:]),
        Part(images[1], labels[1]),
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
