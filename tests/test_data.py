"""Data sets read from files made here, and from the real ones where PYROVAE_DATA is set (marker data)."""

import gzip
import hashlib
import math
import os
import re
import struct
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyrovae.batches import as_data, count, stream
from pyrovae.data import Data, Splits, as_batch, load
from pyrovae.sources import IDX_SOURCES

KNOWN = {"mnist": "mnist", "binarized-mnist": "binarized_mnist", "frey-faces": "frey_faces"}
PARTS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _data_folder_only_where_asked_for(request, monkeypatch):
    if "data" in request.keywords:
        assert os.environ.get("PYROVAE_DATA"), "tests marked data need PYROVAE_DATA"
    else:
        monkeypatch.delenv("PYROVAE_DATA", raising=False)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(splits: Splits) -> list[Data]:
    return [splits.train, splits.val, splits.test]


def rows(x: Tensor) -> list[bytes]:
    return [row.tobytes() for row in x.numpy()]


def images(n: int = 50) -> np.ndarray:
    """(n, 2, 3), each row unique, float64 values in (0, 1) that float32 holds exactly."""
    return np.arange(1, 6 * n + 1).reshape(n, 2, 3) / 1024


def saved(folder: Path, name: str = "own.npz", **arrays: np.ndarray) -> Path:
    if name.endswith(".npy"):
        np.save(folder / name, arrays["x"])
    else:
        np.savez(folder / name, **arrays)
    return folder / name


# --- digits ----------------------------------------------------------------------------------------


def test_digits_are_cut_into_disjoint_parts_that_cover():
    digits, source = load("digits", labels=True), load_digits()
    assert (digits.name, digits.binarize, digits.shape) == ("digits", "none", (1, 8, 8))
    assert [len(part) for part in parts(digits)] == [1437, 180, 180]
    expected = dict(zip(rows(torch.from_numpy(source.data / 16).float()), source.target.tolist(), strict=True))
    assert len(expected) == 1797  # no two digits are equal, so that rows stand for indices
    found = [(row, y) for part in parts(digits) for row, y in zip(rows(part["x"]), part["y"].tolist(), strict=True)]
    assert len(found) == 1797
    assert dict(found) == expected
    assert digits.train["x"].dtype == torch.float32
    assert digits.train["y"].dtype == torch.int64


def test_labels_come_only_when_asked_for():
    assert list(load("digits").train.tensors) == ["x"]
    assert list(load("digits", labels=True).test.tensors) == ["x", "y"]


# --- own files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sizes"), [(50, (40, 5, 5)), (11, (7, 2, 2)), (10, (8, 1, 1))])
@pytest.mark.parametrize("name", ["own.npy", "own.npz"])
def test_a_single_array_is_cut_at_random_and_always_in_the_same_way(tmp_path, name, n, sizes):
    path = saved(tmp_path, name, x=images(n))
    splits, again = load(path), load(str(path), seed=1)
    assert tuple(len(part) for part in parts(splits)) == sizes
    together = torch.cat([part["x"] for part in parts(splits)])
    assert sorted(together.tolist()) == images(n).reshape(n, 6).tolist()
    assert together.tolist() != images(n).reshape(n, 6).tolist()
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(parts(splits), parts(again), strict=True))
    assert splits.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("shape", "datum"), [((20, 6), (6,)), ((20, 2, 3), (1, 2, 3)), ((20, 3, 2, 1), (3, 2, 1))], ids=str
)
def test_the_shape_of_a_datum_is_kept_beside_its_vector(tmp_path, shape, datum):
    splits = load(saved(tmp_path, x=images(20).reshape(shape)))
    assert splits.shape == datum
    assert splits.train["x"].shape == (16, 6)
    assert set(map(tuple, splits.train["x"].tolist())) <= set(map(tuple, images(20).reshape(20, 6).tolist()))


