"""The time of one training step of the same program on the CPU, many ways, interleaved.

    python benchmarks/step.py                                    # all of it: ten minutes on two idle cores
    python benchmarks/step.py --programs mlp --sizes 200,100 --rounds 3 --steps 5

Three programs, each on one batch of random binary images, over and over, so that no data are loaded:

    mlp         VAE 784-H-H-50, tanh, Bernoulli likelihood                            --sizes H,batch
    conv        VAE of pyrovae's ConvEncoder and ConvDecoder, 1 x 28 x 28, 50 latents            batch 64
    enumerated  p(y) p(z) p(x | y, z), q(y | x) q(z | x, y), 784-200-200-50, ten classes y,
                none known, all ten summed over in each step                                     batch 100

Every side begins with the same weights, in float32, and in a step estimates the ELBO with one draw of z, differentiates
it, updates all weights by Adam (rate 1e-3) and returns the loss as a Python float; exceptions: "NumPyro, in a loop"
returns the losses once in a round, for its steps are one compiled loop, and the floor has none. By Pyro and NumPyro the
KL divergence is log q(z) - log p(z) at the draw; by hand it is the closed form, which is less work and less noise: by
hand the loss falls a little earlier, that of conv 200 steps earlier, as it does by Pyro's TraceMeanField_ELBO. By
hand, too, ten classes are ten times the work: the first layer is not split into one part for x and one for y.

"Matrix products alone" is a floor and no rival: every product of activations, weights and gradients in the forward
and backward passes, into memory that is there, and nothing else.

In each round every side makes --steps steps, in an order drawn anew, and the mean time of its steps is noted.
The table has the median and the minimum over the rounds, the median over the rounds of the time in units of ours in
that same round, and the loss in nats per datum over the last round, by which one sees that all train. "To compile" is
the time from construction to the end of the first compiled step, with an empty cache (--no-compile-time: with torch's
own cache, and the column left out). The first call of ours runs uncompiled, its second compiles; JitTrace_ELBO traces
in its first, and TorchScript optimises the trace up to the third.

JAX gets as many threads as torch by the environment variable NPROC, the size of its thread pool, set before JAX is
imported (jaxlib 0.10 then has as many threads tf_XLAEigen; its XLA_FLAGS have no number of threads any more).

On cores that others use too, figures mean little: torch's threads wait for each other, and its steps take several times
as long, JAX's not. The load is printed; --threads 1 suffers least.
"""

import math
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro.infer import ELBO, SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax
from tqdm import tqdm

import pyrovae as pv
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal

X, Z, CLASSES, LR, WARM_UP = 784, 50, 10, 1e-3, 20
ABSENT = "absent"
OURS = "ours: pyrovae, compiled ELBO, fused Adam"

Run = Callable[[int], list[float]]  # makes n steps and returns their losses, in nats
Build = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """Time of one training step of the same program, many ways, interleaved, on the CPU."""

    programs: tuple[Literal["mlp", "conv", "enumerated"], ...] = ("mlp", "conv", "enumerated")
    """Which programs."""
    sizes: tuple[str, ...] = ("200,20", "200,100", "400,256")
    """Hidden units and batch of mlp, each as H,batch."""
    threads: int | None = None
    """Of torch and of JAX; by default as many as torch takes by itself."""
    rounds: int = 15
    """In each of them, every side has its turn."""
    steps: int = 20
    """Steps of a turn."""
    seed: int = 0
    """Of the images, initial weights, noise and the order of the sides."""
    compile_time: bool = True
    """Compile with an empty cache, and tell how long it takes."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        build: gives the function that makes the steps.
        compiled: how many steps there are up to the first compiled one, itself included; 0 for a way that never is.
        validation: Pyro's checks of values and shapes.
    """

    build: Callable[[], Run]
    compiled: int = 0
    validation: bool = False


