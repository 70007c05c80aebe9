"""What a program's log-likelihood is, how far that can be trusted, and how the bounds compare."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae.compiled import Compile
from pyrovae.conditionals.conditional import networks_in
from pyrovae.data import Batch, Data, num_rows
from pyrovae.draws import Plan, Weights
from pyrovae.program import LatentModel
from pyrovae.traces import Unscaled, check_arguments, replayed_guide
from pyrovae.weights import WeightSums

K_HAT_LIMIT = 0.7
STATISTICS = {"log_px": "log_mean", "elbo": "elbo", "standard_error": "standard_error", "ess": "ess", "k_hat": "k_hat"}
ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class Evaluation:
    """Importance-sampled log-likelihood of N data, with what tells whether to trust it.

    Attributes:
        log_px: log (1/K) sum_k w_k, `(N,)`, nats: a lower bound on log p(x) in expectation.
        elbo: mean_k log w_k, `(N,)`, nats.
        standard_error: of log_px by the delta method, sqrt(1/ESS - 1/K), `(N,)`; NaN for one particle, which
            cannot tell.
        ess: effective sample size (sum w)^2 / sum w^2, `(N,)`, between 1 and K.
        k_hat: Pareto shape of the largest weights, `(N,)`. Above 0.7 neither log_px nor its error can be trusted.
            0 where all weights are equal; NaN below 21 particles, or where ties leave no tail to fit.
        num_particles: K.
        dim: number of observed values in a datum.
        active_units: for each latent site, the number of units whose posterior mean varies over the data with a
            variance above 0.01 (Burda et al. 2016).
    """

    log_px: Tensor
    elbo: Tensor
    standard_error: Tensor
    ess: Tensor
    k_hat: Tensor
    num_particles: int
    dim: int
    active_units: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """Means over the data, each with its standard error over the data; nats, per datum.

        `log_px_sampling_error` is the part of `log_px_error` that more particles would remove. The share of k-hat
        above 0.7 is that among the data whose k-hat is known; NaN for too few particles.
        """
        bits = -self.log_px / (self.dim * math.log(2))
        known = self.k_hat[~self.k_hat.isnan()]
        return {
            "num_data": len(self.log_px),
            "num_particles": self.num_particles,
            "log_px": self.log_px.mean().item(),
            "log_px_error": _error(self.log_px),
            "log_px_sampling_error": (self.standard_error**2).sum().sqrt().item() / len(self.log_px),
            "elbo": self.elbo.mean().item(),
            "elbo_error": _error(self.elbo),
            "bits_per_dim": bits.mean().item(),
            "bits_per_dim_error": _error(bits),
            "ess": self.ess.mean().item(),
            "k_hat_above_0.7": (known > K_HAT_LIMIT).double().mean().item(),
            "active_units": dict(self.active_units),
        }

    def __str__(self) -> str:
        s = self.summary()
        units = ", ".join(f"{count} in {site!r}" for site, count in s["active_units"].items())
        return "\n".join(
            [
                f"log p(x)      {s['log_px']:10.3f} ± {s['log_px_error']:.3f} nats per datum "
                f"({s['num_data']} data, K = {s['num_particles']}, sampling error {s['log_px_sampling_error']:.3f})",
                f"ELBO          {s['elbo']:10.3f} ± {s['elbo_error']:.3f} nats per datum",
                f"bits per dim  {s['bits_per_dim']:10.4f} ± {s['bits_per_dim_error']:.4f}",
                f"mean ESS      {s['ess']:10.1f}; k-hat above {K_HAT_LIMIT} for {s['k_hat_above_0.7']:.1%} of the data",
                f"active units  {units}",
            ]
        )


def _error(values: Tensor) -> float:
    """Standard error of the mean; NaN for a single datum."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluate(
    program: LatentModel,
    data: Any,
    num_particles: int = 5000,
    *,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    precision: str = "32-true",
    compile: Compile = False,
    progress: bool = True,
) -> Evaluation:
    """Importance-sampled log p(x) of each datum, its standard error and its diagnostics.

        log p_K(x) = log (1/K) sum_k w_k,   w_k = p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Weights are formed for each datum and summed as they come, so memory is bounded whatever N and K. Runs without
    gradients and in eval mode, on the program's device; the mode and, with a seed, torch's random state are
    restored after.

    Args:
        program: a `LatentModel`.
        data: a tensor `(N, D)`, a batch, a `Data` or a torch `DataLoader`.
        num_particles: K; exactly as many are drawn.
        batch_size: data at once; None chooses by memory.
        chunk_size: particles at once; None chooses by memory. Neither size enters the result, except through the
            order in which random numbers are drawn.
        seed: of the draws; None goes on from torch's present random state.
        precision: 32-true (as the program's parameters are) or bf16-mixed (the networks of all Conditionals in
            bfloat16; densities, weights and sums stay).
        compile: compile the program, in seconds; it pays from thousands of data on. "auto" goes on uncompiled, with a
            warning, where the program or the machine does not allow it.
        progress: show a progress bar.

    Raises:
        CompileError: where `compile` is True and the program cannot be compiled, or there is no C++ compiler.
        ValueError: for bad data, sizes below 1, data outside the support of the likelihood, or latents of model
            and guide that do not fit.
        FloatingPointError: where a weight is NaN or infinite, naming the datum and the site.

    Source:
        Kingma and Welling (2019), section 2.6; Burda et al. (2016); for k-hat, Vehtari et al. (2024).

    Example:
        >>> from pyrovae import LinearGaussian, evaluate
        >>> program, x = LinearGaussian(5, 2), torch.zeros(3, 5)
        >>> result = evaluate(program, x, num_particles=10, progress=False)
        >>> torch.allclose(result.log_px, program.log_prob(x).double())
        True
    """
    check_arguments(program, num_particles)
    results = {name: array("d") for name in STATISTICS}
    units = _ActiveUnits()
    with program.inference(seed), pyro.validation_enabled(False), networks_in(precision):
        plan = Plan.of(program, data, num_particles, batch_size, chunk_size, compile)
        for first, part in plan.parts(f"log p(x), K = {num_particles}", progress):
            sums = WeightSums(num_particles)
            for weights in plan.weights(first, part):
                sums.add(weights.log_weights, weights.elbo)
                units.add(weights)
            units.end_of_chunk()
            for name, method in STATISTICS.items():
                results[name].extend(getattr(sums, method)().tolist())
    return Evaluation(
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in results.items()},
        num_particles=num_particles,
        dim=plan.draws.survey.dim,
        active_units=units.count(),
    )


