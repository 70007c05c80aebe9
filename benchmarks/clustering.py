"""Clusters of MNIST, found without a label: accuracy, NMI and ARI on test images (Jiang et al. 2017, table 2).

    PYROVAE_DATA=... python benchmarks/clustering.py --seeds 0 1 2 3 4 --out clusters.csv

A VAE is trained; ten clusters are placed by k-means and EM, with splits and merges, on draws from its posterior; and a
GaussianMixtureVAE goes on from there, end to end. Labels are used neither in training nor in choosing anything: there
is no model selection, and the test images' classes are looked at once the clusters are there, in the line `start`, and
at the end. Images are binarized, those for training anew each time; clusters are placed on, and found in, grey images.
Each line is printed, and added to --out, as soon as it is known.

Images are deskewed first. As they are (--no-deskew), the likeliest mixture parts the ones by their slant, and two other
digits share a cluster.

Beside it, the paper's accuracy, per cent, of images as they are: VaDE 94.46, an autoencoder with a mixture 82.18.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rows import add_row
from torch.nn.functional import affine_grid, grid_sample

import pyrovae as pv
from pyrovae.clustering import Clustering, agreement
from pyrovae.data import Data

SIDE, CLASSES = 28, 10


@dataclass(frozen=True)
class Options:
    """Clusters of MNIST."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of weights, noise and k-means."""
    deskew: bool = True
    """Make the digits upright, and put them into the middle."""
    z_dim: int = 10
    """Latents."""
    hidden: tuple[int, ...] = (500, 500)
    """Units of the encoder's hidden layers; the decoder has them in reverse."""
    activation: Literal["tanh", "relu", "elu", "softplus", "silu"] = "relu"
    """After every hidden layer."""
    covariance: Literal["diagonal", "full"] = "full"
    """Of the clusters."""
    kl_weight: float = 0.05
    """Of the VAE's KL term, before there are clusters."""
    vae_epochs: int = 15
    """Passes in training the VAE."""
    vae_lr: float = 2e-3
    """Learning rate of Adam, falling to a tenth, of the VAE."""
    restarts: int = 3
    """Of k-means and EM, of which the likeliest is kept."""
    epochs: int = 15
    """Passes in training the mixture VAE."""
    lr: float = 1e-3
    """Learning rate of Adam, falling to a tenth, of the mixture VAE."""
    batch_size: int = 200
    """Images in a minibatch."""
    threads: int | None = None
    """Threads of torch."""
    compile: bool = True
    """Compile training."""
    out: Path | None = None
    """CSV file to which each result is added."""


def rate(first: float, epochs: int):
    """Falls geometrically, to a tenth of the first."""
    return lambda epoch: first * 0.1 ** ((epoch - 1) / max(1, epochs - 1))


def deskewed(data: Data) -> Data:
    """Images sheared until x and y are uncorrelated in them, with their centre of mass in the middle."""
    x = data["x"].reshape(-1, 1, SIDE, SIDE)
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    mass = x / x.sum((-2, -1), keepdim=True)
    column, row = (mass.sum(dim).squeeze(1) @ place for dim in (-2, -1))
    right, down = place - column.reshape(-1, 1, 1, 1), place.unsqueeze(1) - row.reshape(-1, 1, 1, 1)
    slant = (mass * right * down).sum((1, 2, 3)) / (mass * down**2).sum((1, 2, 3))
    one, half = torch.ones(len(x)), SIDE / 2
    maps = torch.stack([one, slant, column / half, 0 * one, one, row / half], 1).reshape(-1, 2, 3)
    x = grid_sample(x, affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)
    return Data({**data.tensors, "x": x.flatten(1).clamp(0, 1)}, dynamic=True)


def report(seed: int, stage: str, program: pv.LatentModel, test: Data, begun: float, options: Options):
    """Print and keep one line."""
    found = agreement(program.predict(test["x"]).argmax(1), test["y"])
    row = {"seed": seed, "stage": stage} | {key: round(value, 4) for key, value in asdict(found).items()}
    row["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row(options.out, {**row, "options": repr(options), "torch": torch.__version__})
    return found


def cluster(train: Data, test: Data, seed: int, options: Options) -> Clustering:
    """Train without labels, and score the clusters of the test images."""
    begun, train = time.perf_counter(), train.select("x")
    settings = {"batch_size": options.batch_size, "seed": seed, "compile": options.compile}
    torch.manual_seed(seed)
    vae = pv.VAE.mlp(SIDE**2, options.z_dim, options.hidden, activation=options.activation)
    vae.likelihood.start_at(train["x"].mean(0))
    pv.fit(
        vae,
        train,
        epochs=options.vae_epochs,
        lr=rate(options.vae_lr, options.vae_epochs),
        kl_weight=options.kl_weight,
        **settings,
    )
    program = pv.GaussianMixtureVAE(vae.likelihood, vae.posterior, options.z_dim, CLASSES, options.covariance)
    program.start_from(train["x"], seed, options.restarts)
    report(seed, "start", program, test, begun, options)
    pv.fit(program, train, epochs=options.epochs, lr=rate(options.lr, options.epochs), **settings)
    return report(seed, "end", program, test, begun, options)


def main(options: Options) -> None:
    """Print two lines for each seed, and the means."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    splits = pv.data.load("mnist", "dynamic", labels=True)
    train, test = (deskewed(data) if options.deskew else data for data in (splits.train, splits.test))
    found = [cluster(train, test, seed, options) for seed in options.seeds]
    for name in ("accuracy", "nmi", "ari"):
        values = [100 * getattr(one, name) for one in found]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        print(f"{name}: {statistics.fmean(values):.2f} ± {error:.2f} %", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
