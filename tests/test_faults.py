"""Faults, injected for real: kills, disks that are full, folders that are read-only, damaged and hostile files.

After each fault: every file under its final name is whole, the run that is resumed ends where the undisturbed one does,
what was damaged is refused by an error that names it, and nothing in a file is executed. The seed is in the messages.
"""

import csv
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import EPOCHS, Server
from safetensors.torch import load_file, save_file

from pyrovae import VAE, checkpoint, load
from pyrovae.conditionals import UnitNormal
from pyrovae.files import is_leftover, read_json, sealed

WHOLE = {checkpoint.CONFIG, checkpoint.METRICS, checkpoint.WEIGHTS, checkpoint.CHECKPOINT}
MEMORY = 2**28  # bytes that reading a damaged file may take beyond those of a process that has imported everything
slow = pytest.mark.slow


def forms(short: int, long: int):
    """How many faults: in short, and in full where slow tests are asked for; with a seed of their own."""
    return pytest.mark.parametrize(("n", "seed"), [(short, 0), pytest.param(long, 1, marks=slow)])


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def place():
    """A folder that others than its owner can reach, too."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def survived(record_property):
    """Counts faults by kind, once each is survived; conftest.py adds them up."""
    counts: dict[str, int] = {}
    record_property("faults", counts)

    def count(kind: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1

    return count


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert server({"job": "train", "folder": str(folder)})[0]["status"] == 0
    assert {path.name for path in folder.iterdir()} == WHOLE
    return folder


def check_whole(folder: Path) -> None:
    """Every file under its final name loads; the checkpoint is that of a whole epoch."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if checkpoint.CONFIG in names:
        read_json(folder / checkpoint.CONFIG)
    if checkpoint.WEIGHTS in names:
        load(folder)
    if checkpoint.METRICS in names:
        text = (folder / checkpoint.METRICS).read_text()
        rows = list(csv.DictReader(io.StringIO(text)))
        assert text.endswith("\n")
        assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    if checkpoint.CHECKPOINT in names:
        history = checkpoint.read_checkpoint(folder / checkpoint.CHECKPOINT)["history"]
        assert len(history) <= EPOCHS
        assert not history or {checkpoint.WEIGHTS, checkpoint.METRICS} <= names
    if "evaluation.json" in names:
        assert len(read_json(folder / "evaluation.json")["log_px"]) == 20


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if is_leftover(path)} if folder.exists() else set()


def check_end(server: Server, folder: Path, undisturbed: Path) -> None:
    """Resumed, or begun where nothing was written yet, the run ends with the weights of the undisturbed one."""
    resume = folder.exists()
    assert server({"job": "train", "folder": str(folder), "resume": resume})[0]["status"] == 0
    weights = [(run / checkpoint.WEIGHTS).read_bytes() for run in (undisturbed, folder)]
    assert weights[0] == weights[1]
    first, second = (checkpoint.read_checkpoint(run / checkpoint.CHECKPOINT) for run in (undisturbed, folder))
    assert all(torch.equal(value, second["program"][name]) for name, value in first["program"].items())
    assert {path.name for path in folder.iterdir()} - {"evaluation.json"} == WHOLE


# --- kills -----------------------------------------------------------------------------------------


@forms(40, 600)
def test_kills_at_random_moments_of_training_and_saving(server, place, undisturbed, survived, n, seed):
    random, folder, left = np.random.default_rng(seed), place / "run", n
    while left:
        kill = (signal.SIGKILL, signal.SIGTERM)[int(random.integers(2))]
        after, writing = random.uniform(0, 0.4), bool(random.integers(2))
        job, before = {"job": "train", "folder": str(folder), "resume": folder.exists()}, leftovers(folder)
        (result,) = server({**job, "signal": kill, "after": after, "writing": writing})
        assert result["status"] in (0, -kill, 128 + kill), (seed, after, result)
        if result["status"] == 0:  # it came to its end before
            check_end(server, folder, undisturbed)
            shutil.rmtree(folder)
            continue
        check_whole(folder)
        half = leftovers(folder) - before
        assert not half or kill == signal.SIGKILL, "an exception leaves nothing half"
        when = "while a file was half written" if half else "in saving" if writing else "in training"
        survived(f"{signal.Signals(kill).name} {when}")
        left -= 1
    check_end(server, folder, undisturbed)