@dataclass(frozen=True)
class Case:
    """A program of one size, and the ways to train it."""

    program: str
    size: str
    batch: int
    ways: dict[str, Way]


class Side:
    """A way under way: with a parameter store of its own, and Pyro's validation as it is to be while it runs."""

    def __init__(self, way: Way, seed: int, steps: int):
        self.way, self.steps = way, steps
        self.store: Any = {"params": {}, "constraints": {}}
        self.ms: list[float] = []
        self.losses: list[float] = []
        torch.manual_seed(seed)
        with self.alone():
            start = time.perf_counter()
            self.run = way.build()
            if way.compiled:
                self.run(way.compiled)
            self.seconds_to_compile = time.perf_counter() - start if way.compiled else None
            for _ in range(0, WARM_UP, steps):
                self.run(steps)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with pyro.validation_enabled(self.way.validation), pyro.get_param_store().scope(self.store):
            yield

    def turn(self) -> None:
        time.sleep(0.02)  # the threads of the side before, which wait for more work a while, go to sleep
        with self.alone():
            start = time.perf_counter()
            self.losses = self.run(self.steps)
            self.ms.append((time.perf_counter() - start) / self.steps * 1e3)


class PlainVAE(nn.Module):
    """A VAE in bare Pyro, and its loss by hand."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), x.new_ones(Z)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mu, log_sigma = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mu, log_sigma.exp()).to_event(1))

    def by_hand(self, x: Tensor) -> Tensor:
        mu, log_sigma = self.encoder(x).chunk(2, -1)
        sigma = log_sigma.exp()
        logits = self.decoder(mu + sigma * torch.randn_like(mu))
        kl = (0.5 * (mu**2 + sigma**2 - 1) - log_sigma).sum()
        return kl + binary_cross_entropy_with_logits(logits, x, reduction="sum")


class LabelVAE(nn.Module):
    """p(y) p(z) p(x | y, z),  q(y | x) q(z | x, y), in bare Pyro with y summed over; and its loss by hand."""

    def __init__(self, hidden: int):
        super().__init__()
        self.classifier = pv.MLP(X, CLASSES, (hidden, hidden)).layers
        self.encoder = pv.MLP(X + CLASSES, 2 * Z, (hidden, hidden)).layers
        self.decoder = pv.MLP(CLASSES + Z, X, (hidden, hidden)).layers
        self.register_buffer("one_hot", torch.eye(CLASSES).unsqueeze(1))  # every y, (10, 1, 10)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(CLASSES)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), x.new_ones(Z)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(y, z))).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q_y = dist.OneHotCategorical(logits=self.classifier(x))
            y = pyro.sample("y", q_y, infer={"enumerate": "parallel"})
            mu, log_sigma = self.encoder(joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(mu, log_sigma.exp()).to_event(1))

    def by_hand(self, x: Tensor) -> Tensor:
        log_q_y = log_softmax(self.classifier(x), -1).T  # (10, N)
        mu, log_sigma = self.encoder(joined(x, self.one_hot)).chunk(2, -1)  # (10, N, Z)
        sigma = log_sigma.exp()
        logits = self.decoder(joined(self.one_hot, mu + sigma * torch.randn_like(mu)))
        log_px = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        kl = (0.5 * (mu**2 + sigma**2 - 1) - log_sigma).sum(-1)
        return (log_q_y.exp() * (log_q_y + math.log(CLASSES) + kl - log_px)).sum()


def joined(*parents: Tensor) -> Tensor:
    """Broadcast against each other, and concatenated."""
    shape = torch.broadcast_shapes(*(parent.shape[:-1] for parent in parents))
    return torch.cat([parent.expand(*shape, -1) for parent in parents], -1)


def each(step: Callable[[], float]) -> Run:
    return lambda n: [step() for _ in range(n)]


def by_svi(program: Any, x: Tensor, elbo: ELBO) -> Run:
    """As in Pyro's own examples: the model declares its networks, and SVI does the step."""

    def model(x: Tensor) -> None:
        pyro.module("program", program)
        program.model(x)

    svi = SVI(model, program.guide, pyro.optim.Adam({"lr": LR}), loss=elbo)
    return each(lambda: svi.step(x))


