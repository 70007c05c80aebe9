"""Several processes find what one finds; what goes wrong in one is known to all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import together
import torch

import pyrovae as pv
from pyrovae.checkpoint import read_checkpoint
from pyrovae.processes import Processes

SCRIPT = Path(together.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pv.__file__).parent.parent)}


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*processes, codes=(0,)):
    """What they print, once all have ended with one of these codes."""
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode in codes for process in processes), "\n".join(printed)
    return "\n".join(printed)


def by_script(file):
    return finished(start(SCRIPT, file, 2))


def by_torchrun(file):
    """Two machines of one process each, both of them this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", free.getsockname()[1]]
    nodes = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, *address, "--node-rank"]
    return finished(*(start(*nodes, rank, SCRIPT, file) for rank in range(2)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return together.findings(folder), folder


@pytest.mark.parametrize("launch", [by_script, by_torchrun])
def test_two_processes_find_what_one_finds(launch, alone, tmp_path):
    expected, folder = alone
    copytree(folder / "given", tmp_path / "alone")
    printed = launch(tmp_path / "found.pt")
    assert printed.count("is done") == 2
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == expected.keys()
    errors = found.pop("errors")
    for name in found:
        for key, value in expected[name].items():
            assert found[name][key].shape == value.shape, (name, key)
            if name != "loader of its own order":
                torch.testing.assert_close(found[name][key], value, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")
    assert 3 < len(expected["early"]["history"]) < 200, "it stops early, and not at once"
    assert errors["nan"] == expected["errors"]["nan"]
    assert "site 'x' of the model" in errors["nan"]
    for key, message in {
        "data": "Expected the same train in all 2 processes",
        "settings": "Expected the same settings in all 2 processes",
        "order": "Expected a DataLoader to give the same minibatches in all 2 processes",
        "unshared": "Expected an iterable data set to give each of 2 processes data of its own",
        "evaluate": "Expected the same data in all 2 processes",
        "devices": "Expected devices x num_nodes to be 2, the processes that are here; got 3",
    }.items():
        assert errors[key].startswith(f"ValueError: {message}"), errors[key]
    first, second = (state["torch"] for state in read_checkpoint(tmp_path / "noise" / "checkpoint.pt")["random"])
    assert not torch.equal(first, second), "each draws noise of its own"
    goes_on_alone(tmp_path, expected)


def goes_on_alone(folder, expected):
    """A run of two processes is resumed by one, to where one alone comes."""
    resumed = together.trained(together.data(101), run_dir=folder / "given", epochs=4, resume=True)
    torch.testing.assert_close(resumed["history"], expected["resumed"]["history"], rtol=1e-9, atol=1e-9)
    vae = pv.load(folder / "noise")
    history = pv.fit(
        vae, together.data(50)["x"].float(), epochs=4, seed=0, run_dir=folder / "noise", resume=True, **together.SMALL
    )
    assert len(history) == 4
    assert history[3]["elbo"] > history[1]["elbo"]


def rate(epoch):
    return 0.01


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_all_and_the_run_goes_on(rank, tmp_path):
    undisturbed = together.trained(together.data(101), epochs=6)["history"]
    codes = (-9, 1)  # killed; of the other, by the launcher's watch or the error below
    printed = finished(start(SCRIPT, tmp_path / "run", rank), codes=codes)
    if rank == 1:
        assert "ConnectionError: Expected all 2 processes to take part; at least one has failed" in printed
    files = {"config.json", "metrics.csv", "model.safetensors", "checkpoint.pt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == files, "none is half written"
    pv.load(tmp_path / "run", together.WithNoise().double())
    resumed = together.trained(together.data(101), run_dir=tmp_path / "run", epochs=6, resume=True, lr=rate)
    assert len(resumed["gradients"]) == 3 * 11, "the three epochs before were kept"
    torch.testing.assert_close(resumed["history"], undisturbed, rtol=1e-9, atol=1e-9)


def test_the_command_shares_the_work_and_writes_once(tmp_path):
    small = ["--epochs", 2, "--hidden", 20, "--z-dim", 2, "--num-particles", 20, "--out"]
    printed = finished(start("-m", "pyrovae.cli", "train", *small, tmp_path / "run", "--devices", 2))
    assert printed.count("best epoch") == printed.count("evaluation.json") == printed.count("bounds.png") == 1
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    test = pv.data.load("digits", "dynamic").test
    result = pv.evaluate(pv.load(tmp_path / "run"), test, 20, seed=0, progress=False)
    assert written["per_datum"]["log_px"] == pytest.approx(result.log_px.tolist(), rel=1e-6)


@pytest.mark.slow
def test_compiled_gradients_are_added_up_too(alone, tmp_path):
    finished(start(SCRIPT, tmp_path / "found.pt", 2, "compiled"))
    found = torch.load(tmp_path / "found.pt", weights_only=True)["vae"]
    torch.testing.assert_close(found, alone[0]["vae"], rtol=1e-9, atol=1e-9)


def test_a_process_alone_is_a_group_of_one():
    alone = Processes.start("cpu")
    assert (alone.rank, alone.size, alone.device) == (0, 1, torch.device("cpu"))
    assert alone.gather(lambda: 3) == [3]
    batch = {"x": torch.arange(5)}
    assert alone.share(batch) is batch
    assert [Processes(rank, 3).share(batch)["x"].tolist() for rank in range(3)] == [[0, 3], [1, 4], [2]]
    assert Processes(5, 6).share(batch) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "Expected devices to be a whole number of at least 1; got 0"),
        ({"devices": 2.0}, "Expected devices to be a whole number of at least 1; got 2.0"),
        ({"num_nodes": -1}, "Expected num_nodes to be a whole number of at least 1; got -1"),
    ],
)
def test_bad_numbers_of_processes(options, message):
    with pytest.raises(ValueError, match=message):
        pv.fit(pv.VAE.mlp(4, 2), torch.zeros(3, 4), progress=False, **options)
    with pytest.raises(ValueError, match=message):
        Processes.start("cpu", **options)


def test_a_prompt_cannot_start_others():
    code = "import torch, pyrovae as pv; pv.evaluate(pv.VAE.mlp(4, 2), torch.zeros(3, 4), 2, devices=2)"
    printed = finished(start("-c", code), codes=(1,))
    assert "Expected processes that can be started, 2 in all; got a Python prompt or notebook" in printed