@forms(8, 200)
def test_kills_at_random_moments_of_evaluation(server, place, undisturbed, survived, n, seed):
    random, folder = np.random.default_rng(seed), place / "run"
    shutil.copytree(undisturbed, folder)
    for _ in range(n):
        kill = (signal.SIGKILL, signal.SIGTERM)[int(random.integers(2))]
        job = {"job": "evaluation", "folder": str(folder), "writing": bool(random.integers(2))}
        (result,) = server({**job, "signal": kill, "after": random.uniform(0, 0.3)})
        assert result["status"] == -kill, (seed, result)
        check_whole(folder)
        survived(f"{signal.Signals(kill).name} in evaluation")
    check_end(server, folder, undisturbed)


@forms(4, 50)
def test_of_two_runs_started_on_one_folder_one_goes_on(server, place, undisturbed, survived, n, seed):
    for i in range(n):
        folder, resume = place / str(i), bool(i % 2)
        if resume:  # killed soon
            (result,) = server({"job": "train", "folder": str(folder), "at": 3, "fault": "small_file", "size": 0})
            assert result["status"] == 1
        results = server(*[{"job": "train", "folder": str(folder), "resume": resume}] * 2)
        ended = [result for result in results if result["status"] == 0]
        refused = [result["said"][-1] for result in results if result["status"] == 1]
        assert len(ended) == len(refused) == 1, results
        # a new one that comes late finds a folder that is not empty
        assert refused[0]["error"] in (["BlockingIOError"] if resume else ["BlockingIOError", "FileExistsError"])
        assert str(folder) in refused[0]["message"]
        check_end(server, folder, undisturbed)
        survived("two runs on one folder")


# --- what cannot be written ------------------------------------------------------------------------


def check_refused(result: dict, folder: Path, reason: str) -> None:
    assert result["status"] == 1, result
    error = result["said"][-1]
    assert "OSError" in error["bases"], error
    assert reason in error["message"], error
    assert str(folder) in error["message"], error
    assert {path.name for path in folder.iterdir()} - {".lock"} <= WHOLE, "nothing half is left"


@forms(12, 100)
def test_a_file_that_cannot_grow_is_told_and_the_run_goes_on_later(server, place, undisturbed, survived, n, seed):
    """The kernel ends the write at a random byte of one of the files."""
    random = np.random.default_rng(seed)
    most = (undisturbed / checkpoint.CHECKPOINT).stat().st_size
    for i in range(n):
        folder, at = place / str(i), int(random.integers(2, EPOCHS))
        size = int(most ** random.uniform(0, 0.99))
        (result,) = server({"job": "train", "folder": str(folder), "at": at, "fault": "small_file", "size": size})
        check_refused(result, folder, "File too large")
        check_whole(folder)
        check_end(server, folder, undisturbed)
        survived("file that cannot grow")


@pytest.mark.parametrize(("fault", "reason"), [("full_disk", "No space left"), ("read_only", "Permission denied")])
@forms(3, 25)
def test_a_full_disk_and_a_read_only_folder(server, place, undisturbed, survived, fault, reason, n, seed):
    if fault == "full_disk" and not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    random = np.random.default_rng(seed)
    for i in range(n):
        folder = place / str(i)
        at = int(random.integers(2, EPOCHS))
        (result,) = server({"job": "train", "folder": str(folder), "at": at, "fault": fault})
        check_refused(result, folder, reason)
        check_whole(folder)
        assert len(checkpoint.read_checkpoint(folder / checkpoint.CHECKPOINT)["history"]) == at - 1
        check_end(server, folder, undisturbed)
        survived(fault.replace("_", " "))


# --- damaged files ---------------------------------------------------------------------------------