@pytest.mark.parametrize("validation", ["val", "valid"])
def test_parts_of_an_archive_stay_as_they_are(tmp_path, validation):
    x = images(9)
    splits = load(saved(tmp_path, **{"train": x[:4], validation: x[4:6], "test": x[6:]}))
    for part, expected in zip(parts(splits), (x[:4], x[4:6], x[6:]), strict=True):
        assert part["x"].tolist() == expected.reshape(-1, 6).tolist()


def test_labels_of_an_archive_stay_with_their_data(tmp_path):
    splits = load(saved(tmp_path, x=images(30), y=np.arange(30, dtype=np.uint8)), labels=True)
    for part in parts(splits):
        assert part["x"].tolist() == images(30).reshape(30, 6)[part["y"]].tolist()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.array([0, 1, 51, 255], np.uint8), [0, np.float32(1) / 255, np.float32(0.2), 1]),
        (np.array([False, True, True, False]), [0, 1, 1, 0]),
        (np.array([-2, 0.5, 3, 300], np.float16), [-2, 0.5, 3, 300]),
        (np.array([-2, 0.5, 3, 1e-9], np.float64), [-2, 0.5, 3, np.float32(1e-9)]),
        (np.array([-2, 0.5, 3, 7], ">f4"), [-2, 0.5, 3, 7]),
    ],
    ids=["uint8", "bool", "float16", "float64", "big-endian"],
)
def test_values_become_float32_and_bytes_are_scaled(tmp_path, stored, expected):
    x = load(saved(tmp_path, train=stored[None], val=stored[None], test=stored[None])).test["x"]
    assert x.dtype == torch.float32
    assert x.tolist() == [pytest.approx([float(value) for value in expected], rel=1e-7)]


@pytest.mark.parametrize("kind", ["int64", "complex128", "U3"])
def test_values_of_another_type_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=r"Expected an array of floats, bytes \(uint8\) or booleans; got "):
        load(saved(tmp_path, x=np.ones((20, 2)).astype(kind)))


