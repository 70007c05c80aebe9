"""Test error on MNIST by the number of labels: M2, M1+M2, and the classifier alone (Kingma et al. 2014, table 1).

    PYROVAE_DATA=... python benchmarks/semi_supervised.py --methods m1+m2 --labels 100 --seeds 0 1 2
    PYROVAE_DATA=... python benchmarks/semi_supervised.py --methods classifier --labels 100 600 1000 3000

Of 50,000 training images so many keep their label, equally many of each class, chosen by the seed, which also gives
the initial weights; all others are used without. The epoch is chosen by the error on --val-labels labelled validation
images, which are labels used for choosing and are counted as such; test images are looked at once, at the end. Images
are binarized, those for training anew each time. Each line is printed, and added to --out, as soon as it is known.

Beside it, the paper's, per cent:

    labels       100     600    1000    3000
    M2         11.97    4.94    3.60    3.92
    M1+M2       3.33    2.59    2.40    2.18
    Pyro's tutorial (enumerated, auxiliary loss): 6.81, 5.63, 5.13, 4.18; its classifier 22.9, 12.8, 11.4, 8.9
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rows import add_row
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import pyrovae as pv
from pyrovae.conditionals import FullNormal, OneHotCategorical
from pyrovae.data import Data

Method = Literal["m2", "m1+m2", "classifier"]
X, CLASSES = 784, 10


@dataclass(frozen=True)
class Options:
    """Test error of semi-supervised MNIST."""

    methods: tuple[Method, ...] = ("m1+m2", "m2", "classifier")
    """What to train."""
    labels: tuple[int, ...] = (100,)
    """Numbers of labelled images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of labelled images, weights and noise."""
    epochs: int = 100
    """Passes over the unlabelled images."""
    batch_size: int = 200
    """Unlabelled images in a minibatch."""
    hidden: int = 500
    """Units of the hidden layer of M2 on images, and of the classifier."""
    z_dim: int = 50
    """Latents of M2 on images."""
    lr: float = 1e-3
    """Learning rate of Adam, falling to a tenth, of M2 on images and of the classifier."""
    m1_epochs: int = 300
    """Passes in training M1, 784-200-200-50, whose latents M1+M2 is trained on."""
    m1m2_epochs: int = 60
    """Passes over the latents."""
    m1m2_hidden: int = 100
    """Units of the hidden layer of M2 on latents."""
    m1m2_z_dim: int = 5
    """Latents of M2 on latents."""
    m1m2_lr: float = 3e-3
    """Learning rate of Adam, falling to a tenth, of M2 on latents."""
    weight: float = 1.0
    """Of the classification term, as a multiple of the number of training images."""
    val_labels: int = 1000
    """Labelled validation images, by which the epoch is chosen."""
    threads: int | None = None
    """Threads of torch."""
    compile: bool = True
    """Compile training."""
    out: Path | None = None
    """CSV file to which each result is added."""


def rate(first: float, epochs: int, last: float = 0.1):
    """Falls geometrically, to `last` times the first."""
    return lambda epoch: first * last ** ((epoch - 1) / max(1, epochs - 1))


def error(predicted: Tensor, y: Tensor) -> float:
    return (predicted.argmax(1) != y).double().mean().item()


def train(
    program: pv.LatentModel,
    unlabeled: Data,
    val: Any,
    labeled: Data,
    seed: int,
    epochs: int,
    lr: float,
    options: Options,
) -> float:
    """Train on both, and give the validation error."""
    history = pv.fit(
        program,
        unlabeled,
        val,
        labeled=labeled,
        supervised_weight=options.weight * (len(labeled) + len(unlabeled)),
        epochs=epochs,
        batch_size=options.batch_size,
        labeled_batch_size=100,
        lr=rate(lr, epochs),
        seed=seed,
        compile=options.compile,
    )
    return min(row["val_error"] for row in history)


def by_m2(splits: pv.data.Splits, labeled: Data, unlabeled: Data, val: Data, seed: int, options: Options):
    torch.manual_seed(seed)
    program = pv.SemiSupervisedVAE.mlp(X, CLASSES, options.z_dim, (options.hidden,))
    program.likelihood.start_at(splits.train["x"].mean(0))
    found = train(program, unlabeled, val, labeled, seed, options.epochs, options.lr, options)
    return found, error(program.predict(splits.test.select("x")), splits.test["y"])


@cache
def m1_of(seed: int, options: Options) -> pv.VAE:
    """M1, trained on all training images, without labels."""
    splits = pv.data.load("mnist", "dynamic")
    torch.manual_seed(seed)
    m1 = pv.VAE.mlp(X, 50, (200, 200))
    m1.likelihood.start_at(splits.train["x"].mean(0))
    pv.fit(
        m1,
        splits.train,
        splits.val.rows(slice(options.val_labels)),
        epochs=options.m1_epochs,
        batch_size=100,
        lr=rate(2e-3, options.m1_epochs, last=0.05),
        seed=seed,
        compile=options.compile,
    )
    return m1


def posterior_of(m1: pv.VAE, data: Data) -> tuple[Tensor, Tensor]:
    """Mean and scale of M1's posterior at the grey images."""
    with torch.no_grad():
        parts = [m1.posterior(x) for x in data["x"].split(1000)]
    return torch.cat([q.mean for q in parts]), torch.cat([q.stddev for q in parts])


