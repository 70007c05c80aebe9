"""Test log p(x) of binarized MNIST, the table of Burda, Grosse and Salakhutdinov (2016), one stochastic layer or two.

    PYROVAE_DATA=... python benchmarks/iwae_table.py --out table.csv                     # all rows, 40 minutes each
    PYROVAE_DATA=... python benchmarks/iwae_table.py --rows IWAE --k 5 --data static     # one of them
    PYROVAE_DATA=... python benchmarks/iwae_table.py --rows VAE IAF --k 1 --data static  # a posterior beside another
    PYROVAE_DATA=... python benchmarks/iwae_table.py --layers 2 --guides bottom-up ladder  # a guide beside another

One layer: 784-200-200-50, tanh. Two layers: 784-200-200-100-100-100-50, of which 100 and 50 are stochastic; the paper's
guide is bottom-up, q(h1 | x) q(h2 | h1), top-down and ladder are those of `HierarchicalVAE`.

VAE averages the ELBO over k draws, IWAE is the bound of k draws, DReG the same bound with the doubly reparameterized
gradient, IAF a VAE of one layer whose posterior is an inverse autoregressive flow. log p(x) is that of all test images
with 5000 draws; a latent is active where its posterior mean varies by more than 0.01 over them. The epoch is chosen by
the ELBO on validation data. There are as many epochs as --minutes allow, but --epochs at most, and the learning rate
falls geometrically over them. Rows are added to --out with seed, time and machine as soon as they are known, and rows
that are there are not run again.

The paper trained 3,280 epochs of batch 20.
"""

import csv
import itertools
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from pyro.infer import ELBO, Trace_ELBO
from rows import add_row

import pyrovae as pv
from pyrovae.conditionals import Bernoulli, DiagonalNormal, InverseAutoregressiveFlow, StandardNormal
from pyrovae.models.hierarchical import GuideKind

# negative log p(x), nats, with active units of each layer: Burda et al. (2016), table 1
PAPER = {
    (1, "dynamic", "VAE", 1): (86.76, "19"),
    (1, "dynamic", "VAE", 5): (86.47, "20"),
    (1, "dynamic", "VAE", 50): (86.35, "20"),
    (1, "dynamic", "IWAE", 5): (85.54, "22"),
    (1, "dynamic", "IWAE", 50): (84.78, "25"),
    (1, "static", "VAE", 1): (88.71, None),
    (1, "static", "VAE", 5): (88.83, None),
    (1, "static", "VAE", 50): (89.05, None),
    (1, "static", "IWAE", 5): (87.63, None),
    (1, "static", "IWAE", 50): (87.10, None),
    (2, "dynamic", "VAE", 1): (85.33, "16+5"),
    (2, "dynamic", "VAE", 5): (85.01, "17+5"),
    (2, "dynamic", "VAE", 50): (84.78, "17+5"),
    (2, "dynamic", "IWAE", 5): (83.89, "21+5"),
    (2, "dynamic", "IWAE", 50): (82.90, "26+7"),
    (2, "static", "VAE", 1): (88.08, None),
    (2, "static", "VAE", 5): (87.63, None),
    (2, "static", "VAE", 50): (87.86, None),
    (2, "static", "IWAE", 5): (86.17, None),
    (2, "static", "IWAE", 50): (85.32, None),
}
KEY = ("data", "row", "layers", "guide", "k", "seed")  # of a row that is finished
SETS = {"static": ("binarized-mnist", "none"), "dynamic": ("mnist", "dynamic")}

Row = Literal["VAE", "IWAE", "DReG", "IAF"]


@dataclass(frozen=True)
class Network:
    """How many stochastic layers, and which guide where there are several."""

    layers: int
    guide: GuideKind | Literal[""] = ""


@dataclass(frozen=True)
class Options:
    """The table of Burda et al. (2016)."""

    data: tuple[Literal["static", "dynamic"], ...] = ("static", "dynamic")
    """Binarized once, or anew at each presentation."""
    rows: tuple[Row, ...] = ("VAE", "IWAE")
    """What is trained. IAF has one layer."""
    layers: tuple[Literal[1, 2], ...] = (1,)
    """Stochastic layers."""
    guides: tuple[GuideKind, ...] = ("bottom-up",)
    """Of the network of two layers."""
    k: tuple[int, ...] = (1, 5, 50)
    """Draws for each datum in training."""
    minutes: float = 40.0
    """Of training for each row, at most."""
    epochs: int = 650
    """Passes over the training images, at most."""
    batch_size: int = 100
    """Images in a minibatch."""
    lr: float = 2e-3
    """Learning rate of Adam in the first epoch."""
    lr_final: float = 1e-4
    """In the last epoch."""
    warm_up: int = 0
    """Epochs in which the KL weight of VAE and IAF rises from 0 to 1; a ladder needs some."""
    flow_steps: int = 2
    """Of the inverse autoregressive flow."""
    num_particles: int = 5000
    """K of the test log-likelihood."""
    num_test: int = 10_000
    """How many of the 10,000 test images are measured, evenly spread: they stand in order of their classes."""
    seed: int = 0
    """Of initial weights, minibatches and noise."""
    threads: int | None = None
    """Threads of torch; by default all cores."""
    out: Path | None = None
    """CSV file to which rows are added."""