class _ActiveUnits:
    """Variance over the data of each unit's posterior mean, from sums."""

    def __init__(self) -> None:
        self.num_data = 0
        self.sums: dict[str, Tensor] = {}  # over the data, (2, D): of means and of their squares
        self.chunk: dict[str, Tensor] = {}  # over the particles, (n, D), of one chunk of data
        self.particles = 0

    def add(self, weights: Weights) -> None:
        k = len(weights.log_weights)
        for name, mean in weights.means.items():
            self.chunk[name] = self.chunk.get(name, 0) + k * mean.double()
        self.particles += k

    def end_of_chunk(self) -> None:
        for name, total in self.chunk.items():
            mean = total / self.particles
            self.sums[name] = self.sums.get(name, 0) + torch.stack([mean.sum(0), (mean**2).sum(0)])
        self.num_data += len(next(iter(self.chunk.values()), ()))
        self.chunk, self.particles = {}, 0

    def count(self) -> dict[str, int]:
        counts = {}
        for name, sums in self.sums.items():
            mean, square = sums / self.num_data
            if not bool(mean.isnan().all()):  # a class has no mean
                counts[name] = int((square - mean**2 > ACTIVE_VARIANCE).sum())
        return counts


@dataclass(frozen=True)
class Bound:
    """One line of a comparison.

    Attributes:
        name: of the bound.
        num_particles: K of an importance-sampled bound, else None.
        value: mean over the data, nats.
        sampling_error: standard error of that mean from the draws of the latents, nats; 0 for an exact value.
        error: standard error over the data, nats; None where only the sum over the data is known.
    """

    name: str
    num_particles: int | None
    value: float
    sampling_error: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """Bounds on log p(x) side by side; printed, it is a table.

    Attributes:
        bounds: reference ELBO and exact value only where the program has them.
        num_data: N.
        difference: largest difference of reference ELBO and Trace_ELBO over all draws and batches of data, at the
            same latents; nats per datum; None without a reference.
    """

    bounds: list[Bound]
    num_data: int
    difference: float | None

    def __str__(self) -> str:
        lines = [f"{f'nats per datum, {self.num_data} data':<26}{'mean':>12}   {'sampling':<11}{'over the data'}"]
        for bound in self.bounds:
            error = "" if bound.error is None else f"± {bound.error:.4f}"
            lines.append(f"{bound.name:<26}{bound.value:>12.4f} ± {bound.sampling_error:<11.4f}{error}".rstrip())
        if self.difference is not None:
            lines.append(f"reference and Trace_ELBO, at the same latents, differ by at most {self.difference:.1e}")
        return "\n".join(lines)


