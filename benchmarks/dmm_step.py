"""The time of one training step of a deep Markov model: Pyro's example and ours, interleaved.

    python benchmarks/dmm_step.py
    python benchmarks/dmm_step.py --example dmm.py     # Pyro's own file, from examples/ of its repository

At the settings of Pyro's example: JSB chorales from PYROVAE_DATA, 20 sequences in a minibatch as long as the longest of
them, z of 100, a gated transition of 200, an emitter of 100-100, a relu network of 600, 0.9 million parameters in all.
The example has a sample site for each step of z and of x; ours has one for a whole sequence. Without `--example` the
example's programs are written out here, around the very networks of ours: both losses are then equal at equal noise,
which is checked. Medians over rounds in which each side makes one step, on the same sequences.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrovae as pv
from pyrovae.sequences import trim

ADAM = {"lr": 3e-4, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.99996, "weight_decay": 2.0}


@dataclass(frozen=True)
class Options:
    """Time of one training step of a deep Markov model."""

    rounds: int = 15
    """Timed steps of each side, after 3 that are not."""
    batch_size: int = 20
    """Sequences in a minibatch."""
    example: Path | None = None
    """Pyro's examples/dmm.py; None for its programs as they are written here."""
    validate: bool = False
    """With Pyro's checks of values, its default."""
    threads: int | None = None
    """Of torch."""


def reversed_in_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence backwards, from its own end, zeros behind."""
    backwards = torch.zeros_like(x)
    for i, length in enumerate(lengths.tolist()):
        backwards[i, :length] = x[i, :length].flip(0)
    return backwards


def packed(data: dict[str, Tensor], rows: Tensor) -> tuple[Any, ...]:
    """A minibatch as the example has it: sorted by length; sequences, the same backwards and packed, mask, lengths."""
    rows = rows[data["lengths"][rows].sort(descending=True, stable=True).indices]
    lengths = data["lengths"][rows]
    x = data["x"][rows, : int(lengths[0])]
    mask = torch.zeros(x.shape[:2])
    for i, length in enumerate(lengths.tolist()):
        mask[i, :length] = 1
    return x, pack_padded_sequence(reversed_in_time(x, lengths), lengths, batch_first=True), mask, lengths


class Example(nn.Module):
    """The programs of Pyro's example, a site for each step, around the networks of a `DeepMarkovModel`."""

    def __init__(self, ours: pv.DeepMarkovModel):
        super().__init__()
        self.ours = ours

    def _normal(self, eta: Tensor, mask: Tensor) -> Any:
        mu, log_sigma = eta.chunk(2, -1)
        return dist.Normal(mu, log_sigma.exp()).mask(mask).to_event(1)

    def model(self, x: Tensor, backwards: Any, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        z = self.ours.z_0.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                real = mask[:, t : t + 1]
                z = pyro.sample(f"z_{t}", self._normal(self.ours.transition.net(z), real))
                logits = self.ours.likelihood.net(z)
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=logits).mask(real).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, backwards: Any, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        posterior = self.ours.posterior
        end = posterior.rnn.end.expand(1, len(x), -1).contiguous()
        h = reversed_in_time(pad_packed_sequence(posterior.rnn.rnn(backwards, end)[0], batch_first=True)[0], lengths)
        z = posterior.z_0.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                eta = posterior.step.net(torch.cat([z, h[:, t]], 1))
                z = pyro.sample(f"z_{t}", self._normal(eta, mask[:, t : t + 1]))


def example_of(path: Path | None, ours: pv.DeepMarkovModel) -> nn.Module:
    """The example's class at its own sizes, from its file, or ours that stands for it."""
    if path is None:
        return Example(ours)
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DMM()


def our_step(program: pv.DeepMarkovModel, data: dict[str, Tensor]) -> Callable[[Tensor], float]:
    """One step as `fit` makes it."""
    loss_of = Trace_ELBO()(program.model, program.guide)
    adam = torch.optim.Adam(program.parameters(), lr=3e-4, betas=(0.96, 0.999), weight_decay=2.0, fused=True)

    def step(rows: Tensor) -> float:
        loss = loss_of(**trim({key: value[rows] for key, value in data.items()}))
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.item()

    return step


def example_step(example: nn.Module, data: dict[str, Tensor]) -> Callable[[Tensor], float]:
    """One step as the example makes it: sequences packed anew, `pyro.infer.SVI` with `ClippedAdam`."""
    svi = SVI(example.model, example.guide, ClippedAdam(dict(ADAM)), Trace_ELBO())
    return lambda rows: float(svi.step(*packed(data, rows)))


def check_that_both_do_the_same(program: pv.DeepMarkovModel, example: nn.Module, data: dict[str, Tensor]) -> None:
    """Raises AssertionError where both losses differ at the same noise."""
    rows = data["lengths"].sort(descending=True, stable=True).indices[:20]  # as the example sorts them
    torch.manual_seed(0)
    ours = Trace_ELBO().loss(program.model, program.guide, **trim({key: value[rows] for key, value in data.items()}))
    torch.manual_seed(0)
    theirs = Trace_ELBO().loss(example.model, example.guide, *packed(data, rows))
    assert abs(ours - theirs) < 1e-5 * abs(theirs), (ours, theirs)


def main(options: Options) -> None:
    torch.manual_seed(0)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = pv.data.load("jsb-chorales").train.tensors
    program = pv.DeepMarkovModel.mlp(88)
    example = example_of(options.example, program)
    with pyro.validation_enabled(options.validate):
        if options.example is None:
            check_that_both_do_the_same(program, example, data)
        sides = {"Pyro's example": example_step(example, data), "pyrovae": our_step(program, data)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(3 + options.rounds):
            rows = torch.randperm(len(data["x"]))[: options.batch_size]
            for name, step in sides.items():
                start = time.perf_counter()
                step(rows)
                if round_ >= 3:
                    seconds[name].append(time.perf_counter() - start)
    sizes = [sum(p.numel() for p in side.parameters()) for side in (example, program)]
    for (name, values), size in zip(seconds.items(), sizes, strict=True):
        median = statistics.median(values)
        print(f"{name:15s} {1000 * median:6.0f} ms a step, {1 / median:6.2f} steps a second, {size:,} parameters")
    ratios = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
    print(f"median of the ratios {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