class Rate:
    """The learning rate of each epoch, which falls geometrically; it notes when it is asked."""

    def __init__(self, options: Options, epochs: int):
        self.lr, self.epochs = options.lr, epochs
        self.decay = (options.lr_final / options.lr) ** (1 / max(1, epochs - 1))
        self.asked: list[float] = []

    def __call__(self, epoch: int) -> float:
        self.asked.append(time.monotonic())
        return self.lr * self.decay ** (epoch - 1)


def program_of(row: Row, network: Network, mean: torch.Tensor, options: Options) -> pv.VAE | pv.HierarchicalVAE:
    torch.manual_seed(options.seed)
    if network.guide:
        program = pv.HierarchicalVAE.mlp(784, guide_kind=network.guide)
        program.likelihood.start_at(mean)
        return program
    posterior = DiagonalNormal.mlp(784, 50)
    if row == "IAF":
        posterior = InverseAutoregressiveFlow.mlp(784, 50, steps=options.flow_steps)
    return pv.VAE(StandardNormal(50), Bernoulli.mlp(50, 784).start_at(mean), posterior)


def bound_of(row: Row, k: int) -> ELBO:
    if row in ("IWAE", "DReG"):
        return pv.IWAE_ELBO(k, "dreg" if row == "DReG" else "plain")
    return Trace_ELBO(num_particles=k, vectorize_particles=k > 1, max_plate_nesting=1)


def kl_weight_of(row: Row, num_data: int, epochs: int, options: Options) -> float | pv.Linear:
    if row in ("IWAE", "DReG") or options.warm_up == 0:
        return 1.0
    steps = math.ceil(num_data / options.batch_size)
    return pv.Linear(min(options.warm_up, epochs) * steps - 1)


def train(
    row: Row, network: Network, k: int, data: pv.data.Splits, epochs: int, options: Options
) -> tuple[pv.VAE | pv.HierarchicalVAE, list[dict[str, float]], Rate]:
    program = program_of(row, network, data.train["x"].mean(0), options)
    rate = Rate(options, epochs)
    history = pv.fit(
        program,
        data.train,
        data.val,
        elbo=bound_of(row, k),
        kl_weight=kl_weight_of(row, len(data.train), epochs, options),
        epochs=epochs,
        batch_size=options.batch_size,
        lr=rate,
        seed=options.seed,
        compile=True,
    )
    return program, history, rate


def epochs_within(row: Row, network: Network, k: int, data: pv.data.Splits, options: Options) -> int:
    """How many epochs the minutes allow, by a run of three."""
    *_, rate = train(row, network, k, data, 3, options)
    return max(1, min(options.epochs, int(60 * options.minutes / (rate.asked[-1] - rate.asked[-2]))))


def measure(data_name: str, row: Row, network: Network, k: int, options: Options) -> dict[str, object]:
    name, binarize = SETS[data_name]
    data = pv.data.load(name, binarize)
    epochs = epochs_within(row, network, k, data, options)
    start = time.monotonic()
    program, history, _ = train(row, network, k, data, epochs, options)
    minutes = (time.monotonic() - start) / 60
    test = data.test.rows(slice(0, None, max(1, len(data.test) // options.num_test)))
    result = pv.evaluate(program, test, options.num_particles, seed=options.seed, compile=True)
    best = max(history, key=lambda each: each["val_elbo"])
    return {
        "data": data_name,
        "row": row,
        "layers": network.layers,
        "guide": network.guide,
        "k": k,
        "seed": options.seed,
        "nll": round(-result.log_px.mean().item(), 3),
        "standard_error": round((result.log_px.std() / len(result.log_px) ** 0.5).item(), 3),
        "active": "+".join(str(result.active_units[site]) for site in sorted(result.active_units)),
        "val_elbo": round(best["val_elbo"], 3),
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "options": repr(options),
    }


def done(path: Path | None) -> set[tuple[str, ...]]:
    if path is None or not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


def networks(options: Options) -> list[Network]:
    """Those that the options ask for."""
    of_two = [Network(2, guide) for guide in options.guides]
    return [network for layers in options.layers for network in ([Network(1)] if layers == 1 else of_two)]


def main(options: Options) -> None:
    """Print each row beside the paper's."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = f"{'data':8} {'row':5} {'layers':12} {'k':>3} {'-log p(x)':>18} {'active':>6} {'epochs':>6} {'minutes':>7}"
    print(f"{names}   paper", flush=True)
    for data_name, network, row, k in itertools.product(options.data, networks(options), options.rows, options.k):
        key = (data_name, row, str(network.layers), network.guide, str(k), str(options.seed))
        if key in done(options.out) or (row == "IAF" and network.layers == 2):
            continue
        found = measure(data_name, row, network, k, options)
        add_row(options.out, found)
        paper, active = PAPER.get((network.layers, data_name, "VAE" if k == 1 else row, k), (None, None))
        layers = f"{network.layers} {network.guide}"
        print(
            f"{data_name:8} {row:5} {layers:12} {k:3} {found['nll']:9.3f} +- {found['standard_error']:.3f} "
            f"{found['active']:>6} {found['epochs']:6} {found['minutes']:7}   "
            f"{paper or ''}{f' ({active})' if active else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