class Bomb:
    """What a pickle could do."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["own.npy", "own.npz"])
def test_pickles_are_refused_unopened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, name, x=np.array([[Bomb()]] * 20, dtype=object))
    with pytest.raises(ValueError, match=rf"Expected a NumPy file without pickled objects; got .*{name}"):
        load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["own.npy", "own.npz"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_file_is_told(tmp_path, name, keep):
    path = saved(tmp_path, name, x=images())
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"Expected .*{name}"):
        load(path)


def test_a_damaged_member_of_an_archive_is_told(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, x=images())
    content = bytearray(path.read_bytes())
    content[200:210] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*own\.npz"):
        load(path)


@pytest.mark.parametrize("name", ["own.npy", "own.npz"])
def test_a_foreign_file_is_told(tmp_path, name):
    (tmp_path / name).write_text("label,pixel0\n7,0\n")
    with pytest.raises(ValueError, match=rf"Expected .*{name}"):
        load(tmp_path / name)


def test_what_a_file_holds_counts_and_not_its_ending(tmp_path):
    single, archive = saved(tmp_path, "own.npy", x=images()), saved(tmp_path, x=images())
    plain = load(single).train["x"]
    single.rename(tmp_path / "single.npz")
    archive.rename(tmp_path / "archive.npy")
    for name in ("single.npz", "archive.npy"):
        assert torch.equal(load(tmp_path / name).train["x"], plain)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": images(), "test": images()}, "train, val and test, or x; got train, test"),
        ({"images": images()}, "train, val and test, or x; got images"),
        ({"x": np.ones(20)}, r"at least 10 data .*got shape \(20,\)"),
        ({"x": np.ones(())}, r"at least 10 data .*got shape \(\)"),
        ({"x": images(9)}, r"at least 10 data .*got shape \(9, 2, 3\)"),
        ({"x": images(20), "y": np.arange(19)}, ""),
        ({"x": images(20), "y": np.arange(21)}, ""),
        ({"train": images(20), "val": images(20)[:0], "test": images(20)}, ""),
    ],
    ids=["no val", "no x", "one dimension", "none", "too few", "few labels", "many labels", "empty part"],
)
def test_archives_that_do_not_hold_a_data_set(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        load(saved(tmp_path, **arrays), labels="y" in arrays)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a data file; got .*none\.npz"):
        load(tmp_path / "none.npz")


# --- names and options -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "guess"), [("minst", "mnist"), ("frey_faces", "frey-faces"), ("Digits", "digits")])
def test_an_unknown_name_with_a_suggestion(name, guess):
    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean '{guess}'\?"):
        load(name)


def test_an_unknown_name_without(tmp_path):
    with pytest.raises(ValueError, match=r"digits, mnist, fashion-mnist, .* got 'xyzzy'$"):
        load("xyzzy")
    with pytest.raises(ValueError, match=r"Expected .*\.npy or \.npz"):
        load(tmp_path / "own.csv")


@pytest.mark.parametrize("binarize", ["stochastic", "", None, True])
def test_an_unknown_binarization(binarize):
    with pytest.raises(ValueError, match="binarize to be one of none, dynamic, static, threshold; got"):
        load("digits", binarize=binarize)


@pytest.mark.parametrize("form", ["parts", "x alone"])
def test_labels_where_there_are_none(tmp_path, form):
    arrays = {"train": images(), "val": images(), "test": images()} if form == "parts" else {"x": images()}
    with pytest.raises(ValueError, match=r"Expected a data set with labels; got .*own\.npz"):
        load(saved(tmp_path, **arrays), labels=True)


@pytest.mark.parametrize("name", [*KNOWN, "fashion-mnist"])
def test_a_data_folder_that_is_none(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"Expected PYROVAE_DATA to name a folder; got .*nowhere"):
        load(name)
    assert len(load("digits").train) == 1437  # which needs none


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("binarized-mnist", "binarized_mnist/binarized_mnist.npz"),
        ("frey-faces", "frey_faces/frey_faces.npz"),
        ("jsb-chorales", "jsb_chorales/jsb-chorales-quarter.json"),
    ],
)
def test_a_data_folder_without_the_file(tmp_path, monkeypatch, name, file):
    with pytest.raises(FileNotFoundError, match=f"Expected {file} .*for '{name}'; got PYROVAE_DATA unset"):
        load(name)
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"Expected {file} .*got PYROVAE_DATA={tmp_path} without {file}"):
        load(name)


@pytest.mark.parametrize("name", ["binarized-mnist", "frey-faces"])
def test_another_archive_under_the_name_of_a_known_one(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    (tmp_path / KNOWN[name]).mkdir()
    path = saved(tmp_path / KNOWN[name], f"{KNOWN[name]}.npz", other=images())
    with pytest.raises(ValueError, match=f"Expected .*{path.name}"):
        load(name)


def test_neither_a_folder_nor_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # where nobody listens
    for exception in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(exception, raising=False)
    expected = "Expected fashion-mnist/train-images-idx3-ubyte.gz .*PYROVAE_DATA .*network"
    with pytest.raises(FileNotFoundError, match=expected):
        load("fashion-mnist")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A server on this machine in the place of Fashion-MNIST's, and an empty cache; gives the served folder too."""
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address, hashes = f"http://127.0.0.1:{server.server_port}/", dict(IDX_SOURCES["fashion-mnist"][1])
        monkeypatch.setitem(IDX_SOURCES, "fashion-mnist", (address, hashes))
        yield tmp_path / "cache", tmp_path / "served", hashes
        server.shutdown()


@pytest.mark.parametrize("right", [False, True])
def test_a_download_is_read_only_if_its_hash_is_the_known_one(cache, right):
    folder, served, hashes = cache
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        for name, array in (
            (f"{part}-images-idx3-ubyte.gz", np.ones((n, 1, 1))),
            (f"{part}-labels-idx1-ubyte.gz", np.ones(n)),
        ):
            content = gzip.compress(idx(array.astype(np.uint8)), 1)
            (served / name).write_bytes(content)
            if right:
                hashes[name] = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if right:
        assert len(load("fashion-mnist").train) == 50_000
        return
    with pytest.raises(ValueError, match=r"Expected http.*train-images-idx3-ubyte.gz with sha256:3aede38.*got another"):
        load("fashion-mnist")
    assert not [path for path in folder.rglob("*") if path.is_file()], "what was refused is not kept"


