"""What several processes do together, as a script: `python together.py FILE DEVICES`; under torchrun, FILE alone.

The first process writes what it found to FILE. Noise is given with the data, so that it does not depend on who draws.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from shutil import copytree

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyrovae as pv
from pyrovae import run
from pyrovae.conditionals import Bernoulli, DiagonalNormal
from pyrovae.processes import Processes

SMALL = {"batch_size": 10, "progress": False, "lr": 0.01}


class Given(dist.Normal):
    """A normal whose noise is known."""

    def __init__(self, loc, scale, eps):
        super().__init__(loc, scale)
        self.eps = eps

    def expand(self, batch_shape, _instance=None):
        return Given(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.eps)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.eps


class WithNoise(pv.LatentModel):
    """A VAE, of one class among three where y is there or asked for, whose noise comes with the data."""

    def __init__(self, labels=False):
        super().__init__()
        self.labels = labels
        extra = 3 if labels else 0
        self.p_x = Bernoulli.mlp(4 + extra, 12, hidden=(8,))
        self.q_z = DiagonalNormal.mlp(12 + extra, 4, hidden=(8,))
        if labels:
            self.q_y = pv.conditionals.OneHotCategorical.mlp(12, 3, hidden=(8,))

    def _parents(self, first, y):
        return (
            (first, pv.conditionals.one_hot(y, 3).to(first.dtype) if y.dim() == 1 else y) if self.labels else (first,)
        )

    def model(self, x=None, y=None, eps=None):
        with pv.data_plate(x):
            y = self._label(y, x)
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=x.dtype), 1).to_event(1))
            return pyro.sample("x", self.p_x(*self._parents(z, y)), obs=x)

    def _label(self, y, x):
        if not self.labels:
            return None
        uniform = dist.OneHotCategorical(torch.ones(3, dtype=x.dtype))
        return pyro.sample("y", uniform, obs=None if y is None else pv.conditionals.one_hot(y, 3).to(x.dtype))

    def guide(self, x, y=None, eps=None):
        with pv.data_plate(x):
            if self.labels and y is None:
                y = pyro.sample("y", self.q_y(x))
            q = self.q_z(*self._parents(x, y)).base_dist
            pyro.sample("z", Given(q.loc, q.scale, eps).to_event(1))


class Recorder(torch.optim.SGD):
    """Keeps each step's gradients."""

    kept = None

    def step(self, closure=None):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        Recorder.kept.append(torch.cat(grads).clone())
        return super().step(closure)


class Part(IterableDataset):
    """Minibatches, of which each process reads every `size`-th row; or, unshared, all."""

    def __init__(self, batch, processes, shared=True):
        self.batch, self.processes, self.shared = batch, processes, shared

    def __iter__(self):
        for start in range(0, len(self.batch["x"]), 10):
            rows = {key: value[start : start + 10] for key, value in self.batch.items()}
            share = self.processes.share(rows) if self.shared else rows
            if share is not None:  # one process ends before the others
                yield share


def data(n, labels=False):
    generator = torch.Generator().manual_seed(n)
    batch = {
        "x": (torch.rand(n, 12, generator=generator) < 0.3).double(),
        "eps": torch.randn(n, 4, generator=generator).double(),
    }
    return batch | ({"y": torch.arange(n) % 3} if labels else {})


def trained(train, labels=False, **options):
    """Gradients of each step and the history of one training."""
    torch.manual_seed(0)
    program = WithNoise(labels).double()
    Recorder.kept = []
    options = {"optimizer": Recorder, "epochs": 2, "seed": 3} | SMALL | options
    history = pv.fit(program, train, **options)
    figures = [[row[key] for key in sorted(row) if key != "seconds"] for row in history]
    return {"gradients": torch.stack(Recorder.kept), "history": torch.tensor(figures, dtype=torch.float64)}


def loader(batch, **options):
    tensors = TensorDataset(batch["x"], batch["eps"])
    return DataLoader(
        tensors,
        10,
        collate_fn=lambda rows: dict(zip(("x", "eps"), map(torch.stack, zip(*rows, strict=True)), strict=True)),
        **options,
    )