def by_adam(program: nn.Module, backward: Callable[[], float]) -> Run:
    adam = torch.optim.Adam(program.parameters(), lr=LR, fused=True)

    def step() -> float:
        adam.zero_grad()
        loss = backward()
        adam.step()
        return loss

    return each(step)


def by_autograd(program: nn.Module, x: Tensor, loss: Callable[[Any], Callable[[Tensor], Tensor]]) -> Run:
    loss_of = loss(program)

    def backward() -> float:
        value = loss_of(x)
        value.backward()
        return value.item()

    return by_adam(program, backward)


def by_us(program: Any, x: Tensor, elbo: ELBO) -> Run:
    return by_adam(program, lambda: elbo.loss_and_grads(program.model, program.guide, x))


def numpyro_svi(vae: PlainVAE, batch: Tensor, seed: int) -> tuple[Any, Any, Any]:
    """The same VAE with the same weights in NumPyro: its SVI, the state it begins with, and the batch."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions as ndist

    def weights(net: nn.Module) -> list[tuple[Any, Any]]:
        return [(jnp.array(w.detach().T.numpy()), jnp.array(b.detach().numpy())) for w, b in linear_maps(net)]

    def mlp(layers: Any, a: Any) -> Any:
        for weight, bias in layers[:-1]:
            a = jnp.tanh(a @ weight + bias)
        weight, bias = layers[-1]
        return a @ weight + bias

    def model(x: Any) -> None:
        decoder = numpyro.param("decoder", p_x)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(Z), jnp.ones(Z)).to_event(1))
            numpyro.sample("x", ndist.Bernoulli(logits=mlp(decoder, z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encoder = numpyro.param("encoder", q_z)
        with numpyro.plate("data", len(x)):
            mu, log_sigma = jnp.split(mlp(encoder, x), 2, -1)
            numpyro.sample("z", ndist.Normal(mu, jnp.exp(log_sigma)).to_event(1))

    p_x, q_z, x = weights(vae.decoder), weights(vae.encoder), jnp.array(batch.numpy())
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LR), numpyro.infer.Trace_ELBO())
    return svi, svi.init(jax.random.PRNGKey(seed), x), x


def by_numpyro(vae: PlainVAE, batch: Tensor, seed: int) -> Run:
    import jax

    svi, state, x = numpyro_svi(vae, batch, seed)
    update = jax.jit(svi.update)

    def step() -> float:
        nonlocal state
        state, loss = jax.block_until_ready(update(state, x))
        return loss.item()

    return each(step)


def by_numpyro_loop(vae: PlainVAE, batch: Tensor, seed: int) -> Run:
    import jax

    svi, state, x = numpyro_svi(vae, batch, seed)

    @partial(jax.jit, static_argnums=2)
    def loop(state: Any, x: Any, n: int) -> Any:
        return jax.lax.scan(lambda state, _: svi.update(state, x), state, length=n)

    def run(n: int) -> list[float]:
        nonlocal state
        state, losses = jax.block_until_ready(loop(state, x, n))
        return losses.tolist()

    return run


def linear_maps(*nets: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    layers = chain.from_iterable(net.modules() for net in nets)
    return ((layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear))


def matrix_products(vae: PlainVAE, x: Tensor) -> Run:
    """For each layer a W^T; then g^T a, the gradient in W, and g W, that in a, of which the images need none."""
    jobs: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, (weight, _) in enumerate(linear_maps(vae.encoder, vae.decoder)):
        w, a, g = weight.detach(), torch.randn(len(x), weight.shape[1]), torch.randn(len(x), weight.shape[0])
        jobs += [(a, w.T, torch.empty_like(g)), (g.T, a, torch.empty_like(w))]
        jobs += [(g, w, torch.empty_like(a))] if i else []

    def step() -> float:
        for left, right, out in jobs:
            torch.mm(left, right, out=out)
        return float("nan")

    return each(step)


def plain(vae: pv.VAE) -> PlainVAE:
    """The same networks, with nothing of pyrovae around an MLP."""
    nets = (vae.posterior.net, vae.likelihood.net)
    return PlainVAE(*(net.layers if isinstance(net, pv.MLP) else net for net in nets))


def compiled_by_hand(program: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(program.by_hand, fullgraph=True, dynamic=False)


def torch_ways(bare: Build, own: Build, x: Tensor, elbo: Build, compiled: Build) -> dict[str, Way]:
    """The ways that every program has; `bare` and `own` build it in bare Pyro and as ours."""
    name = type(elbo()).__name__
    return {
        f"SVI, {name}, validation on": Way(lambda: by_svi(bare(), x, elbo()), validation=True),
        f"SVI, {name}": Way(lambda: by_svi(bare(), x, elbo())),
        f"{name} as a module, fused Adam": Way(lambda: by_autograd(bare(), x, lambda p: elbo()(p.model, p.guide))),
        "by hand, eager, fused Adam": Way(lambda: by_autograd(bare(), x, lambda p: p.by_hand)),
        "by hand, torch.compile, fused Adam": Way(lambda: by_autograd(bare(), x, compiled_by_hand), compiled=1),
        OURS: Way(lambda: by_us(own(), x, compiled()), compiled=2),
    }


def mlp_case(size: str, options: Options) -> Case:
    hidden, batch = parsed(size)
    x = images(batch, options.seed)

    def own() -> pv.VAE:
        return pv.VAE.mlp(X, Z, (hidden, hidden))

    def bare() -> PlainVAE:
        return plain(own())

    ways = torch_ways(bare, own, x, Trace_ELBO, pv.CompiledTrace_ELBO)
    jit = partial(JitTrace_ELBO, ignore_jit_warnings=True)
    ways["SVI, JitTrace_ELBO"] = Way(lambda: by_svi(bare(), x, jit()), compiled=3)
    if version_of("numpyro") != ABSENT:
        ways["NumPyro, jitted step"] = Way(lambda: by_numpyro(bare(), x, options.seed), compiled=1)
        ways["NumPyro, in a loop"] = Way(lambda: by_numpyro_loop(bare(), x, options.seed), compiled=options.steps)
    ways["floor: matrix products alone"] = Way(lambda: matrix_products(bare(), x))
    return Case("mlp", f"{X}-{hidden}-{hidden}-{Z}", batch, ways)


def conv_case(options: Options) -> Case:
    x = images(64, options.seed)

    def own() -> pv.VAE:
        decoder, encoder = pv.ConvDecoder(Z, (1, 28, 28)), pv.ConvEncoder((1, 28, 28), 2 * Z)
        return pv.VAE(StandardNormal(Z), Bernoulli(decoder), DiagonalNormal(encoder))

    ways = torch_ways(lambda: plain(own()), own, x, Trace_ELBO, pv.CompiledTrace_ELBO)
    return Case("conv", f"1x28x28-32-64-{Z}", len(x), ways)


def enumerated_case(options: Options) -> Case:
    x = images(100, options.seed)
    build = partial(LabelVAE, 200)
    elbo, compiled = (partial(kind, max_plate_nesting=1) for kind in (TraceEnum_ELBO, pv.CompiledTraceEnum_ELBO))
    ways = torch_ways(build, build, x, elbo, compiled)
    return Case("enumerated", f"{X}-200-200-{Z}, {CLASSES} classes", len(x), ways)


def images(batch: int, seed: int) -> Tensor:
    return (torch.rand(batch, X, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def cases(options: Options) -> Iterator[Case]:
    for program in options.programs:
        if program == "mlp":
            yield from (mlp_case(size, options) for size in options.sizes)
        else:
            yield {"conv": conv_case, "enumerated": enumerated_case}[program](options)


def measured(case: Case, options: Options) -> dict[str, Side]:
    torch.compiler.reset()  # what was compiled for another size is no part of this one
    order, sides = random.Random(options.seed), {}
    with tqdm(total=len(case.ways) * (1 + options.rounds), desc=f"{case.program} {case.size}", leave=False) as bar:
        for name, way in case.ways.items():
            sides[name] = Side(way, options.seed, options.steps)
            bar.update()
        for _ in range(options.rounds):
            for side in order.sample(list(sides.values()), len(sides)):
                side.turn()
                bar.update()
    return sides


def table(case: Case, sides: dict[str, Side], options: Options) -> str:
    ours = sides[OURS].ms
    lines = [
        f"{case.program} {case.size}, batch {case.batch}: {options.rounds} rounds of {options.steps} steps",
        f"{'':50s}{'median ms':>10s}{'min ms':>10s}{'/ ours':>8s}"
        f"{'to compile, s' if options.compile_time else '':>15s}{'nats per datum':>16s}",
    ]
    for name, side in sides.items():
        ratio = median(t / t_ours for t, t_ours in zip(side.ms, ours, strict=True))
        shown = options.compile_time and side.seconds_to_compile is not None
        seconds = f"{side.seconds_to_compile:.1f}" if shown else ""
        nats = "" if name.startswith("floor") else f"{fmean(side.losses) / case.batch:.1f}"
        lines.append(f"{name:50s}{median(side.ms):10.3f}{min(side.ms):10.3f}{ratio:8.2f}{seconds:>15s}{nats:>16s}")
    return "\n".join(lines)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "pyro-ppl", "pyrovae", "numpyro", "jax")
    versions = ", ".join(f"{package} {version_of(package)}" for package in packages)
    cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    threads = f"torch {torch.get_num_threads()} threads, JAX NPROC={os.environ['NPROC']}"
    return f"{cpu}, {cores}; {threads}\n{versions}, Python {platform.python_version()}"


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def parsed(size: str) -> tuple[int, int]:
    parts = size.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"Expected --sizes as H,batch, two positive whole numbers such as 200,100; got {size!r}")
    return int(parts[0]), int(parts[1])


def check(options: Options) -> None:
    for size in options.sizes:
        parsed(size)
    threads = 1 if options.threads is None else options.threads
    for name, value in {"rounds": options.rounds, "steps": options.steps, "threads": threads}.items():
        if value < 1:
            raise ValueError(f"Expected --{name} to be positive; got {value}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"Expected --seed to be at least 0 and below 2**32; got {options.seed}")
    if not options.programs or not options.sizes:
        raise ValueError("Expected at least one of --programs and of --sizes; got none")


def prepare(options: Options, folder: str) -> None:
    """Threads, an empty cache, and both compilers loaded; JAX reads the environment as it is imported."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    os.environ["NPROC"] = str(torch.get_num_threads())
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.compile_time:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.compile(nn.Linear(8, 8))(torch.ones(8, 8)).tanh().sum().backward()
    if version_of("numpyro") != ABSENT:
        import jax

        jax.block_until_ready(jax.jit(jax.numpy.tanh)(1.0))


def measure(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, folder)
        print(machine())
        if "mlp" in options.programs and version_of("numpyro") == ABSENT:
            print("NumPyro's two sides are absent: it is not installed (pip install numpyro)")
        for case in cases(options):
            print(f"\n{table(case, measured(case, options), options)}", flush=True)


def main() -> None:
    options = tyro.cli(Options, prog="step.py")
    try:
        check(options)
    except ValueError as error:
        print(f"step.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    measure(options)


if __name__ == "__main__":
    main()