def test_every_download_has_a_sha256():
    hashes = [known for _, files in IDX_SOURCES.values() for known in files.values()]
    assert len(set(hashes)) == 8
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", known) for known in hashes)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.sources.UNPACKED", (10_000, 3))
    path = tmp_path / "own.npz"
    np.savez_compressed(path, x=np.zeros((1000, 2)))
    with pytest.raises(ValueError, match=r"Expected a NumPy file .*own.npz.*: it unpacks to 16,\d+ bytes, from \d+"):
        load(path)
    np.savez(path, x=np.zeros((1000, 2)))
    assert len(load(path).train) == 800


def test_a_header_that_claims_what_is_not_there_is_refused(tmp_path):
    path = saved(tmp_path, "own.npy", x=images())
    path.write_bytes(path.read_bytes().replace(b"(50, 2, 3)", b"(49, 2, 3)"))
    with pytest.raises(ValueError, match=r"own.npy.*its header claims float64 of shape \(49, 2, 3\)"):
        load(path)


def test_own_sequences_keep_their_lengths(tmp_path):
    x, lengths = np.random.default_rng(0).random((20, 5, 3)), np.arange(20) % 5 + 1
    path = saved(tmp_path, "own.npz", x=x, lengths=lengths)
    splits = load(path)
    assert splits.shape == (3,)
    assert [part["x"].shape for part in parts(splits)] == [(16, 5, 3), (2, 5, 3), (2, 5, 3)]
    for part in parts(splits):
        beyond = torch.arange(5) >= part["lengths"].unsqueeze(1)
        assert not part["x"][beyond].any()
        assert part["x"][~beyond].all()
    for bad in ({"x": x, "lengths": lengths[:3]}, {"x": x[:, 0], "lengths": lengths}, {"x": x, "lengths": x[:, 0, 0]}):
        with pytest.raises(ValueError, match=r"Expected sequences x \(N, T, D\) and whole-number lengths"):
            load(saved(tmp_path, "bad.npz", **bad))


# --- idx files -------------------------------------------------------------------------------------


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path, monkeypatch):
    """60,000 + 10,000 images of 1 x 2 pixels and their labels, under the names of Fashion-MNIST."""
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    (tmp_path / "fashion-mnist").mkdir()
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (n, 1, 2), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = generator.integers(0, 10, n, dtype=np.uint8)
    for name, array in arrays.items():
        (tmp_path / "fashion-mnist" / f"{name}.gz").write_bytes(gzip.compress(idx(array), 1))
    return tmp_path / "fashion-mnist", arrays


def test_idx_files_are_read_and_cut_in_order(idx_folder):
    _, arrays = idx_folder
    splits = load("fashion-mnist", labels=True)
    x = np.concatenate([arrays["train-images-idx3-ubyte"], arrays["t10k-images-idx3-ubyte"]]).reshape(-1, 2)
    y = np.concatenate([arrays["train-labels-idx1-ubyte"], arrays["t10k-labels-idx1-ubyte"]])
    assert splits.shape == (1, 1, 2)
    for part, where in zip(parts(splits), (slice(50_000), slice(50_000, 60_000), slice(60_000, None)), strict=True):
        np.testing.assert_array_equal(part["x"].numpy(), x[where].astype(np.float32) / 255)
        np.testing.assert_array_equal(part["y"].numpy(), y[where])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: gzip.compress(raw)[:-100],
        lambda raw: gzip.compress(raw)[:5],
        lambda raw: gzip.compress(raw[:-1]),
        lambda raw: gzip.compress(raw + b"\0"),
        lambda raw: gzip.compress(raw[:10]),
        lambda raw: gzip.compress(b""),
        lambda raw: gzip.compress(b"\0\0\x0d" + raw[3:]),
        lambda raw: gzip.compress(b"PNG" + raw[3:]),
        lambda raw: gzip.compress(b"not an idx file"),
        lambda raw: raw,
        lambda raw: b"",
        lambda raw: b"<html>404</html>",
    ],
    ids=["cut", "cut early", "short", "long", "no sizes", "empty", "floats", "magic", "text", "raw", "no byte", "html"],
)
def test_a_spoilt_idx_file_is_told(idx_folder, spoil):
    folder, arrays = idx_folder
    name = "train-images-idx3-ubyte"
    (folder / f"{name}.gz").write_bytes(spoil(idx(arrays[name])))
    with pytest.raises(ValueError, match=rf"Expected a gzipped idx file of bytes; got .*{name}\.gz"):
        load("fashion-mnist")