def message(function):
    try:
        function()
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def findings(folder, devices=None):
    """All that is looked at, in any number of processes."""
    found = {"vae": trained(data(101), val=data(37), devices=devices)}  # the last minibatch has one datum
    processes = Processes.start("cpu")
    rank, size = processes.rank, processes.size
    found["early"] = trained(data(8), val=data(37), epochs=200, patience=2, lr=0.003)
    found["clipped"] = trained(data(101), grad_clip=0.5, kl_weight=pv.Linear(15))
    labeled = data(23, labels=True)
    found["m2"] = trained(data(101), labels=True, labeled=labeled, val=data(37, labels=True))
    found["labeled alone"] = trained(None, labels=True, labeled=labeled)
    found["loader"] = trained(loader(data(101), shuffle=True, generator=torch.Generator().manual_seed(0)))
    found["loader of its own order"] = trained(loader(data(101), shuffle=True))
    found["iterable"] = trained(DataLoader(Part(data(101), processes), batch_size=None))

    torch.manual_seed(1)
    vae = pv.VAE.mlp(12, 3, hidden=(8,))
    x = data(50)["x"].float()
    for name, each in {"tensor": x, "loader": DataLoader(x, 7)}.items():
        result = pv.evaluate(vae, each, 40, batch_size=7, seed=5, progress=False)
        found[f"evaluate {name}"] = {key: getattr(result, key) for key in ("log_px", "elbo", "standard_error", "ess")}
    dynamic = pv.data.Data(x * 0.5 + 0.2, dynamic=True)
    found["evaluate dynamic"] = {"log_px": pv.evaluate(vae, dynamic, 3, batch_size=7, seed=5, progress=False).log_px}
    mixture = pv.GaussianMixture(12, 3).start_from(x, seed=0)
    found["clusters"] = {"log_px": pv.evaluate(mixture, x, 1, classes=torch.arange(50) % 3, progress=False).log_px}

    trained(data(101), run_dir=folder / "given", epochs=2)
    if size == 1:
        copytree(folder / "given", folder / "alone")
    found["resumed"] = trained(data(101), run_dir=folder / "alone", epochs=4, resume=True)
    pv.fit(vae, x, epochs=2, seed=0, run_dir=folder / "noise", **SMALL)

    def outside():
        pv.fit(vae, torch.full_like(x, 0.5) if rank == size - 1 else x, epochs=1, **SMALL)

    found["errors"] = {
        "nan": message(lambda: pv.fit(Broken(), {"x": x, "last": torch.arange(50.0)}, epochs=9, **SMALL)),
        "data": message(lambda: pv.fit(vae, x + rank, epochs=1, **SMALL)) if size > 1 else "",
        "settings": message(partial(pv.fit, vae, x, epochs=1, **SMALL | {"lr": 0.1 + rank})) if size > 1 else "",
        "order": message(partial(pv.fit, vae, DataLoader(x, 10, sampler=OwnOrder(rank)), epochs=1, **SMALL)),
        "unshared": message(
            partial(pv.fit, vae, DataLoader(Part({"x": x}, processes, False), batch_size=None), epochs=1, **SMALL)
        ),
        "evaluate": message(lambda: pv.evaluate(vae, x - (rank if size > 1 else 1), 3, progress=False)),
        "devices": message(lambda: pv.fit(vae, x, epochs=1, devices=3, **SMALL)) if size > 1 else "",
    }
    return found


class OwnOrder:
    """A sampler with an order of its own in each process."""

    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return 50

    def __iter__(self):
        return iter(np.random.default_rng(self.rank).permutation(50).tolist())


class Broken(pv.LatentModel):
    """Its density is not finite at the last datum, which one process has."""

    def __init__(self):
        super().__init__()
        self.q_z = DiagonalNormal.mlp(12, 2, hidden=())
        self.p_x = Bernoulli.mlp(2, 12, hidden=())

    def model(self, x=None, last=None):
        with pv.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            bad = self.training and bool((last == 49).any())
            pyro.sample("x", self.p_x(z * (torch.inf if bad else 1)), obs=x)

    def guide(self, x, last=None):
        with pv.data_plate(x):
            pyro.sample("z", self.q_z(x))


def die(folder, rank):
    """A training in which one process is killed in its fourth epoch."""

    def rate(epoch):
        if epoch == 4 and int(os.environ.get("LOCAL_RANK", 0)) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.01

    trained(data(101), run_dir=folder, epochs=6, devices=2, lr=rate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run.SECONDS_BETWEEN_WRITES = 0.0
    path, options = Path(sys.argv[1]), sys.argv[2:]
    if path.suffix != ".pt":
        die(path, rank=int(options[0]))
    devices = int(options[0]) if options else None
    if "compiled" in options:
        results = {"vae": trained(data(101), val=data(37), devices=devices, compile=True)}
    else:
        results = findings(path.parent, devices)
    rank = Processes.start("cpu").rank
    if rank == 0:
        torch.save(results, path)
    print(f"process {rank} of {os.environ['WORLD_SIZE']} is done")
