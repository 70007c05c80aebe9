"""A process that has imported everything and forks a child for each fault: real kills, real errors of the kernel.

It reads a list of jobs a line from its input, runs them side by side and answers with what became of each.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

EPOCHS = 12
NAMES = ("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "evaluation.json")


class Server:
    """The side of the tests."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *jobs: dict) -> list[dict]:
        """For each job (its name and arguments) what became of it: its `status`, negative for a signal, what it `said`,
        and the bytes of `memory` that it took at most.

        One that has a `signal` is killed, `after` so many seconds, and if `writing` as soon as it then writes a file.
        """
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# --- jobs, each in a child ------------------------------------------------------------------------


def train(say, folder, resume=False, at=None, fault=None, **arguments):
    """A run of a few milliseconds an epoch that writes after each; at an epoch something may happen."""
    import torch

    import pyrovae.run
    from pyrovae import VAE, fit
    from pyrovae.conditionals import UnitNormal

    pyrovae.run.SECONDS_BETWEEN_WRITES = -1
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).cumsum(1)

    def rate(epoch):
        if epoch == at:
            FAULTS[fault](Path(folder), **arguments)
        return 0.01

    torch.manual_seed(1)
    program = VAE.mlp(4, 2, (5,), likelihood=UnitNormal)
    options = {"epochs": EPOCHS, "batch_size": 20, "lr": rate, "seed": 0, "progress": False}
    say("started")
    try:
        fit(program, x[:40], x[40:], run_dir=folder, resume=resume, **options)
    finally:
        restore(Path(folder))


def evaluation(say, folder):
    """Measures a run and writes what it found, again and again."""
    import torch

    from pyrovae import evaluate, load
    from pyrovae.files import write_json

    program = load(folder)
    x = torch.zeros(20, 4)
    say("started")
    while True:
        result = evaluate(program, x, 20, seed=0, progress=False)
        write_json(Path(folder) / "evaluation.json", {**result.summary(), "log_px": result.log_px.tolist()})


def read(say, kind, paths):
    """Reads files one after the other, and says of each what it holds or why it was refused."""
    import pyrovae.sources

    pyrovae.sources.UNPACKED = 2**24, 100
    os.chdir(Path(paths[0]).parent)
    for path in paths:
        try:
            outcome = {"holds": digest(READERS[kind](Path(path)))}
        except Exception as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        say(outcome)


def nothing(say):
    """What a child takes that does nothing."""


JOBS = {job.__name__: job for job in (train, evaluation, read, nothing)}


def small_file(folder, size):
    """No file may grow beyond a size from now on: the kernel's error for it comes at that byte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(folder):
    """The files that are being written stand on a device that is full."""
    for name in NAMES:
        (folder / f".{name}.{os.getpid()}.part").symlink_to("/dev/full")


def read_only(folder):
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # who may do nothing that is not allowed


FAULTS = {fault.__name__: fault for fault in (small_file, full_disk, read_only)}


def restore(folder):
    if os.getuid() == 0:
        os.seteuid(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if folder.is_dir():
        folder.chmod(0o755)
        for path in folder.iterdir():
            if path.is_symlink():
                path.unlink()


def _weights(path):
    from pyrovae import load

    return load(path).state_dict()


def _fill(path):
    import torch

    from pyrovae import VAE, load
    from pyrovae.conditionals import UnitNormal

    torch.manual_seed(2)
    program = VAE.mlp(4, 2, (5,), likelihood=UnitNormal)
    before = digest(program.state_dict())
    try:
        return load(path, program).state_dict()
    except ValueError:
        assert digest(program.state_dict()) == before, "the program is untouched"
        raise


def _checkpoint(path):
    from pyrovae.checkpoint import read_checkpoint

    return read_checkpoint(path)


def _resume(path):
    train(lambda _: None, str(path.parent), resume=True)
    return _weights(path.parent)


def _config(path):
    from pyrovae.cli import _stored
    from pyrovae.files import read_json

    return [read_json(path), repr(_stored(path.parent))]


def _data(path):
    from pyrovae import data

    return _parts(data.load(path))


def _known(name):
    def read(path):
        from pyrovae import data

        os.environ["PYROVAE_DATA"] = str(path.parent.parent)
        return _parts(data.load(name))

    return read


def _parts(splits):
    return [part.tensors for part in (splits.train, splits.val, splits.test)]


def _idx(path):
    from pyrovae.sources import _read_idx

    return _read_idx(path)


READERS = {
    "weights": _weights,
    "fill": _fill,
    "checkpoint": _checkpoint,
    "resume": _resume,
    "config": _config,
    "npy": _data,
    "npz": _data,
    "idx": _idx,
    "jsb-chorales": _known("jsb-chorales"),
    "binarized-mnist": _known("binarized-mnist"),
    "frey-faces": _known("frey-faces"),
}


def digest(content):
    """Of all tensors, arrays and plain values within, and their places."""
    import numpy as np
    import torch

    if isinstance(content, dict):
        content = [(str(key), digest(value)) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        content = [digest(value) for value in content]
    elif isinstance(content, torch.Tensor):
        content = str(content.dtype), tuple(content.shape), content.contiguous().flatten().view(torch.uint8).tolist()
    elif isinstance(content, np.ndarray):
        content = str(content.dtype), content.shape, content.tobytes()
    return hashlib.sha256(repr(content).encode()).hexdigest()


# --- the server ------------------------------------------------------------------------------------


def start(job):
    """A child that runs a job, and the end of the pipe on which it speaks."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        return child, os.fdopen(ours)
    status = 1
    try:
        say = os.fdopen(theirs, "w", buffering=1)
        signal.alarm(300)  # what never ends is a failure, too
        JOBS[job.pop("job")](lambda what: print(json.dumps(what), file=say), **job)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        bases = [base.__name__ for base in type(error).__mro__]
        print(json.dumps({"error": type(error).__name__, "bases": bases, "message": str(error)}), file=say)
    finally:
        say.flush()
        os._exit(status)


def wait_for_a_write(child, folder):
    """Until a file stands beside its final name, or the child has ended."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if os.path.isdir(folder) and any(name.endswith(".part") for name in os.listdir(folder)):
            return


def finish(child, pipe, kill, after, folder):
    said = []
    if kill is not None:
        said.append(pipe.readline())  # that it has started
        time.sleep(after)
        if folder is not None:
            wait_for_a_write(child, folder)
        os.kill(child, kill)
    said += pipe.read().splitlines()
    _, status, used = os.wait4(child, 0)
    heard = []
    for line in said:
        try:
            heard.append(json.loads(line))
        except ValueError:  # it was killed while it spoke
            heard.append(line)
    return {"status": os.waitstatus_to_exitcode(status), "said": heard, "memory": 1024 * used.ru_maxrss}


def serve():
    import lightning_fabric  # noqa: F401  what a child needs, once
    import torch

    import pyrovae.cli  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        jobs = json.loads(line)
        kills = [
            (job.pop("signal", None), job.pop("after", 0), job["folder"] if job.pop("writing", False) else None)
            for job in jobs
        ]
        children = [start(job) for job in jobs]
        print(json.dumps([finish(*child, *kill) for child, kill in zip(children, kills, strict=True)]), file=answers)


if __name__ == "__main__":
    serve()
