"""The time of importance sampling, for each image with K particles, many ways, interleaved.

    python benchmarks/evaluate.py                          # 784-200-200-50, K = 5000: minutes on two cores
    python benchmarks/evaluate.py --images 4 --rounds 3

All sides give log (1/K) sum_k w_k of the same images under the same weights. The bare matrix products of the decoder
are the floor that no evaluation gets below. `vectorized_importance_weights` of Pyro adds the weights of all data of
a batch up, so it gets one image at a time; it and the hand-written side give nothing but that number, pyrovae also
standard error, effective sample size, k-hat and active units. What is compiled was compiled before the clock runs.
Peak memory is that of a process of its own for each side, less that of one which only imports and builds the program.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyro
import torch
import tyro
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import pyrovae as pv
from pyrovae.conditionals.conditional import networks_in
from pyrovae.draws import Plan
from pyrovae.weights import WeightSums


@dataclass(frozen=True)
class Options:
    """Importance-sampled log p(x) of one image: time and peak memory, many ways."""

    hidden: int = 200
    """Units of both hidden layers of a 784-H-H-D-H-H-784 VAE."""
    z_dim: int = 50
    """Number of latents D."""
    num_particles: int = 5000
    """K."""
    images: int = 8
    """Images in each side's turn."""
    rounds: int = 9
    """Turns of each side."""
    threads: int | None = None
    """Threads of torch; by default all cores."""
    seed: int = 0
    """Of weights and images."""
    memory: bool = True
    """Also measure peak memory."""


def setting(options: Options) -> tuple[pv.VAE, Tensor]:
    """The program and the images."""
    torch.manual_seed(options.seed)
    program = pv.VAE.mlp(784, options.z_dim, (options.hidden, options.hidden))
    return program, (torch.rand(options.images, 784) < 0.3).float()


def by_pyro(program: pv.VAE, x: Tensor, k: int, validation: bool) -> Callable[[], Tensor]:
    """Pyro's own function, one image at a time."""

    @pyro.validation_enabled(validation)
    def run() -> Tensor:
        found = []
        for image in x.split(1):
            log_w, *_ = vectorized_importance_weights(
                program.model, program.guide, image, num_samples=k, max_plate_nesting=1, normalized=False
            )
            found.append(log_w.logsumexp(0) - math.log(k))
        return torch.stack(found)

    return run


def by_hand(program: pv.VAE, x: Tensor, k: int, rows: int = 1250) -> Callable[[], Tensor]:
    """What one writes without a library: networks and densities in plain torch, particles in chunks."""
    encoder, decoder = program.posterior.net, program.likelihood.net

    def log_weights(image: Tensor, mu: Tensor, log_sigma: Tensor, n: int) -> Tensor:
        eps = torch.randn(n, mu.shape[-1])
        z = mu + log_sigma.exp() * eps
        log_px_z = -binary_cross_entropy_with_logits(decoder(z), image.expand(n, -1), reduction="none").sum(-1)
        return log_px_z - (z**2 - eps**2).sum(-1) / 2 + log_sigma.sum()

    def run() -> Tensor:
        found = []
        for image in x.split(1):
            mu, log_sigma = encoder(image).chunk(2, -1)
            chunks = [log_weights(image, mu, log_sigma, min(rows, k - i)) for i in range(0, k, rows)]
            found.append(torch.cat(chunks).logsumexp(0) - math.log(k))
        return torch.stack(found)

    return run


def ours(program: pv.VAE, x: Tensor, k: int, compile: bool, precision: str = "32-true") -> Callable[[], Tensor]:
    """The inside of `pyrovae.evaluate`, kept from turn to turn so that it compiles once."""
    stack = ExitStack()
    stack.enter_context(networks_in(precision))
    plan = Plan.of(program, x, k, compile=compile)

    def run() -> Tensor:
        found = []
        with networks_in(precision):
            for i in range(0, len(x), plan.batch_size):
                sums = WeightSums(k)
                for weights in plan.weights(i, {"x": x[i : i + plan.batch_size]}):
                    sums.add(weights.log_weights)
                for value in (sums.elbo, sums.standard_error, sums.ess, sums.k_hat):
                    value()
                found.append(sums.log_mean())
        return torch.cat(found)

    stack.close()
    return run


def products(program: pv.VAE, x: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """The decoder's matrix products alone, in chunks as large as ours."""
    layers = [m for m in program.likelihood.modules() if isinstance(m, torch.nn.Linear)]
    weights = [layer.weight.detach().T.to(dtype) for layer in layers]
    rows = 1250
    inputs = [torch.rand(rows, len(weight)).to(dtype) for weight in weights]
    outputs = [torch.empty(rows, weight.shape[1], dtype=dtype) for weight in weights]

    def run() -> Tensor:
        for _ in range(len(x) * k // rows):
            for value, weight, out in zip(inputs, weights, outputs, strict=True):
                torch.mm(value, weight, out=out)
        return torch.full((len(x),), torch.nan)

    return run


SIDES: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "Pyro, vectorized_importance_weights": partial(by_pyro, validation=True),
    "Pyro, the same, validation off": partial(by_pyro, validation=False),
    "by hand, eager": by_hand,
    "pyrovae, eager": partial(ours, compile=False),
    "pyrovae, compiled": partial(ours, compile=True),
    "pyrovae, compiled, bf16-mixed": partial(ours, compile=True, precision="bf16-mixed"),
    "floor: matrix products, float32": products,
    "floor: matrix products, bfloat16": partial(products, dtype=torch.bfloat16),
}
OURS = "pyrovae, compiled"


@contextmanager
def evaluating(program: pv.VAE) -> Iterator[None]:
    """As `pyrovae.evaluate` runs a program."""
    with program.inference(), pyro.validation_enabled(False):
        yield


def peak(options: Options, name: str | None) -> float:
    """Peak resident memory, MiB, of a process that runs one side alone, or none."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    program, x = setting(options)
    if name is not None:
        with evaluating(program):
            run = SIDES[name](program, x, options.num_particles)
            for _ in range(2):
                run()
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had before it started this
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def peaks(options: Options) -> dict[str | None, float]:
    """`peak` of every side, and of none, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak, (options, name)) for name in tqdm([None, *SIDES], desc="memory")}


def main(options: Options) -> None:
    """Print the table."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    program, x = setting(options)
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    values: dict[str, float] = {}
    with evaluating(program):
        runs = {}
        for name, make in tqdm(SIDES.items(), desc="warming up"):
            runs[name] = make(program, x, options.num_particles)
            for _ in range(2):
                runs[name]()
        order = list(SIDES)
        for turn in tqdm(range(options.rounds), desc="rounds"):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.perf_counter()
                values[name] = runs[name]().mean().item()
                times[name].append((time.perf_counter() - start) / options.images * 1e3)
    memory = peaks(options) if options.memory else dict.fromkeys([None, *SIDES], math.nan)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; {options}")
    print(f"{'':36}{'ms per image':>13}{'min':>8}{'to ours':>9}{'to floor':>10}{'log p(x)':>11}{'MiB':>7}")
    for name, found in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(found, times[rival], strict=True))
            for rival in (OURS, "floor: matrix products, float32")
        ]
        print(
            f"{name:36}{statistics.median(found):13.2f}{min(found):8.2f}{ratios[0]:9.2f}{ratios[1]:10.2f}"
            f"{values[name]:11.3f}{memory[name] - memory[None]:7.0f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