# --- binarization ----------------------------------------------------------------------------------


LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture
def levels(tmp_path):
    """2,000 + 500 + 500 rows of the same five probabilities."""
    return saved(tmp_path, **{part: np.tile(LEVELS, (n, 1)) for part, n in zip(PARTS, (2000, 500, 500), strict=True)})


def assert_drawn_from(levels: tuple[float, ...], x: Tensor, seed: int) -> None:
    assert set(x.unique().tolist()) == {0.0, 1.0}
    for level, column in zip(levels, x.double().T, strict=True):
        error = math.sqrt(level * (1 - level) / len(column))
        assert abs(column.mean() - level) <= 5 * error, f"level {level}: {column.mean()}, seed {seed}"


@pytest.mark.parametrize("seed", [0, 1])
def test_static_draws_all_parts_once(levels, seed):
    for part in parts(load(levels, "static", seed=seed)):
        assert not part.dynamic
        assert_drawn_from(LEVELS, part["x"], seed)
        first, second = (next(part.batches(len(part)))["x"] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, part["x"])


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_what_is_drawn_once_comes_from_the_seed(levels, binarize):
    first, same, other = (load(levels, binarize, seed=seed) for seed in (4, 4, 5))
    for name in PARTS[binarize == "dynamic" :]:
        a, b, c = (getattr(splits, name)["x"] for splits in (first, same, other))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    if binarize == "static":  # each part has noise of its own
        assert not torch.equal(first.train["x"][:500], first.val["x"])
    assert not torch.equal(first.val["x"], first.test["x"])


def test_loading_leaves_the_global_generator_alone(levels):
    before = torch.random.get_rng_state()
    load(levels, "static")
    load(levels, "dynamic")
    load("digits")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [7])
def test_dynamic_draws_training_data_anew_each_epoch(levels, seed):
    splits, generator = load(levels, "dynamic"), random(seed)
    assert splits.train["x"].tolist() == np.tile(np.float32(LEVELS), (2000, 1)).tolist()  # probabilities, kept
    epochs = [torch.cat([batch["x"] for batch in splits.train.batches(300, shuffle=generator)]) for _ in range(5)]
    for x in epochs:
        assert_drawn_from(LEVELS, x, seed)
    disagreement = torch.stack([(x != epochs[0]).double().mean(0) for x in epochs[1:]])
    for level, share in zip(LEVELS, disagreement.T, strict=True):  # of independent draws: 2 p (1 - p)
        p = 2 * level * (1 - level)
        assert ((share - p).abs() <= 5 * math.sqrt(p * (1 - p) / 2000)).all(), f"level {level}: {share}, seed {seed}"
    assert splits.train["x"].tolist() == np.tile(np.float32(LEVELS), (2000, 1)).tolist()


@pytest.mark.parametrize("seed", [0])
def test_dynamic_keeps_validation_and_test_fixed(levels, seed):
    splits = load(levels, "dynamic", seed=seed)
    for part in (splits.val, splits.test):
        assert not part.dynamic
        assert_drawn_from(LEVELS, part["x"], seed)
        assert torch.equal(next(part.batches(500))["x"], part["x"])