def compare(
    program: LatentModel,
    data: Any,
    num_particles: int | Sequence[int] = (1, 10, 100, 1000, 5000),
    *,
    elbo_draws: int = 100,
    seed: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Reference ELBO, Pyro's Trace_ELBO, importance-sampled bounds and the exact log p(x), side by side.

    Reference and Trace_ELBO are taken at the same latents, drawn from the guide. The bound for K is averaged over
    all groups of K among the largest number of draws, so that the bounds rise from one to the next.

    Args:
        program: a `LatentModel`; its `reference_elbo(x, z)` and `log_prob(x)` are used where it has them.
        data: as for `evaluate`.
        num_particles: every K.
        elbo_draws: draws for each datum in the two ELBOs.
        seed: of the draws; None goes on from torch's present random state.
        progress: show a progress bar.

    Raises:
        ValueError, FloatingPointError: as `evaluate`.

    Example:
        >>> from pyrovae import LinearGaussian, compare
        >>> comparison = compare(LinearGaussian(5, 2), torch.zeros(3, 5), (1, 10), progress=False)
        >>> [bound.name for bound in comparison.bounds]
        ['reference ELBO', 'Trace_ELBO', 'bound, K = 1', 'bound, K = 10', 'exact log p(x)']
    """
    ks = sorted({num_particles} if isinstance(num_particles, int) else set(num_particles))
    for k in ks or [0]:
        check_arguments(program, k)
    if elbo_draws < 1:
        raise ValueError(f"Expected elbo_draws to be at least 1; got {elbo_draws}")
    columns: dict[str, list[_Column]] = {}
    difference: float | None = None
    with program.inference(seed), pyro.validation_enabled(False):
        if isinstance(data, Data) and data.dynamic:  # both passes must see the same bits
            data = Data(next(data.batches(len(data))))
        for _, part in Plan.of(program, data, 1).parts("ELBOs", progress):
            elbos, apart = _elbos(program, part, elbo_draws)
            for name, column in elbos.items():
                columns.setdefault(name, []).append(column)
            if apart is not None:
                difference = max(apart, difference or 0.0)
        plan = Plan.of(program, data, ks[-1])
        for first, part in plan.parts(f"bounds up to K = {ks[-1]}", progress):
            log_w = torch.cat([weights.log_weights.double() for weights in plan.weights(first, part)])
            for k in ks:
                columns.setdefault(f"bound, K = {k}", []).append(_bound(log_w, k))
            exact: Callable[..., Tensor] | None = getattr(program, "log_prob", None)
            if exact is not None:
                columns.setdefault("exact log p(x)", []).append((exact(**part), 0.0))
    particles = {f"bound, K = {k}": k for k in ks}
    bounds = []
    for name, parts in columns.items():
        values = torch.cat([values.double().cpu() for values, _ in parts])
        sampling = math.sqrt(sum(variance for _, variance in parts)) / len(values)
        error = None if name == "Trace_ELBO" else _error(values)
        bounds.append(Bound(name, particles.get(name), values.mean().item(), sampling, error))
    return Comparison(bounds, len(values), difference)


# values (n,) of a chunk of data, and the variance of their sum that comes from the draws of the latents
_Column = tuple[Tensor, float]


def _bound(log_w: Tensor, k: int) -> _Column:
    """The bound for k particles, averaged over all groups of k among the draws `(K, n)`."""
    groups = log_w[: len(log_w) // k * k].reshape(-1, k, log_w.shape[1])
    values = groups.logsumexp(1) - math.log(k)
    if len(values) > 1:
        return values.mean(0), (values.var(0) / len(values)).sum().item()
    sums = WeightSums(k)
    sums.add(log_w[:k])
    return values[0], (sums.standard_error() ** 2).sum().item()


def _elbos(program: LatentModel, part: Batch, num_draws: int) -> tuple[dict[str, _Column], float | None]:
    """Both ELBOs of each datum, averaged over draws, and how far they are apart at most, per datum, in one draw.

    Pyro gives the sum over the data alone. Scales are stripped from it.
    """
    by_hand: Callable[..., Tensor | None] = getattr(program, "reference_elbo", lambda **_: None)
    references: list[Tensor] = []
    sums = []
    for _ in range(num_draws):
        guide, latents = replayed_guide(program, part)
        sums.append(-Trace_ELBO().loss(Unscaled()(program.model), Unscaled()(guide), **part))
        reference = by_hand(**part, **latents)
        if reference is not None:
            references.append(reference)
    n, pyros = num_rows(part), torch.tensor(sums, dtype=torch.float64)
    variance = pyros.var().item() / num_draws if num_draws > 1 else math.nan
    elbos: dict[str, _Column] = {}
    apart = None
    if references:
        values = torch.stack(references).double().cpu()
        elbos["reference ELBO"] = values.mean(0), variance
        apart = ((values.sum(1) - pyros).abs().max() / n).item()
    elbos["Trace_ELBO"] = (pyros.mean() / n).expand(n), variance
    return elbos, apart
