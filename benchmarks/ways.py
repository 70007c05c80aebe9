"""One small VAE of 8 x 8 digits, learned in several ways: log p(x) of test images, the guide's gap, and time.

    python benchmarks/ways.py --out ways.csv

All ways have the same decoder with the same initial weights, the same number of passes and of steps in theta, and the
same learning rates; images are binarized once, so that a datum is the same each time that it is shown. Nothing is
chosen by test images.

log p(x) of all ways is measured alike, so that it tells of theta alone: a diagonal Gaussian is fitted to each image
with theta fixed (`fit_guide`, 1000 steps), and serves as proposal for --num-particles draws. Beside it, where a way has
an encoder, log p(x) by the encoder's own draws and its gap log p(x) - ELBO; for the others the gap is that of the
fitted Gaussians. Seconds are the processor's in training, on one thread and uncompiled.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
import tyro
from rows import add_row

import pyrovae as pv

PIXELS = 64


@dataclass(frozen=True)
class Options:
    """Digits, one model, several ways to learn."""

    ways: tuple[str, ...] = ()
    """Some of the ways, by their names in the table; none for all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and noise."""
    epochs: int = 200
    """Passes over the 1,437 training images."""
    batch_size: int = 100
    """Images in a minibatch."""
    lr: float = 3e-3
    """Learning rate of Adam; in the second half of training it falls geometrically to a tenth."""
    hidden: int = 50
    """Units of the hidden layer, of decoder and encoder."""
    z_dim: int = 5
    """Latents."""
    scale: float = 1.0
    """Standard deviation of the prior on the decoder's parameters, for MAP."""
    num_particles: int = 5000
    """K of log p(x)."""
    threads: int = 1
    """Threads of torch."""
    out: Path | None = None
    """CSV file to which each result is added."""


def by_fit(elbo: Callable[[], Any]) -> Callable[..., Any]:
    return lambda program, x, settings, options: pv.fit(program, x, elbo=elbo(), **settings)


def by_map(program: pv.VAE, x: torch.Tensor, settings: dict[str, Any], options: Options) -> Any:
    return pv.fit_map(program, x, prior=dist.Normal(0.0, options.scale), **settings)


def by_variational_em(program: pv.VAE, x: torch.Tensor, settings: dict[str, Any], options: Options) -> Any:
    rate = settings["lr"]
    return pv.variational_em(pv.LocalGuide.of(program, x), x, local_lr=lambda epoch: 10 * rate(epoch), **settings)


def by_mcmc_em(program: pv.VAE, x: torch.Tensor, settings: dict[str, Any], options: Options) -> Any:
    return pv.mcmc_em(program, x, draws=3, warmup=50, **settings)


WAYS = {
    "SVI": by_fit(lambda: None),
    "IWAE, K = 10": by_fit(lambda: pv.IWAE_ELBO(10)),
    "wake-sleep": by_fit(lambda: pv.WakeSleep_ELBO()),
    "reweighted wake-sleep, K = 10": by_fit(lambda: pv.WakeSleep_ELBO(10, "wake")),
    "SVI, MAP": by_map,
    "variational EM": by_variational_em,
    "MCMC-EM": by_mcmc_em,
}
AMORTIZED = [name for name in WAYS if "EM" not in name]


def measured(program: Any, data: Any, options: Options) -> dict[str, float]:
    found = pv.evaluate(program, data, options.num_particles, seed=0, progress=False).summary()
    return {"log_px": found["log_px"], "gap": found["log_px"] - found["elbo"], "k_hat": found["k_hat_above_0.7"]}


def learn(name: str, seed: int, options: Options) -> dict[str, Any]:
    """Train in one way, and measure theta and guide."""
    digits = pv.data.load("digits", "static")
    train, test = digits.train["x"], digits.test["x"]
    torch.manual_seed(seed)
    program = pv.VAE.mlp(PIXELS, options.z_dim, (options.hidden,))
    last = options.epochs / 2
    settings = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": lambda epoch: options.lr * 0.1 ** max(0.0, epoch / last - 1),
        "seed": seed,
    }
    begun = time.process_time()
    WAYS[name](program, train, settings, options)
    row: dict[str, Any] = {"way": name, "seed": seed, "seconds": time.process_time() - begun}
    for part, x in (("train", train), ("test", test)):
        local = pv.fit_guide(program, x, steps=1000, seed=0, progress=False)
        alike = measured(local, pv.indexed(x), options)
        own = measured(program, x, options) if name in AMORTIZED else {"log_px": float("nan"), "gap": alike["gap"]}
        row |= {part: alike["log_px"], f"{part}_k_hat": alike["k_hat"]}
        row |= {f"{part}_own": own["log_px"], f"{part}_gap": own["gap"]}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(options: Options) -> None:
    """Print a line for each way and seed, and the means over the seeds."""
    torch.set_num_threads(options.threads)
    columns = ["train", "test", "test_own", "test_gap", "test_k_hat", "seconds"]
    means = {}
    for name in options.ways or WAYS:
        rows = []
        for seed in options.seeds:
            rows.append(learn(name, seed, options))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            add_row(options.out, {**rows[-1], "options": repr(options), "torch": torch.__version__})
        means[name] = {key: [row[key] for row in rows] for key in columns}
    print(f"\n{'':32}" + "".join(f"{key:>12}" for key in columns))
    for name, found in means.items():
        known = {key: "nan" not in map(str, found[key]) for key in columns}  # a way without an encoder has no test_own
        for title, figure in ((name, statistics.fmean), ("  (spread of seeds)", statistics.stdev)):
            if figure is statistics.fmean or len(options.seeds) > 1:
                cells = [f"{figure(found[key]):.2f}" if known[key] else "-" for key in columns]
                print(f"{title:32}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main(tyro.cli(Options))