def test_dynamic_follows_its_generator():
    data = Data(torch.full((40, 5), 0.5), dynamic=True)

    def epoch(shuffle: torch.Generator | None) -> Tensor:
        return torch.cat([batch["x"] for batch in data.batches(7, shuffle=shuffle)])

    assert torch.equal(epoch(random(3)), epoch(random(3)))
    assert not torch.equal(epoch(random(3)), epoch(random(4)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unshuffled = [epoch(None), epoch(None)]
        torch.manual_seed(3)
        assert torch.equal(epoch(None), unshuffled[0])
    assert not torch.equal(*unshuffled)


def test_dynamic_survives_rows_select_and_to():
    data = Data({"x": torch.full((40, 5), 0.5), "y": torch.arange(40)}, dynamic=True)
    for other in (data.rows(slice(20)), data.rows(torch.arange(20)), data.select("x"), data.to("cpu"), data.to(None)):
        assert other.dynamic
        assert set(next(other.batches(40, shuffle=random()))["x"].unique().tolist()) == {0.0, 1.0}
    assert data.rows(torch.tensor([3, 1]))["y"].tolist() == [3, 1]


def test_select_leaves_out_even_what_is_dynamic():
    data = Data({"x": torch.full((40, 5), 0.5), "y": torch.arange(40)}, dynamic=True).select("y")
    assert [(list(batch), batch["y"].tolist()) for batch in data.batches(40)] == [(["y"], list(range(40)))]


def test_threshold(tmp_path):
    x = np.float32([[0, 0.25, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1]])
    for part in parts(load(saved(tmp_path, train=x, val=x, test=x), "threshold")):
        assert part["x"].tolist() == [[0, 0, 0, 1, 1]]
        assert not part.dynamic


@pytest.mark.parametrize("binarize", ["static", "dynamic", "threshold"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.inf, math.nan])
@pytest.mark.parametrize("place", PARTS)
def test_values_that_cannot_be_binarized(tmp_path, binarize, bad, place):
    arrays = {part: np.full((20, 3), 0.5) for part in PARTS}
    arrays[place][4, 1] = bad
    with pytest.raises(ValueError, match="Expected"):
        load(saved(tmp_path, **arrays), binarize)


@pytest.mark.parametrize("bad", [-0.01, 1.01])
def test_values_outside_the_unit_interval_are_told(bad):
    x = torch.full((20, 3), 0.5, dtype=torch.float64)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=rf"values in \[0, 1\] to binarize; got .*{bad}"):
        Data(x, dynamic=True)
    assert torch.equal(Data(x)["x"], x)


# --- minibatches -----------------------------------------------------------------------------------


def test_batches_in_order_with_a_ragged_end():
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    batches = list(Data((x, y)).batches(3))
    assert [batch["y"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(torch.equal(batch["x"], x[batch["y"]]) for batch in batches)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 100])
def test_a_shuffled_epoch_shows_each_datum_once(batch_size):
    data, generator = Data((torch.arange(46.0).reshape(23, 2), torch.arange(23))), random(1)
    orders = []
    for _ in range(3):
        batches = list(data.batches(batch_size, shuffle=generator))
        sizes = [len(batch["x"]) for batch in batches]
        assert sizes == [min(batch_size, 23 - start) for start in range(0, 23, batch_size)]
        assert all(torch.equal(batch["x"], data["x"][batch["y"]]) for batch in batches)
        orders.append(torch.cat([batch["y"] for batch in batches]).tolist())
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(23))]}) == 4  # a new order each time


def test_the_order_comes_from_the_generator_alone():
    data = Data(torch.arange(50.0).unsqueeze(-1))

    def order(seed: int) -> list[list[float]]:
        return [batch["x"].flatten().tolist() for batch in data.batches(8, shuffle=random(seed))]

    before = torch.random.get_rng_state()
    assert order(5) == order(5) != order(6)
    assert torch.equal(torch.random.get_rng_state(), before)


