"""Time to a test log-likelihood: binarized MNIST, 784-200-200-50 tanh, one stochastic layer.

    PYROVAE_DATA=... python benchmarks/mnist.py                      # about half an hour on two cores
    PYROVAE_DATA=... python benchmarks/mnist.py --epochs 100         # a first impression

Beside it: Burda, Grosse and Salakhutdinov (2016), table 1, a VAE with one layer on the same fixed binarization:
-88.71 nats after 3,280 epochs of batch 20, 5000 importance samples. Epochs are chosen by the ELBO on the validation
data alone; the test data are looked at once, at the end.
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import pyrovae as pv


@dataclass(frozen=True)
class Options:
    """Train on binarized MNIST, then measure log p(x) of the test images."""

    epochs: int = 650
    """Passes over the 50,000 training images."""
    batch_size: int = 100
    """Images in a minibatch."""
    lr: float = 2e-3
    """Learning rate of Adam in the first epoch."""
    lr_final: float = 1e-4
    """In the last epoch, and geometrically between."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: networks in bfloat16, in training and in evaluation."""
    compile: bool = True
    """Compile training and evaluation."""
    num_particles: int = 5000
    """K of the importance-sampled log-likelihood."""
    num_test: int = 10_000
    """How many of the 10,000 test images are measured."""
    threads: int | None = None
    """Threads of torch; by default all cores."""
    seed: int = 0
    """Of initial weights, minibatches and noise."""
    out: Path | None = None
    """Run folder, with which an interrupted run goes on; by default nothing is written."""


def main(options: Options) -> None:
    """Print what was reached, and in what time and memory."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = pv.data.load("binarized-mnist")
    torch.manual_seed(options.seed)
    program = pv.VAE.mlp(784, 50, (200, 200))
    program.likelihood.start_at(data.train["x"].mean(0))
    decay = (options.lr_final / options.lr) ** (1 / max(1, options.epochs - 1))
    history = pv.fit(
        program,
        data.train,
        data.val,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=lambda epoch: options.lr * decay ** (epoch - 1),
        seed=options.seed,
        run_dir=options.out,
        resume=options.out is not None and (options.out / "checkpoint.pt").exists(),
        precision=options.precision,
        compile=options.compile,
    )
    trained = sum(row["seconds"] for row in history)
    steps = len(history) * -(-len(data.train) // options.batch_size)
    best = max(history, key=lambda row: row["val_elbo"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options}")
    print(f"training: {trained:.0f} s, {trained / steps * 1e3:.2f} ms per step, data path included")
    print(f"best epoch {best['epoch']} of {len(history)}, validation ELBO {best['val_elbo']:.3f}")
    start = time.perf_counter()
    result = pv.evaluate(
        program,
        data.test.rows(slice(options.num_test)),
        options.num_particles,
        seed=options.seed,
        precision=options.precision,
        compile=options.compile,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{result}\nevaluation: {seconds:.0f} s; peak resident memory of the whole process {peak:.2f} GiB")


if __name__ == "__main__":
    main(tyro.cli(Options))