class Payload:
    """What a pickle could do."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def data_files(folder: Path) -> dict[str, Path]:
    """A small file of each kind that data are read from, under the name that it must have."""
    random = np.random.default_rng(0)
    x = random.random((20, 3)).astype(np.float32)
    paths = {
        "npy": folder / "own.npy",
        "npz": folder / "own.npz",
        "idx": folder / "images.gz",
        "jsb-chorales": folder / "jsb_chorales" / "jsb-chorales-quarter.json",
        "binarized-mnist": folder / "binarized_mnist" / "binarized_mnist.npz",
        "frey-faces": folder / "frey_faces" / "frey_faces.npz",
    }
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
    np.save(paths["npy"], x)
    np.savez(paths["npz"], x=x, y=np.arange(20))
    header = bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 2, 0, 0, 0, 3])
    paths["idx"].write_bytes(gzip.compress(header + random.integers(0, 256, 120, dtype=np.uint8).tobytes()))
    chorale = [[60, 64, 67], [55, 59, 62], []]
    paths["jsb-chorales"].write_text(json.dumps({part: [chorale, chorale[:1]] for part in ("train", "valid", "test")}))
    bits = {part: random.integers(0, 256, (10, 98), dtype=np.uint8) for part in ("train", "valid", "test")}
    np.savez_compressed(paths["binarized-mnist"], **bits)
    np.savez(paths["frey-faces"], images=random.integers(0, 256, (20, 28, 20), dtype=np.uint8))
    return paths


@pytest.fixture(scope="module")
def originals(server, tmp_path_factory, undisturbed):
    """A good file of each kind that is read, and what it holds."""
    folder = tmp_path_factory.mktemp("originals")
    paths = {
        "weights": undisturbed / checkpoint.WEIGHTS,
        "fill": undisturbed / checkpoint.WEIGHTS,
        "checkpoint": undisturbed / checkpoint.CHECKPOINT,
        **data_files(folder),
    }
    (folder / "run").mkdir()
    config = read_json(undisturbed / checkpoint.CONFIG)
    paths["config"] = folder / "run" / checkpoint.CONFIG
    checkpoint.write_json(paths["config"], {**config, "command": {"epochs": 3, "hidden": [5], "out": None}})
    holds = {kind: server({"job": "read", "kind": kind, "paths": [str(paths[kind])]})[0]["said"][0] for kind in paths}
    assert all("holds" in outcome for outcome in holds.values()), holds
    return {kind: (path, path.read_bytes(), holds[kind]) for kind, path in paths.items()}


KINDS = ("weights", "fill", "checkpoint", "config", "npy", "npz", "idx", "jsb-chorales", "binarized-mnist",
         "frey-faces")  # fmt: skip
UNSEALED = ("npy", "jsb-chorales")  # formats without a checksum: other values are not told from the right ones
REFUSED = {"ValueError", "FileNotFoundError", "PermissionError"}


def read_all(server: Server, place: Path, kind: str, like: Path, contents: list[bytes]) -> list[dict]:
    """What became of each content, under the name and in the folders that the kind asks for."""
    paths = []
    for i, content in enumerate(contents):
        path = place / str(i) / like.parent.name / like.name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        paths.append(path)
    base, result = server({"job": "nothing"}, {"job": "read", "kind": kind, "paths": list(map(str, paths))})
    assert result["status"] == 0, result
    assert len(result["said"]) == len(contents), result["said"][-1]
    assert result["memory"] < base["memory"] + MEMORY, f"{(result['memory'] - base['memory']) >> 20} MiB"
    assert not list(place.rglob("executed")), "nothing in a file is executed"
    for outcome, path in zip(result["said"], paths, strict=True):
        if "error" in outcome:
            assert outcome["error"] in REFUSED, outcome
            assert str(path) in outcome["message"], outcome
            assert len(outcome["message"]) < 1500, outcome
    return result["said"]


def truncated(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(len(content))]


def flipped(content: bytes, random: np.random.Generator) -> bytes:
    """With one bit that is another; in half of the cases in the first or last 300 bytes, where headers are."""
    edge = [*range(min(300, len(content))), *range(max(0, len(content) - 300), len(content))]
    position = int(random.choice(edge)) if random.random() < 0.5 else int(random.integers(len(content)))
    other = bytearray(content)
    other[position] ^= 1 << int(random.integers(8))
    return bytes(other)


def overwritten(content: bytes, random: np.random.Generator) -> bytes:
    """With random bytes from somewhere on."""
    start = int(random.integers(len(content)))
    return content[:start] + random.bytes(int(random.integers(1, 40))) + content[start + 40 :]


@pytest.mark.parametrize("damage", [truncated, flipped, overwritten], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", KINDS)
@forms(4, 100)
def test_what_is_damaged_is_refused_or_holds_the_same(server, place, originals, survived, kind, damage, n, seed):
    path, content, holds = originals[kind]
    random = np.random.default_rng([seed, KINDS.index(kind)])
    contents = [damage(content, random) for _ in range(n)]
    for outcome in read_all(server, place, kind, path, contents):
        if kind not in UNSEALED:
            assert "error" in outcome or outcome == holds, (kind, damage.__name__, seed)
        survived(f"{damage.__name__} file")


def foreign_files(random: np.random.Generator) -> list[bytes]:
    buffer, archive, numbers = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"pyrovae": Payload()}, buffer)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escaped.npy", b"text")
        file.writestr("/tmp/absolute.npy", pickle.dumps(Payload()))
    np.save(numbers, np.array([[Payload()]] * 20, dtype=object), allow_pickle=True)
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + random.bytes(100)
    deep = b"[" * 200_000
    return [
        b"", b"\0" * 1000, png, random.bytes(2000), pickle.dumps(Payload()), buffer.getvalue(), archive.getvalue(),
        sealed(buffer.getvalue()), sealed(pickle.dumps(Payload())), numbers.getvalue(), deep, b'{"a":' * 100_000,
        gzip.compress(deep), b"<html>404</html>", b"null", b"[]", b"{}", b'"text"', b"9" * 5000,
        "übel".encode("utf-16"), sealed(b""), (2**62).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_files_are_refused_unexecuted(server, place, originals, survived, kind):
    contents = foreign_files(np.random.default_rng(0))
    for content, outcome in zip(contents, read_all(server, place, kind, originals[kind][0], contents), strict=True):
        assert "error" in outcome, content[:50]
        survived("foreign file")


# --- hostile files ---------------------------------------------------------------------------------


def hostile_weights(content: bytes, folder: Path) -> list[bytes]:
    """Whole safetensors files, as someone who knows the format and the seal would write them."""
    (folder / "good").write_bytes(content)
    tensors = load_file(folder / "good")
    good = VAE.mlp(4, 2, (5,), likelihood=UnitNormal)
    name = next(iter(tensors))
    hidden = ["prior", "likelihood.net.hidden", "likelihood.net.in_dim", "posterior.net.out_dim", "posterior.dim"]
    huge = [(place, size) for place in hidden for size in (10**5, 10**9, 10**12, 1e300, -1, 0)]
    configs = [_changed(checkpoint.describe(good), place.split("."), size) for place, size in huge]
    deep: list = []
    for _ in range(900):
        deep = [deep]
    layers = {"in_dim": 2, "out_dim": 2, "hidden": [1] * 10**5}
    flow = {"class": "HouseholderFlow", "arguments": {"net": None, "dim": 2, "steps": 10**6, "activation": "tanh"}}
    energy = {"class": "MLP", "arguments": {"in_dim": 2, "out_dim": 1}}
    configs += [
        deep, {"class": ["VAE"]}, {"class": "VAE", "arguments": []}, {"class": "__class__", "arguments": {}}, flow,
        {"class": "MLP", "arguments": layers}, {"shared": ["a"]}, "VAE", 3, {"class": "MLP", "arguments": {"a": deep}},
        {"class": "EnergyPrior", "arguments": {"net": energy, "dim": 10**6, "num_samples": 10**6}},
        {"class": "PixelCNN", "arguments": {"net": energy, "dim": 4, "image_shape": [1, 2, 2], "num_layers": 10**6}},
    ]  # fmt: skip
    files = [_safetensors(folder, tensors, json.dumps({"config": config, "program": "VAE"})) for config in configs]
    config = json.dumps({"config": checkpoint.describe(good), "program": "VAE"})
    for bad in (torch.nan, torch.inf, -torch.inf):
        files.append(_safetensors(folder, {**tensors, name: torch.full_like(tensors[name], bad)}, config))
    names = ("../../x", "/etc/passwd", "a\0b", "a\nb", "__class__", "training", "pyro_params.training", "", "ü" * 500,
             "pyro_params.__class__", "pyro_params../../x", "pyro_params.", "pyro_params.keys")  # fmt: skip
    files += [_safetensors(folder, {**tensors, name: torch.zeros(2)}, config) for name in names]
    for other in (torch.zeros(3), torch.zeros(10**6), torch.zeros(0), tensors[name].long(), tensors[name] + 0j):
        files.append(_safetensors(folder, {**tensors, name: other}, config))
    files += [_safetensors(folder, tensors, text) for text in ("[" * 10**5, "null", "[]", "{", '{"sha256": 3}', "NaN")]
    for claim in ([10**12], [2**63], [2**32, 2**32], [-1], [10**9] * 5):
        files.append(_header({"a": {"dtype": "F32", "shape": claim, "data_offsets": [0, 8]}}))
    files.append(_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}}))
    files.append(_header({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}))
    return files


def _changed(config, place: list[str], value):
    """A configuration with another value at a place."""
    config = json.loads(json.dumps(config))
    inner = config
    for name in place[:-1]:
        inner = inner["arguments"][name]
    inner["arguments"][place[-1]] = [value] if place[-1] == "hidden" else value
    return config


def _safetensors(folder: Path, tensors: dict, about: str) -> bytes:
    save_file(tensors, folder / "file", {"pyrovae": about})
    return (folder / "file").read_bytes()


def _header(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize("kind", ["weights", "fill"])
def test_hostile_weights_are_refused_in_bounded_memory(server, place, originals, survived, tmp_path, kind):
    path, content, holds = originals[kind]
    contents = hostile_weights(content, tmp_path)
    for content, outcome in zip(contents, read_all(server, place, kind, path, contents), strict=True):
        # where a program is given, the file's own configuration is not looked at
        assert "error" in outcome or (kind == "fill" and outcome == holds), content[:1500]
        survived("hostile file")


def hostile_checkpoints(good: dict) -> list[bytes]:
    """With a right seal and wrong contents."""
    name = next(iter(good["program"]))
    weight, average = good["program"][name], good["optimizer"]["state"][0]["exp_avg"]
    one = torch.zeros(1)

    def changed(*place, value):
        content = pickle.loads(pickle.dumps(good))
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return sealed(buffer.getvalue())

    state = ("optimizer", "state", 0, "exp_avg")
    files = [changed(part, value=value) for part in good if part != "pyrovae" for value in (3, None, "text", one, {})
             if (part, value) not in (("best", {}), ("settings", {}), ("best_epoch", 3))]  # fmt: skip
    files += [changed("history", value=value) for value in ([3], [{"elbo": "text"}], [None])]
    files += [changed("settings", "lr", value=torch.ones(2))]
    files += [changed("best_epoch", value=value) for value in (-1, 10**9)]
    files += [changed("program", name, value=value) for value in (one, weight * torch.nan, weight.new_zeros(10**6))]
    files += [changed("best", name, value=value) for value in (one, weight * torch.inf, "text", one.expand(10**9))]
    files += [changed(*state, value=value) for value in (one, average[:1], one.expand(10**12), "text", None)]
    files += [changed("optimizer", "param_groups", value=value) for value in ([], [{}], "text", None)]
    files += [changed("optimizer", "param_groups", 0, "betas", value=value) for value in ("text", 3)]
    files += [changed("random", 0, "numpy", value=("MT19937", torch.zeros(624), 10.0**9, 0.0, 0.0))]
    files += [changed("random", 0, "python", value=value) for value in ((3, (1, 2), None), "text")]
    files += [changed("random", 0, "torch", value=value) for value in (one, torch.zeros(5056, dtype=torch.uint8))]
    return [*files, *_torch_bombs()]


def _torch_bombs() -> list[bytes]:
    """What torch's own format could claim: a record that is compressed, and a bytearray of 10^11 bytes."""
    buffer, packed, large = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"pyrovae": torch.zeros(10**7)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R."
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(large, "w") as new:
        for name in old.namelist():
            new.writestr(name, call if name.endswith("data.pkl") else old.read(name)[:100])
    return [sealed(packed.getvalue()), sealed(large.getvalue()), packed.getvalue()]


