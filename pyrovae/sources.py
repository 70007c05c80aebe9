"""Where data sets come from: embedded, from files, or downloaded once and verified. Arrays as they are stored."""

import gzip
import json
import math
import os
import struct
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pyrovae.files import parsing, printable

# Addresses as torchvision has them, and the checksums of the files that it has there.
IDX_SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
}
LABELLED = ("digits", *IDX_SOURCES)
NAMES = ("digits", *IDX_SOURCES, "binarized-mnist", "frey-faces", "jsb-chorales")
LOWEST, HIGHEST = 21, 108  # the keys of a piano, as MIDI counts pitches
UNPACKED = 2**30, 100  # bytes that a file may be unpacked to, or so many times its own


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
        archive = _known_arrays(name, "binarized_mnist.npz", (98,), "train", "valid", "test")
        bits = [np.unpackbits(part, axis=1).reshape(-1, 28, 28) for part in archive]
        parts = [Part(part.astype(np.float32)) for part in bits]
    elif name == "frey-faces":
        (images,) = _known_arrays(name, "frey_faces.npz", (28, 20), "images")
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
        if len({part.shape[1:] for part in parts}) != 1 or not all(part.ndim for part in parts):
            raise ValueError(f"Expected parts of one datum's shape in {path}; got {[part.shape for part in parts]}")
        return [Part(part) for part in parts]
    if "x" not in arrays:
        raise ValueError(f"Expected {path} to hold train, val and test, or x; got {_names(arrays)}")
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
    with parsing(path, "train, valid and test, lists of lists of chords, in a file"):
        chorales = json.loads(path.read_bytes())
        return [_piano_rolls(chorales[part]) for part in ("train", "valid", "test")]


def _piano_rolls(sequences: list[list[list[float]]]) -> Part:
    lengths = np.array([len(chords) for chords in sequences])
    if lengths.min() < 1:
        raise ValueError("a chorale without chords")
    shape = (len(sequences), int(lengths.max()), HIGHEST - LOWEST + 1)
    if 4 * math.prod(shape) > UNPACKED[0]:
        raise ValueError(f"piano rolls of shape {shape}, which are too large")
    rolls = np.zeros(shape, np.float32)
    for roll, chords in zip(rolls, sequences, strict=True):
        for step, chord in zip(roll, chords, strict=False):
            keys = [int(pitch) - LOWEST for pitch in chord]
            if keys and not 0 <= min(keys) <= max(keys) < len(step):
                raise ValueError(f"pitches {chord}, not all from {LOWEST} to {HIGHEST}")
            step[keys] = 1
    return Part(rolls, lengths=lengths)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive by their names, or that of an .npy file as x; pickled objects are refused."""
    with parsing(path, "a NumPy file without pickled objects"):
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return {"x": _read_array(file, path.stat().st_size)}
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            _check_unpacked(path, sum(member.file_size for member in members))
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise ValueError("it is compressed in another way than NumPy does")
            arrays = {}
            for member in members:
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = _read_array(file, member.file_size)
            return arrays


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """The array of an .npy file of so many bytes; what its header claims must be there, and no more."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"it has version {version} of the format")
    shape, _, dtype = readers[version](file)
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or claimed != size - file.tell():
        raise ValueError(f"its header claims {dtype} of shape {shape}, in {size} bytes")
    if math.prod(max(length, 1) for length in shape) > max(claimed, 2**20):
        raise ValueError(f"it has no bytes for shape {shape}")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # at its end the checksum of an archive is compared
        raise ValueError("it goes on after its end")
    return array


def _check_unpacked(path: Path, size: int) -> None:
    """Raises ValueError for a small file that unpacks to a large one."""
    if size > max(UNPACKED[0], UNPACKED[1] * path.stat().st_size):
        raise ValueError(f"it unpacks to {size:,} bytes, from {path.stat().st_size:,}")


def _known_arrays(name: str, file: str, shape: tuple[int, ...], *keys: str) -> list[np.ndarray]:
    """Arrays of bytes (N, *shape) of the file of a set that has no checked download."""
    path = _known_file(name, file)
    arrays = _arrays(path)
    if not set(keys) <= arrays.keys():
        raise ValueError(f"Expected {path} to hold {', '.join(keys)}; got {_names(arrays)}")
    found = [arrays[key] for key in keys]
    if any(part.shape[1:] != shape or part.dtype != np.uint8 or len(part) < 10 for part in found):
        got = ", ".join(f"{part.dtype} {part.shape}" for part in found)
        raise ValueError(f"Expected bytes of shape (N, {', '.join(map(str, shape))}) in {path}; got {got}")
    return found


def _names(arrays: dict[str, np.ndarray]) -> str:
    return printable(", ".join(arrays)) or "nothing"


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
    except ValueError as error:  # it is not kept
        raise ValueError(f"Expected {address}{file} with {hashes[file]}; got another file: {error}") from error


def _read_idx(path: Path) -> np.ndarray:
    """An idx file: two zero bytes, the type (8: bytes), the rank, the sizes (big-endian), the values."""
    with parsing(path, "a gzipped idx file of bytes"), gzip.open(path) as file:
        zeros, kind, rank = struct.unpack(">HBB", file.read(4))
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        size = math.prod(shape)
        _check_unpacked(path, size)
        values = np.frombuffer(file.read(size + 1), np.uint8)  # at its end the checksum is compared
        if (zeros, kind) != (0, 8) or len(values) != size:
            raise ValueError("header and length disagree")
        return values.reshape(shape)