def drawn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """M1's latents, drawn from its posterior each time that they are shown."""
    batch = {**batch, "x": batch["x"] + batch["scale"] * torch.randn_like(batch["x"])}
    del batch["scale"]
    return batch


def by_m1_m2(splits: pv.data.Splits, labeled: Data, unlabeled: Data, val: Data, seed: int, options: Options):
    m1 = m1_of(seed, options)
    active = posterior_of(m1, splits.train)[0].var(0) > 0.01

    def features(data: Data) -> dict[str, Tensor]:
        mean, scale = posterior_of(m1, data)
        return {**data.tensors, "x": mean[:, active], "scale": scale[:, active]}

    def at_mean(data: Data) -> dict[str, Tensor]:
        return {key: value for key, value in features(data).items() if key != "scale"}

    torch.manual_seed(seed)
    m2 = pv.SemiSupervisedVAE.mlp(
        int(active.sum()), CLASSES, options.m1m2_z_dim, (options.m1m2_hidden,), likelihood=FullNormal
    )
    labeled, unlabeled = (Data(features(data), show=drawn) for data in (labeled, unlabeled))
    found = train(m2, unlabeled, Data(at_mean(val)), labeled, seed, options.m1m2_epochs, options.m1m2_lr, options)
    return found, error(m2.predict(at_mean(splits.test)["x"]), splits.test["y"])


def by_classifier(splits: pv.data.Splits, labeled: Data, unlabeled: Data, val: Data, seed: int, options: Options):
    """The network q(y | x) of M2, trained on the labelled images alone."""
    torch.manual_seed(seed)
    classifier = OneHotCategorical.mlp(X, CLASSES, (options.hidden,), "softplus")
    adam = torch.optim.Adam(classifier.parameters(), lr=options.lr, fused=True)
    batches = labeled.endless(100, torch.Generator().manual_seed(seed))
    best, at_best = math.inf, math.inf
    for _ in tqdm(range(options.epochs), desc="classifier"):
        for _ in range(50):
            batch = next(batches)
            adam.zero_grad()
            cross_entropy(classifier.eta(batch["x"]), batch["y"]).backward()
            adam.step()
        with torch.no_grad():
            found = error(classifier.eta(val["x"]), val["y"])
            if found < best:
                best, at_best = found, error(classifier.eta(splits.test["x"]), splits.test["y"])
    return best, at_best


METHODS = {"m2": by_m2, "m1+m2": by_m1_m2, "classifier": by_classifier}


def main(options: Options) -> None:
    """Print a line for each run, and the mean over the seeds."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    splits = pv.data.load("mnist", "dynamic", labels=True)
    val = splits.val.rows(slice(options.val_labels))
    for method in options.methods:
        for num_labels in options.labels:
            errors = []
            for seed in options.seeds:
                labeled, unlabeled = pv.data.split_labels(splits.train, num_labels // CLASSES, seed)
                start = time.perf_counter()
                on_val, on_test = METHODS[method](splits, labeled, unlabeled, val, seed, options)
                errors.append(100 * on_test)
                row = {
                    "method": method,
                    "labels": num_labels,
                    "seed": seed,
                    "val_labels": options.val_labels,
                    "val_error": round(100 * on_val, 3),
                    "test_error": round(100 * on_test, 3),
                    "minutes": round((time.perf_counter() - start) / 60, 1),
                }
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                add_row(options.out, {**row, "options": repr(options), "torch": torch.__version__})
            spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
            print(f"{method}, {num_labels} labels: {statistics.fmean(errors):.2f} ± {spread:.2f} %", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