def test_hostile_checkpoints_are_refused_in_bounded_memory(server, place, originals, survived):
    path = originals["checkpoint"][0]
    contents = hostile_checkpoints(checkpoint.read_checkpoint(path))
    for i, outcome in enumerate(read_all(server, place, "resume", path, contents)):
        assert "error" in outcome, (i, outcome)
        survived("hostile file")


def hostile_arrays() -> dict[str, list[bytes]]:
    """Headers that claim what is not there, and archives that unpack to far more than they are."""

    def header(shape: str, kind: str = "<f4") -> bytes:
        text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    def archive(**members: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, member in members.items():
                file.writestr(f"{name}.npy", member)
        return buffer.getvalue()

    shapes = ("(1000000000000,)", "(20, 1000000000000)", "(1000000000000, 0)", "(-1, 3)", "(True, 3)", "(20, 3.0)",
              "()", "(" * 5000, "'text'", "(9**9**9,)", "(" + "2, " * 62 + ")", "(0, 1000000000000)")  # fmt: skip
    whole = [header(shape) + bytes(240) for shape in shapes]
    whole += [
        header("(20, 3)", kind) + bytes(240) for kind in ("|O", "|V0", "<U0", "<f99", "os.system", "<M8[s]", "<c8")
    ]
    nan = header("(20, 3)") + np.full(60, np.nan, np.float32).tobytes()
    bomb = header("(20, 5000000)") + bytes(4 * 10**8 // 4)
    names = ("../../x", "/etc/passwd", "a\nb", "__class__", "train")
    return {
        "npy": [*whole, nan],
        "npz": [*(archive(x=each) for each in whole), archive(x=nan), archive(x=bomb),
                *(archive(**{name: nan}) for name in names)],
        "binarized-mnist": [archive(train=each, valid=each, test=each) for each in whole],
        "frey-faces": [archive(images=each) for each in whole],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["npy", "npz", "binarized-mnist", "frey-faces"])
def test_hostile_arrays_are_refused_in_bounded_memory(server, place, originals, survived, kind):
    contents = hostile_arrays()[kind]
    for i, outcome in enumerate(read_all(server, place, kind, originals[kind][0], contents)):
        assert "error" in outcome, (i, outcome)
        survived("hostile file")


def hostile_texts() -> dict[str, list[bytes]]:
    """Gzipped claims, scores of music, and commands of runs."""

    def idx(*shape: int, rank: int | None = None, size: int = 100) -> bytes:
        rank = len(shape) if rank is None else rank
        sizes = b"".join(length.to_bytes(4, "big") for length in shape)
        return gzip.compress(bytes([0, 0, 8, rank]) + sizes + bytes(size), 1)

    def score(train) -> bytes:
        return json.dumps({"train": train, "valid": [[[60]]], "test": [[[60]]]}).encode()

    long_and_many = [[[]] * 30_000, *[[[60]]] * 30_000]
    commands = [{"epochs": "many"}, {"hidden": 3}, {"hidden": [2.5]}, {"__class__": 1}, [], 3, None, {"model": ["vae"]},
                {"model": "../../x"}, {"data": 7}, {"seed": None}, {"resume": 1}, {"layers": [[1]]}]  # fmt: skip
    return {
        "idx": [idx(2**32 - 1, 2**32 - 1), idx(10**9), idx(), idx(1, rank=255), idx(*[1] * 80, size=1),
                idx(0, 2**32 - 1), idx(10**8, size=10**8)],
        "jsb-chorales": [score(train) for train in (long_and_many, [], [[]], "text", [[[10**30]]], [[[float("nan")]]],
                                                    [[["60"], [[]]]], [3], None, [[[0]]], [[[float("inf")]]])],
        "config": [json.dumps({"command": command}).encode() for command in commands],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["idx", "jsb-chorales", "config"])
def test_hostile_texts_are_refused_in_bounded_memory(server, place, originals, survived, kind):
    contents = hostile_texts()[kind]
    for i, outcome in enumerate(read_all(server, place, kind, originals[kind][0], contents)):
        assert "error" in outcome, (i, outcome)
        survived("hostile file")
