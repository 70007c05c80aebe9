"""Two processes against one, and what Fabric adds to a step: each with one thread, on CPU, by gloo.

    python benchmarks/processes.py

A step is one of a 784-H-H-50 tanh VAE on a minibatch of binary images, shared out. Sides, each started anew in
every round, one after the other:

- loop: one process, a bare PyTorch loop over Pyro's ELBO in its module form, fused Adam;
- fit 1, fit 2: `pyrovae.fit` in one process and in two;
- ddp 2: the bare loop in two processes, in Fabric's DDP.

Printed are medians over the rounds, and ratios within them.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.processes import Processes

SIDES = "loop", "fit 1", "fit 2", "ddp 2"


@dataclass(frozen=True)
class Options:
    """Throughput of two processes against one."""

    hidden: int = 200
    """H."""
    batch_sizes: tuple[int, ...] = (100, 400, 1600)
    """Images in a minibatch, of all processes together."""
    steps: int = 40
    """Steps in an epoch."""
    epochs: int = 4
    """Of each run; the first is not counted."""
    rounds: int = 5
    """Times that every side is run."""
    side: Annotated[str | None, tyro.conf.arg(help="Run this side alone, with the first batch size.")] = None


def program_and_data(options: Options) -> tuple[pv.VAE, Tensor]:
    torch.manual_seed(0)
    x = (torch.rand(options.steps * options.batch_sizes[0], 784) < 0.1).float()
    return pv.VAE.mlp(784, 50, hidden=(options.hidden, options.hidden)), x


def by_fit(options: Options, devices: int) -> list[float]:
    """Seconds of each step; of two processes, those of adding gradients up are told, too."""
    program, x = program_and_data(options)
    spent = []
    add = Processes.sum_gradients

    def timed(processes: Processes, parameters: list[nn.Parameter], value: float) -> float:
        start = time.perf_counter()
        total = add(processes, parameters, value)
        spent.append(time.perf_counter() - start)
        return total

    Processes.sum_gradients = timed
    size = options.batch_sizes[0]
    history = pv.fit(program, x, epochs=options.epochs, batch_size=size, seed=0, devices=devices, progress=False)
    seconds = [row["seconds"] / options.steps for row in history[1:]]
    return [statistics.median(seconds), statistics.median(spent[options.steps :])]


class Loss(nn.Module):
    """The ELBO, as a module that DDP can wrap."""

    def __init__(self, program: pv.VAE):
        super().__init__()
        self.program, self.elbo = program, Trace_ELBO()

    def forward(self, x: Tensor) -> Tensor:
        return self.elbo.differentiable_loss(self.program.model, self.program.guide, x)


def by_hand(options: Options, devices: int) -> list[float]:
    """The same by a bare loop; in two processes in Fabric's DDP."""
    program, x = program_and_data(options)
    loss, optimizer = Loss(program), torch.optim.Adam(program.parameters(), lr=1e-3, fused=True)
    backward, rank = Tensor.backward, 0
    if devices > 1:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
        fabric.launch()
        loss, optimizer = fabric.setup(loss, optimizer)
        backward, rank = fabric.backward, fabric.global_rank
    seconds = []
    for _ in range(options.epochs):
        start = time.perf_counter()
        for rows in torch.randperm(len(x)).split(options.batch_sizes[0]):
            optimizer.zero_grad()
            value = loss(x[rows[rank::devices]]) * devices  # DDP takes the mean over processes
            backward(value)
            value.item()
            optimizer.step()
        seconds.append((time.perf_counter() - start) / options.steps)
    return [statistics.median(seconds[1:]), 0.0]


def run_alone(options: Options) -> None:
    torch.set_num_threads(1)
    way = by_fit if options.side in ("fit 1", "fit 2") else by_hand
    seconds = way(options, 2 if str(options.side).endswith("2") else 1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps(seconds))


def measured(options: Options, batch_size: int, side: str) -> list[float]:
    """Seconds of a step of one side, in processes of its own."""
    sizes = ["--hidden", options.hidden, "--steps", options.steps, "--epochs", options.epochs]
    command = [sys.executable, __file__, "--side", side, "--batch-sizes", batch_size, *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = tyro.cli(Options)
    if options.side is not None:
        run_alone(options)
        return
    print(f"784-{options.hidden}-{options.hidden}-50, medians of {options.rounds} rounds, one thread a process")
    print(f"{'batch':>6} {'side':>6} {'ms/step':>9} {'images/s':>10} {'adding up, ms':>14}   ratios of throughput")
    for size in options.batch_sizes:
        rounds = [{side: measured(options, size, side) for side in SIDES} for _ in range(options.rounds)]

        def ratio(side: str, other: str, rounds: list[dict[str, list[float]]] = rounds) -> str:
            each = [found[other][0] / found[side][0] for found in rounds]
            return f"{side} / {other}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"

        ratios = {"fit 1": ratio("fit 1", "loop"), "fit 2": ratio("fit 2", "fit 1"), "ddp 2": ratio("ddp 2", "loop")}
        for side in SIDES:
            step, adding = (statistics.median(found[side][i] for found in rounds) for i in range(2))
            adding = f"{1000 * adding:.2f}" if side == "fit 2" else ""
            print(f"{size:6} {side:>6} {1000 * step:9.2f} {size / step:10.0f} {adding:>14}   {ratios.get(side, '')}")


if __name__ == "__main__":
    main()