class Operations(TorchFunctionMode):
    """Counts the tensor operations inside."""

    number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_is_never_gathered_item_by_item(shuffle, dynamic):
    numbers = []
    for n in (10, 1000):
        data = Data((torch.full((n, 2), 0.5), torch.arange(n)), dynamic=dynamic)
        with Operations() as operations:
            assert len(list(data.batches(n // 5, shuffle=random() if shuffle else None))) == 5
        numbers.append(operations.number)
    assert numbers[0] == numbers[1] > 0


# --- batches and streams ---------------------------------------------------------------------------


def test_forms_of_a_batch():
    x, y = torch.zeros(3, 2), torch.arange(3)
    for batch, expected in [
        (x, {"x": x}),
        ([x], {"x": x}),
        ((x, y), {"x": x, "y": y}),
        ([x, y], {"x": x, "y": y}),
        ({"image": x, "label": y}, {"image": x, "label": y}),
        (Data((x, y)), {"x": x, "y": y}),
    ]:
        found = as_batch(batch)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((3, 2)), "to be a tensor, a pair .* or a dict of tensors; got ndarray"),
        ([[0.0, 1.0], [2.0, 3.0]], "to be a tensor, .*got dict"),
        ((torch.zeros(3),) * 3, "to be a tensor, .*got tuple"),
        ({"x": np.zeros((3, 2))}, "to be a tensor, .*got dict"),
        (None, "to be a tensor, .*got NoneType"),
        ("digits", "to be a tensor, .*got str"),
        (torch.zeros(()), r"common first dimension N; got \{'x': None\}"),
        ({}, "common first dimension"),
        ((torch.zeros(3, 2), torch.zeros(4)), r"common first dimension N; got \{'x': 3, 'y': 4\}"),
        ((torch.zeros(3, 2), torch.zeros(())), r"common first dimension N; got \{'x': 3, 'y': None\}"),
        (torch.zeros(0, 2), "at least one datum; got an empty set"),
    ],
)
def test_what_is_no_batch(wrong, message):
    for function, name in ((as_batch, "train"), (as_data, "train")):
        with pytest.raises(ValueError, match=f"Expected .*{name} .*{message}"):
            function(wrong, name)
    with pytest.raises(ValueError, match=message):
        Data(wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_told_with_their_place(tmp_path, bad):
    x, y = torch.zeros(5, 3), torch.zeros(5)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=rf"finite values in data\['x'\]; got {bad} at index \[2, 1\]"):
        Data((x, y))
    with pytest.raises(ValueError, match=rf"finite values in val\['y'\]; got {bad} at index \[2\]"):
        as_data((y.unsqueeze(-1), x[:, 1]), "val")
    with pytest.raises(ValueError, match=rf"finite values in .*got {bad} at index \[2, 1\]"):
        load(saved(tmp_path, train=x.numpy(), val=np.zeros((2, 3)), test=np.zeros((2, 3))))


def test_as_data_keeps_what_is_data():
    x = torch.arange(6.0).reshape(3, 2)
    data, loader = Data(x), DataLoader(TensorDataset(x))
    assert as_data(data) is data
    assert as_data(loader) is loader
    assert as_data(x)["x"] is x
    assert not as_data(x).dynamic


class Counting(IterableDataset):
    """Without a length."""

    def __iter__(self):
        return iter(torch.arange(10.0).reshape(5, 2))


