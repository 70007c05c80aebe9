"""Bounds on log p(x) side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch, Data, num_rows
from pyrovae.draws import Plan
from pyrovae.noise import draw_seed
from pyrovae.program import LatentModel
from pyrovae.traces import Unscaled, check_arguments, replayed_guide
from pyrovae.weights import WeightSums, error_of_mean


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
        seed: of the draws; None draws one from torch's present random state.
        progress: show a progress bar.

    Raises:
        ValueError, FloatingPointError: as `evaluate`.

    Example:
        >>> from pyrovae import LinearGaussian, compare
        >>> comparison = compare(LinearGaussian(5, 2), torch.zeros(3, 5), (1, 10), progress=False)
        >>> [bound.name for bound in comparison.bounds]
        ['reference ELBO', 'Trace_ELBO', 'bound, K = 1', 'bound, K = 10', 'exact log p(x)']
    """
    ks: list[Any] = list(num_particles) if isinstance(num_particles, list | tuple | set | range) else [num_particles]
    for k in ks or [0]:
        check_arguments(program, k)
    ks = sorted(set(ks))
    check_whole(elbo_draws=elbo_draws)
    columns: dict[str, list[_Column]] = {}
    difference: float | None = None
    seed = draw_seed() if seed is None else seed
    with program.inference(seed), pyro.validation_enabled(False):
        if isinstance(data, Data) and not data.fixed:  # both passes must see the same data
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
        error = None if name == "Trace_ELBO" else error_of_mean(values)
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