def test_streams_of_a_loader_are_its_own_batches():
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    pairs, alone = DataLoader(TensorDataset(x, y), batch_size=3), DataLoader(Counting(), batch_size=2)
    found = list(stream(pairs, 1, shuffle=random()))  # batch size and order are the loader's
    assert [batch["y"].tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(torch.equal(batch["x"], x[batch["y"]]) for batch in found)
    assert [batch["x"].tolist() for batch in stream(alone)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert (count(pairs), count(alone), count(Data(x))) == (7, None, 7)


def test_streams_of_a_loader_are_checked_as_they_come():
    x = torch.zeros(7, 2)
    x[4, 1] = math.nan
    batches = stream(DataLoader(TensorDataset(x), batch_size=3), name="val")
    assert next(batches)["x"].tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match=r"finite values in val\['x'\]; got nan at index \[1, 1\]"):
        next(batches)
    with pytest.raises(ValueError, match="Expected val to be a tensor, a pair"):
        next(stream(DataLoader(TensorDataset(x, x, x), batch_size=3), name="val"))


def test_streams_of_data():
    data = Data(torch.arange(14.0).reshape(7, 2))
    assert [len(batch["x"]) for batch in stream(data)] == [7]
    assert torch.equal(next(stream(data))["x"], data["x"])
    streamed = [batch["x"].tolist() for batch in stream(data, 3, shuffle=random(2), device=torch.device("cpu"))]
    assert streamed == [batch["x"].tolist() for batch in data.batches(3, shuffle=random(2))]


# --- the real sets ---------------------------------------------------------------------------------


def as_bytes(x: Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).numpy()


@pytest.mark.data
def test_mnist_is_the_original_to_the_byte():
    mnist = load("mnist", labels=True)
    assert mnist.shape == (1, 28, 28)
    assert [len(part) for part in parts(mnist)] == [50_000, 10_000, 10_000]
    x = [as_bytes(part["x"]).reshape(-1, 28, 28) for part in parts(mnist)]
    y = [part["y"].to(torch.uint8).numpy() for part in parts(mnist)]
    found = [np.concatenate(x[:2]), np.concatenate(y[:2]), x[2], y[2]]
    assert [hashlib.md5(idx(array)).hexdigest() for array in found] == [
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ]


@pytest.mark.data
def test_binarized_mnist_is_the_one_of_the_literature():
    splits = load("binarized-mnist")
    assert splits.shape == (1, 28, 28)
    assert [len(part) for part in parts(splits)] == [50_000, 10_000, 10_000]
    assert all(part["x"].shape[1] == 784 for part in parts(splits))
    assert all(bool(((part["x"] == 0) | (part["x"] == 1)).all()) for part in parts(splits))
    means = [part["x"].sum(dtype=torch.float64).item() / part["x"].numel() for part in parts(splits)]
    assert [round(mean, 5) for mean in means] == [0.13056, 0.13113, 0.13251]
    with np.load(Path(os.environ["PYROVAE_DATA"]) / "binarized_mnist" / "binarized_mnist.npz") as archive:
        assert np.array_equal(np.packbits(splits.val["x"].numpy().astype(bool), axis=1), archive["valid"])


@pytest.mark.data
def test_frey_faces_are_cut_in_the_order_of_time():
    splits = load("frey-faces")
    assert splits.shape == (1, 28, 20)
    assert [len(part) for part in parts(splits)] == [1572, 196, 197]
    together = np.concatenate([as_bytes(part["x"]) for part in parts(splits)])
    with np.load(Path(os.environ["PYROVAE_DATA"]) / "frey_faces" / "frey_faces.npz") as archive:
        np.testing.assert_array_equal(together, archive["images"].reshape(1965, 560))
    assert (together.min(), together.max()) == (8, 238)


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_labels_of_the_real_sets(name):
    if name == "mnist":
        assert load(name, labels=True).train["y"][:5].tolist() == [5, 0, 4, 1, 9]
    else:
        with pytest.raises(ValueError, match=f"with labels; got '{name}'"):
            load(name, labels=True)


def test_dynamic_binarization_draws_with_the_probabilities_that_it_is_given():
    p = torch.tensor([0.0, 1 / 255, 0.3, 0.5, 254 / 255, 1.0])
    data = Data(p.expand(100_000, 6), dynamic=True)
    x = next(data.batches(100_000, shuffle=torch.Generator().manual_seed(0)))["x"]
    assert x.unique().tolist() == [0, 1]
    error = (p * (1 - p) / 100_000).sqrt()
    assert ((x.mean(0) - p).abs() <= 5 * error + 2**-17).all(), "seed 0; 0 and 1 exactly"
    together = ((x - x.mean(0)).T @ (x - x.mean(0)) / 100_000)[1:5, 1:5]
    spread = x[:, 1:5].std(0)
    correlations = together / spread / spread.unsqueeze(1) - torch.eye(4)
    assert (correlations.abs() < 5 / 100_000**0.5).all(), "seed 0: neighbours are independent"
