"""Numbers under stress: values and gradients at the ends of what float32 and float64 hold, against mpmath.

An input x_i of a function f is known to its last bit alone, so that no algorithm can promise f closer than

    u (|f| + sum_i |x_i df / dx_i|),  u the unit of rounding,

and one that is sound comes within a small multiple of it: `ULPS`, in float32 as in float64. Gradients are held to the
same, by how much they move as the inputs do. Constants of a formula that are rounded too, as a 1 from which something
is taken, count among the inputs.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from mpmath import mp, mpf
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyrovae import (
    IWAE_ELBO,
    GaussianMixture,
    HiddenMarkovModel,
    LatentModel,
    LinearGaussian,
    LinearGaussianStateSpace,
    SemiSupervisedVAE,
    data_plate,
    evaluate,
    log_weights,
    reference,
)
from pyrovae.attention import filters
from pyrovae.conditionals import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiagonalNormal,
    DiscretizedLogisticMixture,
    EnergyPrior,
    FloorNormal,
    FullNormal,
    HouseholderFlow,
    MixtureOfNormals,
    OneHotCategorical,
    StandardNormal,
    UnitNormal,
    transforms,
)
from pyrovae.conditionals.density import logsumexp
from pyrovae.conditionals.flows import Flow
from pyrovae.conditionals.planar import Planar
from pyrovae.conditionals.transforms import SPLINE_BOUND, SPLINE_LEAST
from pyrovae.models.hierarchical import _product
from pyrovae.reference import flows
from pyrovae.reference.draw import _filters as reference_filters
from pyrovae.supervision import EnumeratedELBO
from pyrovae.survey import Survey, draw
from pyrovae.traces import sample_sites
from pyrovae.weights import WeightSums

ULPS = 64
DIGITS = 120
UNSEEN = mpf(10) ** -60
DTYPES = (torch.float32, torch.float64)
SMALL, LARGE = math.log(1e-8), math.log(1e8)
both = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@dataclass
class Case:
    """A function of rows of numbers, and the same in mpmath.

    Attributes:
        exact: of the numbers of a row, and of the constants.
        rows: where.
        functions: by name, of a tensor `(R, n)` to `(R,)`.
        given: how many numbers of a row, the first ones, are not differentiated in.
        constants: of the formula.
        terms: the size of the largest term in a sum that value or gradient is, where that is more than they are.
    """

    exact: Callable[..., Any]
    rows: Sequence[tuple[float, ...]]
    functions: dict[str, Callable[[Tensor], Tensor]]
    given: int = 0
    constants: tuple[float, ...] = ()
    terms: Callable[..., Any] = lambda *row: 0


@cache
def rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def slopes(exact: Callable[..., Any], row: Sequence[Any]) -> list[Any]:
    """df / dx_i, by central differences of a step that rounding and curvature both leave alone, up to `UNSEEN`."""
    found = []
    for i, value in enumerate(row):
        step = mpf(10) ** -40 * max(abs(value), mpf(10) ** -10)
        ends = [exact(*row[:i], value + sign * step, *row[i + 1 :]) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


@cache
def truth(name: str, row: tuple[float, ...]) -> tuple[Any, Any, list[Any], list[Any]]:
    """The value, what rounding the inputs may do to it, the gradient, and what it may do to that; times 1/u."""
    case = CASES[name]
    numbers = [mpf(rounded(value)) for value in row] + [mpf(value) for value in case.constants]
    value, gradient = case.exact(*numbers), slopes(case.exact, numbers)
    if not mp.isfinite(value):
        return value, mpf(0), gradient, gradient
    largest = case.terms(*numbers[: len(row)])
    sway = largest + abs(value) + sum(abs(x * g) for x, g in zip(numbers, gradient, strict=True))
    sways = [largest + abs(g) for g in gradient]
    for i, x in enumerate(numbers):
        moved = slopes(case.exact, [*numbers[:i], x * (1 + mpf(10) ** -20), *numbers[i + 1 :]])
        sways = [s + abs(a - b) * mpf(10) ** 20 for s, a, b in zip(sways, gradient, moved, strict=True)]
    return value, sway, gradient, sways


def assert_true(name: str, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    case, about = CASES[name], torch.finfo(dtype)
    unit, least = about.eps / 2, about.tiny
    inputs = torch.tensor([[rounded(v) for v in row] for row in case.rows], dtype=dtype)
    given, free = inputs[:, : case.given], inputs[:, case.given :].requires_grad_()
    found = function(torch.cat([given, free], 1))
    assert found.dtype == dtype
    assert found.shape == (len(case.rows),)
    (gradient,) = torch.autograd.grad(found.sum(), free)
    with mp.workdps(DIGITS):
        for row, ours, ours_slopes in zip(case.rows, found.tolist(), gradient.tolist(), strict=True):
            value, sway, exact_slopes, sways = truth(name, row)
            if not mp.isfinite(value):
                assert ours == value, f"at {row}: {ours}, and exactly {value}"
                continue
            names = ["f", *(f"df/dx_{i}" for i in range(case.given, len(row)))]
            pairs = zip(
                names,
                [ours, *ours_slopes],
                [value, *exact_slopes[case.given :]],
                [sway, *sways[case.given :]],
                strict=False,
            )  # constants have slopes, too
            for what, mine, exactly, may in pairs:
                if abs(exactly) > about.max:
                    continue
                allowed = ULPS * (unit * may + least) + UNSEEN
                assert math.isfinite(mine), f"{what} at {row}: {mine}, and exactly {mp.nstr(exactly, 17)}"
                error = abs(mpf(mine) - exactly)
                assert error <= allowed, (
                    f"{what} at {row}: {mine!r}, and exactly {mp.nstr(exactly, 17)}: "
                    f"{mp.nstr(error / (unit * may + least), 3)} ulps"
                )


# --- the densities ---------------------------------------------------------------------------------


def normal(x, mu, log_sigma):
    return -(((x - mu) / mp.exp(log_sigma)) ** 2 + mp.log(2 * mp.pi)) / 2 - log_sigma


def softplus(x):
    return mp.log(1 + mp.exp(x))


def log_sum_exp(values):
    top = max(values)
    return top + mp.log(sum(mp.exp(v - top) for v in values))


def full_normal(x, y, mu, nu, log_s, log_t, lower):
    eps = (x - mu) / mp.exp(log_s)
    return normal(x, mu, log_s) + normal(y, nu + lower * eps, log_t)


def continuous_bernoulli(x, logit):
    if logit == 0:
        return x * logit
    return x * logit - mp.log(mp.expm1(logit) / logit)


def classes(x, *numbers):
    *logits, one = numbers
    return one * logits[int(x)] - log_sum_exp(logits)


def one_hot(*numbers):
    *numbers, one = numbers
    y, logits = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    return sum(a * (one * b - log_sum_exp(logits)) for a, b in zip(y, logits, strict=True))


def log_sigmoid(x, one=1):
    return -mp.log(one + mp.exp(-x))


def discretized_logistics(x, mu_1, mu_2, log_s_1, log_s_2, log_pi_1, log_pi_2, one, another, half_step):
    terms, total = [], log_sum_exp([log_pi_1, log_pi_2])
    for mu, log_s, log_pi in ((mu_1, log_s_1, log_pi_1), (mu_2, log_s_2, log_pi_2)):
        s, c = mp.exp(max(log_s, mpf(-7))), 2 * x - one
        above, below = (c + half_step - mu) / s, (c - half_step - mu) / s
        if x < 0.5 / 255:
            log_p = log_sigmoid(above, one)
        elif x > 254.5 / 255:
            log_p = log_sigmoid(-below, another)
        else:
            log_p = log_sigmoid(above, one) + log_sigmoid(-below, another) + mp.log(-mp.expm1(below - above))
        terms.append(log_pi - total + log_p)
    return log_sum_exp(terms)


def mixture(z, log_pi_1, log_pi_2, mu_1, mu_2, log_s_1, log_s_2):
    total = log_sum_exp([log_pi_1, log_pi_2])
    return log_sum_exp([log_pi_1 - total + normal(z, mu_1, log_s_1), log_pi_2 - total + normal(z, mu_2, log_s_2)])


def density(family: Any, name: str, dim: int = 1, **parts: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """The family's, and the one by hand, of rows of x and eta."""
    by_hand = (reference.LIKELIHOODS | reference.PRIORS | {"OneHotCategorical": reference.log_one_hot})[name]
    return {
        "family": lambda v: family.distribution(v[:, dim:]).log_prob(v[:, :dim]),
        "by hand": lambda v: by_hand(v[:, :dim], v[:, dim:], **parts),
    }


def one_by_one(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.stack([function(row) for row in v])


def rows(*columns: Sequence[float]) -> list[tuple[float, ...]]:
    return list(itertools.product(*columns))


SIGMAS = (SMALL, -1.0, 0.0, LARGE)
LOGITS = (0.0, 1e-8, -1e-8, 1e-3, -1e-3, 1.0, -30.0, 1e4, -1e4)
MIXTURE_ROWS = [
    (0.5, 0.0, 0.0, -1.0, 1.0, 0.0, 0.5),
    (1e4, 0.0, 0.0, 0.0, 1.0, SMALL, LARGE),  # one component is so far that its density is 0
    (1e4, 1e4, -1e4, 0.0, 1.0, LARGE, SMALL),
    (1e8, -1e4, 1e4, 1e8, 0.0, SMALL, SMALL),
    (-1e8, 0.0, 0.0, 0.0, 1e4, SMALL, SMALL),
]
LOGISTIC_ROWS = [
    (k / 255, mu, other, log_s, other_s, log_pi, 0.0)
    for k in (0, 1, 128, 255)
    for mu, other, log_s, other_s, log_pi in (
        (0.0, 0.5, 0.0, -1.0, 0.0),
        (1e4, -1e4, SMALL, LARGE, 0.0),
        (1e4, 1e4, SMALL, -7.5, 1.0),
        (-3.0, -1e4, SMALL, SMALL, -1e4),
        (0.01, 0.5, LARGE, LARGE, 1e4),
        (-2.0, -2.5, -8.0, -5.0, 1.0),
    )
]
ONE_HOTS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
CLASS_LOGITS = ((0.0, 0.0, 0.0), (1e4, 0.0, -1e4), (-1e4, -1e4, -1e4), (1e-8, -1e4, 1e4), (30.0, 0.1, -30.0))

CASES = {
    "StandardNormal": Case(
        lambda z: normal(z, 0, 0),
        rows((0.0, 1e-8, 1.0, -1e4, 1e8)),
        {
            "family": lambda v: StandardNormal(1).to(v.dtype)().log_prob(v),
            "by hand": reference.log_standard_normal,
        },
    ),
    "UnitNormal": Case(
        lambda x, mu: normal(x, mu, 0),
        rows((0.0, 1.0, -1e4, 1e8), (0.0, 1e-8, 1e4)),
        density(UnitNormal(None), "UnitNormal"),
    ),
    "DiagonalNormal": Case(
        normal,
        rows((0.0, 1.0, -1e4, 1e8), (0.0, 1e-8, 1e4), SIGMAS),
        density(DiagonalNormal(None), "DiagonalNormal"),
    ),
    "FloorNormal": Case(
        lambda x, mu, log_s, floor: normal(x, mu, mp.log(floor + mp.exp(log_s))),
        rows((0.0, 1.0, -1e4, 1e8), (0.0, 1e4), SIGMAS),
        density(FloorNormal(None, 1e-6), "FloorNormal", floor=1e-6),
        constants=(1e-6,),
    ),
    "FullNormal": Case(
        full_normal,
        [
            (1.0, -2.0, 0.5, 0.25, 0.0, 0.5, 0.3),
            (1.0, -2.0, 0.5, 0.25, SMALL, LARGE, 0.3),
            (1.0, -2.0, 0.5, 0.25, LARGE, SMALL, 1e-4),
            (1e4, 1e4, 0.0, 1e-8, SMALL, SMALL, 1e-8),
            (1e8, -1e8, 1.0, 0.0, LARGE, LARGE, 1e8),
        ],
        density(FullNormal(None), "FullNormal", 2),
    ),
    "Bernoulli": Case(
        lambda x, logit, one: -(one - x) * logit + log_sigmoid(logit),
        rows((0.0, 1.0), LOGITS),
        density(Bernoulli(None), "Bernoulli"),
        1,
        (1.0,),
    ),
    "ContinuousBernoulli": Case(
        continuous_bernoulli,
        rows((0.0, 0.25, 1.0), (*LOGITS, 0.4999, 0.5, -0.5, 1e-20, 5.0, -80.0)),
        {"family": density(ContinuousBernoulli(None), "ContinuousBernoulli")["family"]},
        1,
    ),
    "ContinuousBernoulli of a Bernoulli": Case(
        lambda x, logit, one: continuous_bernoulli(x, logit) + (one - 1) * mp.log(2),
        rows((0.0, 0.25, 1.0), (*LOGITS, 0.049, 0.05, -0.05, 1e-20, 5.0, -80.0)),
        {"by hand": density(ContinuousBernoulli(None), "ContinuousBernoulli")["by hand"]},
        1,
        (1.0,),
    ),
    "Categorical": Case(
        classes,
        [(x, *logits) for x in (0.0, 1.0, 2.0) for logits in CLASS_LOGITS],
        density(Categorical(None, 3), "Categorical", num_classes=3),
        1,
        (1.0,),
    ),
    "OneHotCategorical": Case(
        one_hot,
        [(*y, *logits) for y in ONE_HOTS for logits in CLASS_LOGITS],
        density(OneHotCategorical(None), "OneHotCategorical", 3),
        3,
        (1.0,),
    ),
    "DiscretizedLogisticMixture": Case(
        discretized_logistics,
        LOGISTIC_ROWS,
        density(DiscretizedLogisticMixture(None, 2), "DiscretizedLogisticMixture", num_components=2),
        1,
        (1.0, 1.0, 1 / 255),
    ),
    "MixtureOfNormals": Case(
        mixture,
        MIXTURE_ROWS,
        {
            "family": one_by_one(lambda v: MixtureOfNormals(1, 2).distribution(v[1:]).log_prob(v[:1])),
            "by hand": lambda v: reference.log_mixture_of_normals(v[:, :1], v[:, 1:], num_components=2),
        },
    ),
}


# --- the steps of flows ----------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def knots(*sizes):
    shares = [mp.exp(size - log_sum_exp(sizes)) for size in sizes]
    least = mpf(SPLINE_LEAST)
    found = [-mpf(SPLINE_BOUND)]
    for share in shares:
        found.append(found[-1] + 2 * SPLINE_BOUND * (least + (1 - least * len(sizes)) * share))
    return found


def bent(x, w_1, w_2, h_1, h_2, slope, *, log_slope=False):
    """A rational-quadratic spline of two pieces (Durkan et al. 2019, eq. 4 and 5)."""
    if abs(x) >= SPLINE_BOUND:
        return mpf(0) if log_slope else x
    least = mpf(SPLINE_LEAST)
    d = [1, least + softplus(slope + mp.log(mp.expm1(1 - least))), 1]
    xs, ys = knots(w_1, w_2), knots(h_1, h_2)
    i = int(x >= xs[1])
    width, height = xs[i + 1] - xs[i], ys[i + 1] - ys[i]
    s, t = height / width, (x - xs[i]) / width
    below = s + (d[i + 1] + d[i] - 2 * s) * t * (1 - t)
    if log_slope:
        return mp.log(s**2 * (d[i + 1] * t**2 + 2 * s * t * (1 - t) + d[i] * (1 - t) ** 2) / below**2)
    return ys[i] + height * (s * t**2 + d[i] * t * (1 - t)) / below


def bent_back(y, w_1, w_2, h_1, h_2, slope):
    """Eq. 6 to 8: so many digits that nothing need be feared of cancelling."""
    if abs(y) >= SPLINE_BOUND:
        return y
    d = [1, mpf(SPLINE_LEAST) + softplus(slope + mp.log(mp.expm1(1 - mpf(SPLINE_LEAST)))), 1]
    xs, ys = knots(w_1, w_2), knots(h_1, h_2)
    i = int(y >= ys[1])
    width, height = xs[i + 1] - xs[i], ys[i + 1] - ys[i]
    s, rise = height / width, y - ys[i]
    rest = rise * (d[i + 1] + d[i] - 2 * s)
    a, b, c = height * (s - d[i]) + rest, height * d[i] - rest, -s * rise
    return xs[i] + width * 2 * c / (-b - mp.sqrt(b**2 - 4 * a * c))


def pushed(z_1, z_2, b, u_1, u_2, w_1, w_2, *, log_det=False):
    """The planar step's first value; Rezende and Mohamed (2015), eq. 10 to 12 and appendix A.1."""
    wu = w_1 * u_1 + w_2 * u_2
    a = mp.tanh(w_1 * z_1 + w_2 * z_2 + b)
    if log_det:
        return mp.log(1 + (1 - a**2) * (softplus(wu) - 1))
    return z_1 + a * (u_1 + (softplus(wu) - 1 - wu) * w_1 / (w_1**2 + w_2**2))


def reflected(z_1, z_2, v_1, v_2):
    return z_1 - 2 * v_1 * (v_1 * z_1 + v_2 * z_2) / (v_1**2 + v_2**2)


def curve(function: Any, part: int) -> Callable[[Tensor], Tensor]:
    """Of rows of a value and its parameters."""
    return lambda v: function(v[:, :1], v[:, 1:].unsqueeze(-1))[part].squeeze(-1)


def planar(log_det: bool) -> Callable[[Tensor], Tensor]:
    def value(v: Tensor) -> Tensor:
        z, b, u, w = v.split([2, 1, 2, 2], 1)
        step = Planar((b, u, w))
        y = step(z)
        return step.log_abs_det_jacobian(z, y) if log_det else y[:, 0]

    return value


def of_flow(step: Any, part: int, *sizes: int) -> Callable[[Tensor], Tensor]:
    """A step of `reference` of rows of z and its parameters."""

    def value(v: Tensor) -> Tensor:
        z, *params = v.split(sizes, 1)
        found = step(z, None, lambda h: params)
        return found[part] if part else found[0][:, 0]

    return value


def spline(part: int) -> Callable[[Tensor], Tensor]:
    return lambda v: flows._spline(v[:, :1], v[:, 1:].unsqueeze(-1), SPLINE_BOUND, SPLINE_LEAST)[part].squeeze(-1)


def gate(part: int) -> Callable[[Tensor], Tensor]:
    def value(v: Tensor) -> Tensor:
        found = flows._iaf(v[:, :1], v, lambda z, h: v[:, 1:].unsqueeze(-1))
        return found[part] if part else found[0][:, 0]

    return value


def mirror(v: Tensor) -> Tensor:
    family = HouseholderFlow(None, 2, 1, amortized=True)
    family.own.data.zero_()
    return family.transforms(v[:, 2:])[0](v[:, :2])[:, 0]


GATES = [(x, m, s) for x in (0.5, 1e4) for m in (0.0, -1e8) for s in (0.0, 20.0, -80.0, 1e4, -18.0)]
SHIFTS = [(x, m, s) for x in (0.5, 1e4) for m in (0.0, -1e8) for s in (0.0, SMALL, LARGE)]
SPLINES = [
    (x, *params)
    for x in (-3.0, -2.9, -0.5, 0.0, 1e-8, 2.5, 2.9, 3.0, 1e8)
    for params in (
        (0.0, 0.0, 0.0, 0.0, 0.0),
        (1.0, -2.0, 0.5, 3.0, -1.0),
        (1e4, -1e4, -1e4, 1e4, 0.0),
        (0.0, 0.0, 0.0, 0.0, 1e4),
        (0.3, 0.0, 0.0, 1e4, 1e4),
        (0.0, -1e4, 0.0, 1.0, -1e4),
    )
]
PUSHES = [
    (0.5, -1.0, 0.1, 1.0, 2.0, 0.5, -0.3),
    (0.5, -1.0, 0.1, 1.0, 2.0, 1e-15, 2e-15),
    (0.5, -1.0, 0.1, 1.0, 2.0, 1e-25, 2e-25),
    (0.5, -1.0, 0.1, 1e4, 0.0, -1.0, 0.0),  # w u = -1e4: as close to no inverse as can be
    (1e4, -1e4, 0.1, 20.0, 0.0, 1.0, 0.0),
    (1e-3, 1e-3, 0.0, -100.0, 1.0, 1.0, 1.0),
    (1e8, 1.0, 0.0, 1e4, 1e4, 1.0, 1.0),
]
MIRRORS = [(0.5, -1.0, *v) for v in ((1.0, 2.0), (1e-25, 1e-25), (1e-30, 0.0), (1e25, -1e25), (1e8, 1e-8))]

CASES |= {
    "gate": Case(
        lambda x, m, s: sigmoid(s) * x + sigmoid(-s) * m,
        GATES,
        {"family": curve(transforms.GATE.forward, 0), "by hand": gate(0)},
        terms=lambda x, m, s: abs(x) + abs(m),
    ),
    "gate, log slope": Case(
        lambda x, m, s: -softplus(-s), GATES, {"family": curve(transforms.GATE.forward, 1), "by hand": gate(1)}
    ),
    "gate, back": Case(
        lambda y, m, s: y + (y - m) * mp.exp(-s),
        [(y, m, s) for y, m, s in GATES if s > -20],
        {"family": curve(transforms.GATE.inverse, 0)},
    ),
    "affine": Case(lambda x, m, s: x * mp.exp(s) + m, SHIFTS, {"family": curve(transforms.AFFINE.forward, 0)}),
    "affine, back": Case(lambda y, m, s: (y - m) * mp.exp(-s), SHIFTS, {"family": curve(transforms.AFFINE.inverse, 0)}),
    "spline": Case(
        bent,
        SPLINES,
        {"family": curve(transforms.SPLINE.forward, 0), "by hand": spline(0)},
        terms=lambda *row: 2 * SPLINE_BOUND,
    ),
    "spline, log slope": Case(
        partial(bent, log_slope=True),
        [row for row in SPLINES if row[0] not in (-3.0, 0.0, 1e-8, 3.0)],  # its slope is another on either side
        {"family": curve(transforms.SPLINE.forward, 1), "by hand": spline(1)},
        terms=lambda *row: 2 * SPLINE_BOUND,
    ),
    "spline, back": Case(
        bent_back,
        SPLINES,
        {"family": curve(transforms.SPLINE.inverse, 0)},
        terms=lambda *row: 2 * SPLINE_BOUND,
    ),
    "planar": Case(
        pushed,
        PUSHES,
        {"family": planar(False), "by hand": of_flow(flows._planar, 0, 2, 1, 2, 2)},
        terms=lambda z_1, z_2, b, u_1, u_2, w_1, w_2: abs(u_1) + abs(u_2),
    ),
    "planar, log determinant": Case(
        partial(pushed, log_det=True),
        PUSHES,
        {"family": planar(True), "by hand": of_flow(flows._planar, 1, 2, 1, 2, 2)},
        terms=lambda z_1, z_2, b, u_1, u_2, w_1, w_2: abs(u_1) + abs(u_2),
    ),
    "HouseholderFlow": Case(
        reflected,
        MIRRORS,
        {"family": mirror, "by hand": lambda v: flows._reflected(v[:, :2], v, lambda _: v[:, 2:])[:, 0]},
        terms=lambda z_1, z_2, v_1, v_2: (abs(z_1) + abs(z_2)) / max(abs(v_1), abs(v_2)),
    ),
}


# --- models in which everything is known, near where they are deterministic ------------------------


def linear_gaussian(*numbers):
    """log p(x) for two values of x and one of z, or one of x and two of z."""
    *numbers, log_s = numbers
    variance = mp.exp(2 * log_s)
    if len(numbers) == 6:
        x_1, x_2, w_1, w_2, b_1, b_2 = numbers
        det = variance * (w_1**2 + w_2**2 + variance)
        a, b = x_1 - b_1, x_2 - b_2
        square = (a**2 * (w_2**2 + variance) - 2 * a * b * w_1 * w_2 + b**2 * (w_1**2 + variance)) / det
        return -(square + mp.log(det)) / 2 - mp.log(2 * mp.pi)
    x, w_1, w_2, b = numbers
    return normal(x, b, mp.log(w_1**2 + w_2**2 + variance) / 2)


def probabilistic_pca(x_dim: int, z_dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def parts(v: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, log_sigma = v.split([x_dim, x_dim * z_dim, x_dim, 1])
        return x, weight.reshape(x_dim, z_dim), bias, log_sigma[0]

    def model(v: Tensor) -> Tensor:
        program = LinearGaussian(x_dim, z_dim)
        x, *parameters = parts(v)
        for name, value in zip(("weight", "bias", "log_sigma"), parameters, strict=True):
            delattr(program, name)
            setattr(program, name, value)
        return program.log_prob(x)

    return {"model": one_by_one(model), "by hand": one_by_one(lambda v: reference.linear_gaussian_log_prob(*parts(v)))}


CASES["LinearGaussian, more of x than of z"] = Case(
    linear_gaussian,
    [(*row, s) for row in ((1.0, -0.5, 0.7, 0.2, 0.1, 0.0), (1e4, 1.0, 1e4, 1e-4, 0.0, 0.0)) for s in SIGMAS],
    probabilistic_pca(2, 1),
    terms=lambda *row: min(1, mp.exp(-row[-1])),
)
CASES["LinearGaussian, more of z than of x"] = Case(
    linear_gaussian,
    [(*row, s) for row in ((1.0, 0.7, 0.2, 0.1), (1e4, 1e4, 1e-4, 0.0)) for s in SIGMAS],
    probabilistic_pca(1, 2),
    terms=lambda *row: min(1, mp.exp(-row[-1])),
)
CASES["KL of DiagonalNormal"] = Case(
    lambda mu, log_s, one: (mu**2 + mp.exp(2 * log_s) - one) / 2 - one * log_s,
    rows((0.0, 1e-8, 1e4), (*SIGMAS, 1e-4)),
    {
        "by hand": reference.kl_diagonal_standard,
        "family": lambda v: kl_divergence(DiagonalNormal(None).distribution(v), StandardNormal(1).to(v.dtype)()),
    },
    constants=(1.0,),
)
CASES["KL of FullNormal"] = Case(
    lambda m, n, s, t, r, one: (m**2 + n**2 + mp.exp(2 * s) + mp.exp(2 * t) + r**2 - 2 * one) / 2 - one * (s + t),
    [(0.0, 1e4, 0.0, 1e-4, 1e-8), (1.0, 1e-8, SMALL, LARGE, 1e4), (1.0, 2.0, LARGE, SMALL, -0.5)],
    {"by hand": reference.kl_full_standard},
    constants=(1.0,),
)
PRODUCTS = rows((0.0, 1e4), SIGMAS, (1.0, -1e8), SIGMAS)
for part in (0, 1):
    CASES[f"product of normals, {('mean', 'log sigma')[part]}"] = Case(
        [
            lambda m, s, n, t: (m * mp.exp(-2 * s) + n * mp.exp(-2 * t)) / (mp.exp(-2 * s) + mp.exp(-2 * t)),
            lambda m, s, n, t: -mp.log(mp.exp(-2 * s) + mp.exp(-2 * t)) / 2,
        ][part],
        PRODUCTS,
        {
            "family": lambda v, part=part: _product(v[:, :2], v[:, 2:])[:, part],
            "by hand": lambda v, part=part: reference.product_of_normals(v[:, :2], v[:, 2:])[:, part],
        },
        terms=lambda m, s, n, t: abs(m) + abs(n),
    )


@both
@pytest.mark.parametrize(("name", "which"), [(name, which) for name, case in CASES.items() for which in case.functions])
def test_values_and_gradients_are_exact_to_what_the_inputs_allow(name, which, dtype):
    assert_true(name, CASES[name].functions[which], dtype)


@both
@pytest.mark.parametrize("row", PUSHES)
def test_planar_steps_come_back(row, dtype):
    """f(f^-1(y)) = y, also where the step is all but flat, and there are gradients."""
    z, *params = torch.tensor([row], dtype=dtype).split([2, 1, 2, 2], 1)
    for value in params:
        value.requires_grad_()
    step, by_hand = Planar(params), lambda h: params
    with torch.no_grad():
        y = step(z)
    x = Planar(params).inv(y)
    room = 100 * torch.finfo(dtype).eps * (y.abs().max() + step.u.abs().max()).item()
    assert_close(Planar(params)(x), y, rtol=0, atol=room)
    assert_close(flows._planar(flows._planar_back(y, y, by_hand), y, by_hand)[0], y, rtol=0, atol=room)
    if row[5] > -1e-20 and abs(row[5]) > 1e-20:
        assert all(g.isfinite().all() for g in torch.autograd.grad(x.sum(), params, allow_unused=True))


@both
@pytest.mark.parametrize("edge", [-3.0, 3.0, -1e8, 1e8])
@pytest.mark.parametrize("params", [(0.0,) * 5, (1e4, -1e4, -1e4, 1e4, 1e4), (0.0, 1e4, 0.0, 1.0, -1e4)])
def test_splines_are_the_identity_at_and_beyond_the_edges_of_their_box(params, edge, dtype):
    x = torch.tensor([[edge]], dtype=dtype, requires_grad=True)
    theta = torch.tensor([params], dtype=dtype).unsqueeze(-1).requires_grad_()
    for function in (transforms.SPLINE.forward, transforms.SPLINE.inverse):
        y, log_slope = function(x, theta)
        assert y.item() == edge
        assert log_slope.item() == 0
        slopes = torch.autograd.grad(y.sum() + log_slope.sum(), [x, theta])
        assert slopes[0].item() == 1
        assert (slopes[1] == 0).all()


@pytest.mark.parametrize("number", range(8))
@pytest.mark.usefixtures("float64")
def test_splines_by_hand_have_no_gaps_between_their_pieces(number):
    """At the inner knots of the library's spline, and a unit of rounding to either side, both are one curve."""
    theta = 2 * torch.randn(1, 23, 1, generator=torch.Generator().manual_seed(number))
    knots_x = transforms._knots(theta[:, :8].squeeze(-1))
    ends = torch.tensor([-math.inf, math.inf]).unsqueeze(-1)
    x = torch.cat([knots_x, torch.nextafter(knots_x, ends)])[:, 1:-1].reshape(-1, 1)
    ours = transforms.SPLINE.forward(x, theta.expand(len(x), -1, -1))
    hand = flows._spline(x, theta.expand(len(x), -1, -1), SPLINE_BOUND, SPLINE_LEAST)
    for a, b in zip(ours, hand, strict=True):
        assert_close(a, b, rtol=0, atol=1e-8)


@both
def test_filters_of_a_grid_that_is_far_off_or_thin(dtype):
    """g~_X, g~_Y, log sigma^2, log delta~, log gamma: each row of a filter sums to 1, the nearest pixel if need be."""
    numbers = [(0, 0, 0, 0, 0), (1e4, -1e4, -37, 0, 0), (0.3, 0.1, -37, 3, 0), (0, 0, 37, -18, 0), (-1e8, 0, 0, 0, 0)]
    numbers = torch.tensor(numbers, dtype=dtype, requires_grad=True)
    banks = [filters(numbers, 4, 5, 3)[:2], reference_filters(numbers, (1, 4, 5), 3)[::-1]]
    for ours, hand in zip(*banks, strict=True):
        assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
        assert_close(ours, hand, rtol=1e-3 if dtype == torch.float32 else 1e-12, atol=1e-6)
        for bank in (ours, hand):
            (slopes,) = torch.autograd.grad(bank.square().sum(), numbers, retain_graph=True)
            assert slopes.isfinite().all()


@both
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_an_energy_that_is_constant_has_a_normalizer_without_error(level, dtype):
    prior = EnergyPrior(torch.nn.Linear(2, 1, dtype=dtype), 2).to(dtype)
    prior.net.weight.data.zero_()
    prior.net.bias.data.fill_(level)
    log_z, error = prior.log_normalizer()
    assert log_z.item() == pytest.approx(-level, abs=2e-3 if dtype == torch.float32 else 1e-11)
    assert error.item() < (1e-4 if dtype == torch.float32 else 1e-12)
    z = torch.zeros(1, 2, dtype=dtype)
    assert_close(prior.eval()().log_prob(z), StandardNormal(2).to(dtype)().log_prob(z), rtol=1e-6, atol=4e-3)


# --- sums of exponentials --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, -1e9])
def test_parts_of_a_sum_of_exponentials_are_one_together(offset, dtype):
    """Of equal values, of one that carries all, and of some that are minus infinity."""
    values = torch.tensor([[0.0] * 4, [0.0, -1e4, -2e4, -3e4], [-math.inf, 0.0, -math.inf, 0.0]], dtype=dtype) + offset
    values.requires_grad_()
    total = logsumexp(values, 1)
    (parts,) = torch.autograd.grad(total.sum(), values)
    assert_close(total, torch.tensor([math.log(4), 0, math.log(2)], dtype=dtype) + offset)
    assert_close(parts, torch.tensor([[0.25] * 4, [1, 0, 0, 0], [0, 0.5, 0, 0.5]], dtype=dtype))


def test_a_sum_of_nothing_is_minus_infinity():
    assert logsumexp(torch.full((3, 2), -math.inf), 0).tolist() == [-math.inf] * 2


def joint_gaussian(x: Tensor, parameters: dict[str, Tensor]) -> tuple[Any, Any, Any]:
    """log p(x), and mean and covariance of p(z | x), of one sequence `(T, X)`, by the Gaussian of all steps at once."""
    (steps, x_dim), z_dim = x.shape, len(parameters["transition"])
    p = {name: mp.matrix(value.reshape(len(value), -1).tolist()) for name, value in parameters.items()}
    mean, covariance = p["initial_mean"], p["initial_covariance"]
    means, joint, seen = mp.matrix(steps * z_dim, 1), mp.matrix(steps * z_dim), mp.matrix(steps * x_dim, steps * z_dim)
    error, noise = mp.matrix(steps * x_dim, 1), mp.matrix(steps * x_dim)
    for t in range(steps):
        z, at_x = slice(t * z_dim, (t + 1) * z_dim), slice(t * x_dim, (t + 1) * x_dim)
        if t:
            mean, covariance = p["transition"] * mean, p["transition"] * covariance * p["transition"].T
            covariance += p["transition_covariance"]
        means[z, 0], joint[z, z], between = mean, covariance, covariance
        for later in range(t + 1, steps):
            between = p["transition"] * between
            after = slice(later * z_dim, (later + 1) * z_dim)
            joint[after, z], joint[z, after] = between, between.T
        seen[at_x, z], noise[at_x, at_x] = p["emission"], p["emission_covariance"]
        error[at_x, 0] = mp.matrix(x[t].unsqueeze(-1).tolist()) - p["emission"] * mean - p["bias"]
    total = seen * joint * seen.T + noise
    gain = joint * seen.T * total**-1
    log_px = -((error.T * total**-1 * error)[0] + mp.log(mp.det(total)) + steps * x_dim * mp.log(2 * mp.pi)) / 2
    return log_px, means + gain * error, joint - gain * seen * joint


@pytest.mark.parametrize(("x_dim", "z_dim"), [(3, 2), (2, 2), (1, 2)])
@pytest.mark.parametrize("emission_sigma", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("transition_sigma", [1e-8, 1.0, 1e8])
@pytest.mark.usefixtures("float64")
def test_kalman_filter_and_smoother(x_dim, z_dim, emission_sigma, transition_sigma):
    """Exact to 1e-12: 1e-13 for each of some ten operations on a sequence of three steps."""
    program, x = LinearGaussianStateSpace(x_dim, z_dim), torch.randn(1, 3, x_dim)
    program.emission_log_sigma.data.fill_(math.log(emission_sigma))
    program.transition_log_sigma.data.fill_(math.log(transition_sigma))
    with torch.no_grad(), mp.workdps(DIGITS):
        lengths = torch.tensor([3])
        log_px, (mean, covariance) = program.log_prob(x, lengths), program.smooth(x, lengths)
        exact = joint_gaussian(x[0], program._by_hand())
    assert_close(log_px, torch.tensor([float(exact[0])]), rtol=1e-12, atol=1e-12)
    assert_close(mean.flatten(), torch.tensor([float(v) for v in exact[1]]), rtol=1e-12, atol=1e-12)
    variances = torch.tensor([float(exact[2][i, i]) for i in range(3 * z_dim)])
    assert_close(covariance[0].diagonal(dim1=-2, dim2=-1).flatten(), variances, rtol=1e-10, atol=0)


@pytest.mark.parametrize("transition_sigma", [1e-8, 1.0, 1e8])
@pytest.mark.usefixtures("float64")
def test_exact_posterior_of_a_chain_that_hardly_moves_or_hardly_holds(transition_sigma):
    """All log-weights are log p(x), whose terms are known to 1e-8 where z_t is known to a step of that size."""
    program, x = LinearGaussianStateSpace(3, 2), torch.randn(4, 6, 3)
    program.transition_log_sigma.data.fill_(math.log(transition_sigma))
    batch = {"x": x, "lengths": torch.tensor([6, 1, 3, 6])}
    weights = log_weights(program, batch, 5).detach()
    assert_close(weights, program.log_prob(**batch).detach().expand(5, 4), rtol=1e-6, atol=1e-6)


def hidden_markov(stay: float, steps: int, values: int) -> HiddenMarkovModel:
    program = HiddenMarkovModel.linear(values, 3)
    program.transition_logits.data.copy_(stay * torch.eye(3))
    program.likelihood.net.layers[-1].weight.data.normal_(std=3)
    return program


@pytest.mark.parametrize(("steps", "stay"), [(1, 0.0), (1, 1e4), (1000, 5.0), (100, 1e4)])
def test_a_long_hidden_markov_chain_in_float32(steps, stay):
    """100 values a step: log p(x) is some 1e5 nats, the marginals of its states are as sharp as in float64."""
    program = hidden_markov(stay, steps, 100)
    x, lengths = (torch.rand(2, steps, 100) > 0.5).float(), torch.tensor([steps, steps])
    log_px, marginals = program.log_prob(x, lengths).detach(), program.smooth(x, lengths).detach()
    weights = log_weights(program, {"x": x, "lengths": lengths}, 3)
    wide, batch = copy.deepcopy(program).double(), {"x": x.double(), "lengths": lengths}
    assert_close(log_px.double(), wide.log_prob(**batch).detach(), rtol=1e-6, atol=1e-6)
    assert_close(marginals.double(), wide.smooth(**batch).detach(), rtol=0, atol=1e-3)
    assert_close(weights, log_px.expand(3, 2), rtol=1e-6, atol=1e-6)
    weights.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in program.parameters())


@pytest.mark.usefixtures("float64")
def test_forward_and_backward_algorithm_of_impossible_moves():
    """Two states that never change, of which one cannot show what is seen."""
    log_initial = torch.tensor([0.5, 0.5]).log()
    log_transition, log_likelihood = torch.eye(2).log(), torch.tensor([[[-1e4, -math.inf], [-2e4, -3.0]]])
    lengths = torch.tensor([2])
    log_px, forward = reference.forward_algorithm(log_initial, log_transition, log_likelihood, lengths)
    backward = reference.backward_algorithm(log_transition, log_likelihood, lengths)
    assert_close(log_px, torch.tensor([-3e4 + math.log(0.5)]))
    assert (forward + backward).softmax(-1).tolist() == [[[1.0, 0.0], [1.0, 0.0]]]
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    joint = reference.hidden_markov_log_joint(z, log_initial, log_transition, log_likelihood, lengths)
    assert_close(joint, log_px)
    joint = reference.hidden_markov_log_joint(z.flip(-1), log_initial, log_transition, log_likelihood, lengths)
    assert joint.tolist() == [-math.inf]


# --- bounds ----------------------------------------------------------------------------------------


class Window(LatentModel):
    """z ~ N(0, 1), x uniform within 1 of z: draws that are too far have weight 0."""

    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor([0.2]))

    def model(self, x=None):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(self.mu.expand(len(x), 1), 1.0).to_event(1))


@pytest.mark.parametrize("gradient", ["plain", "dreg"])
def test_draws_of_weight_zero_leave_the_bound_and_its_gradient_finite(gradient):
    """log p_K(x) = log(S / K), and its slopes, of the draws that are near enough."""
    program, x = Window(), torch.tensor([[0.0], [0.5], [-1.0]])
    elbo = IWAE_ELBO(50, gradient, max_plate_nesting=1)
    with pyro.validation_enabled(False):
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(program.model, program.guide, x)
        torch.manual_seed(0)
        z = 0.2 + torch.randn(50, 3, 1)
        (found,) = torch.autograd.grad(loss, program.mu)
    log_w = torch.distributions.Uniform(z - 1, z + 1, validate_args=False).log_prob(x).squeeze(-1)
    assert log_w.isinf().any()
    log_w = log_w - (z.squeeze(-1) ** 2) / 2 + (z.squeeze(-1) - 0.2) ** 2 / 2
    assert_close(-loss, (log_w.logsumexp(0) - math.log(50)).sum())
    share = log_w.softmax(0) if gradient == "plain" else log_w.softmax(0) ** 2
    # d log w / d mu: of the draw, -z; for DReG of its path alone, -z + (z - mu)
    slope = -z.squeeze(-1) if gradient == "plain" else torch.full_like(log_w, -0.2)
    assert_close(-found, (share * slope).sum().unsqueeze(0))


@pytest.mark.usefixtures("float64")
def test_bounds_by_hand_with_weights_far_apart_and_zero():
    log_w = torch.tensor([[0.0, -1e4, -math.inf], [-1e4, 1e4, 5.0], [-2e4, -math.inf, -math.inf]])
    log_w.requires_grad_()
    bound = reference.importance_bound(log_w)
    assert_close(bound, torch.tensor([0.0, 1e4, 5.0]) - math.log(3), rtol=1e-15, atol=0)
    (share,) = torch.autograd.grad(bound.sum(), log_w)
    assert_close(share, torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]]), rtol=1e-15, atol=1e-15)
    assert reference.importance_bound(torch.full((4, 1), -math.inf)).item() == -math.inf


@pytest.mark.parametrize("logits", [[0.0, -math.inf], [-1e4, 1e4], [1e4, 0.0]])
@both
def test_a_class_of_probability_zero_counts_for_nothing(logits, dtype):
    """Whatever log p(x, y) says of it, minus infinity included; its gradients are 0."""
    logits = torch.tensor([logits], dtype=dtype, requires_grad=True)
    sure = int(logits.argmax())
    for impossible in (-math.inf, -3.0, 1e30):
        elbos = torch.full((2, 1), impossible, dtype=dtype)
        elbos[sure] = -7.0
        elbos.requires_grad_()
        bound = reference.unlabeled_elbo(elbos, logits)
        assert bound.tolist() == [-7.0]
        slopes = torch.autograd.grad(bound.sum(), [elbos, logits])
        assert slopes[0].flatten().tolist() == [float(sure == 0), float(sure == 1)]
        assert slopes[1].tolist() == [[0.0, 0.0]]
    y = torch.nn.functional.one_hot(torch.tensor([sure]), 2).to(dtype)
    assert reference.log_one_hot(y, logits).tolist() == [0.0]
    assert OneHotCategorical(None).distribution(logits).log_prob(y).tolist() == [0.0]


@pytest.mark.parametrize("sure", [0, 2])
def test_a_sum_over_classes_of_which_one_is_certain(sure):
    """q(y | x) exactly 0 and 1: U is L of that class, in Pyro's sum, in ours, and in log-weights."""
    program, x = SemiSupervisedVAE.mlp(6, 3, 2, (5,)), (torch.randn(4, 6) > 0).float()
    last = program.classifier.net.layers[-1]
    last.weight.data.zero_()
    last.bias.data.copy_(torch.full((3,), -1e4).index_fill(0, torch.tensor(sure), 0.0))
    survey = Survey.of(program, {"x": x})
    elbo = EnumeratedELBO(Trace_ELBO(), survey.label, survey.nesting)
    torch.manual_seed(1)
    loss = elbo.differentiable_loss(program.model, program.guide, x=x)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in program.parameters())
    with torch.no_grad():
        drawn = draw(program, {"x": x}, 3, survey)
    by_class = drawn._split(drawn.drawn.log_px_z) - drawn._split(drawn.drawn.kl)
    assert_close(drawn.log_px_z - drawn.kl, by_class[:, sure])
    log_weights(program, x, 3).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in program.parameters())


# --- importance weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 2, 26, 1000])
@pytest.mark.parametrize("span", [0.0, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_sums_of_weights_that_are_nats_apart(num_particles, span, dtype):
    """Against mpmath: log mean, ESS and standard error to 1e-12; 1 <= ESS <= K."""
    log_w = (torch.linspace(-0.5, 0.5, num_particles, dtype=torch.float64) * span - 1e4).to(dtype).unsqueeze(1)
    log_w = log_w[torch.randperm(num_particles)]
    sums = WeightSums(num_particles)
    for part in log_w.split(7):
        sums.add(part)
    with mp.workdps(DIGITS):
        w = [mp.exp(value) for value in log_w.flatten().tolist()]
        total, squares = mp.fsum(w), mp.fsum(v**2 for v in w)
        exact = [float(mp.log(total / num_particles)), float(total**2 / squares)]
        exact.append(float(mp.sqrt(abs(squares / total**2 - mpf(1) / num_particles))))
    assert sums.log_mean().item() == pytest.approx(exact[0], rel=1e-14)
    assert sums.ess().item() == pytest.approx(exact[1], rel=1e-12)
    assert 1 <= sums.ess().item() <= num_particles
    if num_particles == 1:
        assert sums.standard_error().isnan().all()
    else:
        assert sums.standard_error().item() == pytest.approx(exact[2], rel=1e-12, abs=1e-7)
    k_hat = sums.k_hat().item()
    assert math.isnan(k_hat) == (num_particles < 21)
    if num_particles >= 21:
        assert k_hat == 0 if span == 0 else k_hat > 0.7 if span == 1e4 else math.isfinite(k_hat)


def test_one_datum_and_one_particle():
    """Of one datum no error of the mean is known, of one particle none of log p(x); all else is a number."""
    program = LinearGaussian(4, 2)
    found = evaluate(program, torch.zeros(1, 4), 1, progress=False)
    assert found.ess.tolist() == [1.0]
    assert found.standard_error.isnan().all()
    assert found.k_hat.isnan().all()
    assert_close(found.log_px, program.log_prob(torch.zeros(1, 4)).double().detach())
    summary = found.summary()
    unknown = {name for name, value in summary.items() if isinstance(value, float) and math.isnan(value)}
    errors = {"log_px_error", "elbo_error", "bits_per_dim_error", "log_px_sampling_error", "k_hat_above_0.7"}
    assert unknown == errors
    assert str(found)


@pytest.mark.parametrize("seed", [4])
def test_a_million_particles(seed):
    """Within 5 standard errors of the closed form."""
    program = LinearGaussian(3, 1, DiagonalNormal.mlp(3, 1, hidden=()))
    x = torch.randn(2, 3)
    found = evaluate(program, x, 1_000_000, seed=seed, progress=False)
    gap = (found.log_px - program.log_prob(x).detach().double()).abs()
    assert (gap < 5 * found.standard_error).all(), f"seed {seed}: {gap} and {found.standard_error}"
    assert ((found.ess > 1) & (found.ess <= 1_000_000)).all()
    assert found.k_hat.isfinite().all()


@pytest.mark.parametrize("seed", [4])
def test_sums_of_a_million_weights_hold_a_few_thousand_numbers(seed):
    """log w ~ N(0, 1/4): log mean 1/8 and ESS / K exp(-1/4), whose error by the delta method is some 2 / sqrt(K)."""
    sums, generator = WeightSums(1_000_000), torch.Generator().manual_seed(seed)
    for _ in range(10):
        sums.add(0.5 * torch.randn(100_000, 1, generator=generator, dtype=torch.float64))
        assert sums.largest.numel() <= 3001
    assert abs(sums.log_mean() - 1 / 8) < 5 * sums.standard_error(), f"seed {seed}"
    assert abs(sums.ess() / 1e6 - math.exp(-1 / 4)) < 5 * 2e-3, f"seed {seed}"


# --- mixtures --------------------------------------------------------------------------------------


CLOUDS = {
    "duplicates": torch.tensor([[1.0, 2.0]] * 6 + [[-3.0, 0.5]] * 6),
    "a cluster of one point": torch.tensor([[1e4, -1e4], *[[0.1 * i, (0.3 * i) % 1] for i in range(12)]]),
    "a constant feature": torch.stack([torch.linspace(-3, 3, 12) ** 3, torch.ones(12)], 1),
    "as many data as clusters": torch.tensor([[0.0, 0.0], [5.0, -5.0], [9.0, 9.0]]),
    "all zero": torch.zeros(9, 2),
    "tiny": 1e-8 * torch.linspace(-1, 1, 18).reshape(9, 2),
    "a large offset": 1e4 + torch.linspace(-1, 1, 18).reshape(9, 2).sin(),
}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # scikit-learn's, of duplicates
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_em_of_degenerate_data(cloud, covariance):
    """log p(x) rises to a number, the clusters' probabilities are such, and float32 keeps what float64 has found."""
    x = CLOUDS[cloud]
    program = GaussianMixture(2, 3, covariance).start_from(x, seed=0)
    history = program.em(x, iterations=30, progress=False)
    assert all(math.isfinite(value) for value in history)
    assert all(b > a - 1e-3 for a, b in itertools.pairwise(history)), history
    log_px, q = program.log_prob(x), program.predict(x)
    assert_close(q.sum(1), torch.ones(len(x)))
    wide = copy.deepcopy(program).double()
    exact = wide.log_prob(x.double()).detach()
    # standard deviations of 1e-3, the floor's, and means that float32 has to a few units in the last place
    ill = x.abs().max().double() * torch.finfo(torch.float32).eps / 1e-3
    assert_close(log_px.detach().double(), exact, rtol=1e-5, atol=float(1e-4 + 100 * ill + 10 * ill**2))
    eta = wide.likelihood.eta(torch.eye(3, dtype=torch.float64)).detach()
    full = reference.full_parameters(eta) if covariance == "full" else None
    scale = torch.diag_embed(eta[:, 2:].exp()) if full is None else full[2]
    by_hand = reference.gaussian_mixture_log_prob(
        x.double(), wide.label_prior.eta().detach(), eta[:, :2], scale @ scale.mT
    )
    assert_close(exact, by_hand, rtol=1e-6, atol=1e-6)
    program.log_prob(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in program.parameters())


# --- all of the zoo --------------------------------------------------------------------------------


ROOTS = ("StandardNormal", "MixtureOfNormals", "VampPrior", "AutoregressivePrior", "EnergyPrior")


def stressed(make: Callable[[], Any], size: float) -> Any:
    """With parameters so many times as large; those that begin at zero scattered, too."""
    torch.manual_seed(3)
    part = make().eval()
    for parameter in part.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter)).mul_(size)
    return part


def slopes_of(part: torch.nn.Module, value: Tensor) -> list[Tensor]:
    parameters = [p for p in part.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("size", [1.0, 20.0])
@pytest.mark.parametrize("name", zoo.CONDITIONALS)
def test_conditionals_in_float32_and_far_from_zero(name, size):
    """At a draw of their own, which float64 has made: within what float32 leaves of the parameters, and of eta.

    Value and gradient are compared with those in float64, and their difference with what becomes of these where all
    parameters are changed in their last bits. To slopes of a saturated softmax some units of its size, 1, are granted.
    """
    narrow = stressed(zoo.CONDITIONALS[name], size)
    wide, unit = copy.deepcopy(narrow).double(), torch.finfo(torch.float32).eps
    no_parents = name in ROOTS or "root" in name or "uniform" in name
    parents = [] if no_parents else [torch.randn(1, 4)]
    with torch.no_grad():
        value, eta = wide(*(p.double() for p in parents)).sample().float(), wide.eta(*(p.double() for p in parents))

    def log_p(part: torch.nn.Module, dtype: torch.dtype, changed: float = 0.0) -> Tensor:
        return part(*(p.to(dtype) for p in parents)).log_prob(value.to(dtype) * (1 + changed)).sum()

    ours, exact = log_p(narrow, torch.float32), log_p(wide, torch.float64)
    if not exact.requires_grad:
        assert_close(ours.double(), exact)
        return
    our_slopes, exact_slopes = slopes_of(narrow, ours), slopes_of(wide, exact)
    moves, moved_slopes = torch.zeros(()), [torch.zeros_like(g) for g in exact_slopes]
    for _ in range(3):
        changed = copy.deepcopy(wide)
        for p in changed.parameters():
            p.data.mul_(1 + unit * torch.empty_like(p).uniform_(-1, 1))
        # so is each z_t between the steps of a flow
        other = log_p(changed, torch.float64, unit if isinstance(narrow, Flow) else 0.0)
        moves = torch.maximum(moves, (other - exact).abs().detach())
        pairs = zip(moved_slopes, slopes_of(changed, other), exact_slopes, strict=True)
        moved_slopes = [torch.maximum(m, (a - b).abs()) for m, a, b in pairs]
    largest = max([1.0, *eta.abs().flatten().tolist()])
    assert (ours - exact).abs() <= ULPS * (moves + unit * (exact.abs() + largest))
    steepest = max(g.abs().max() for g in exact_slopes)
    for a, b, moved in zip(our_slopes, exact_slopes, moved_slopes, strict=True):
        assert ((a - b).abs() <= ULPS * (moved.max() + unit * (steepest + size))).all()


EVERYONE = zoo.PROGRAMS | zoo.LABELED


def log_weight(program: LatentModel, batch: dict[str, Tensor], latents: dict[str, Tensor]) -> Tensor:
    """sum log p(x, z) - log q(z | x) at given latents, in the program's own dtype."""
    dtype = next(program.parameters()).dtype
    batch, latents = ({k: v.to(dtype) if v.is_floating_point() else v for k, v in d.items()} for d in (batch, latents))
    with pyro.validation_enabled(False):
        guide = poutine.trace(poutine.condition(program.guide, latents)).get_trace(**batch)
        model = poutine.trace(poutine.condition(program.model, latents)).get_trace(**batch)
        return model.log_prob_sum() - guide.log_prob_sum()


def shaken(value: Tensor) -> Tensor:
    """Changed in its last bits of float32; zeros and ones, as classes are, stay."""
    change = torch.finfo(torch.float32).eps * torch.empty_like(value).uniform_(-1, 1)
    return torch.where((value == 0) | (value == 1), value, value * (1 + change))


@pytest.mark.parametrize("size", [1.0, 2.0])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
@pytest.mark.parametrize("name", EVERYONE)
def test_programs_in_float32_on_data_that_are_all_zero_or_one(name, pixel, size):
    """At draws of their own: log-weights are as near to those in float64 as parameters and draws allow."""
    entry = EVERYONE[name]
    program = stressed(entry.make, size)
    batch = entry.batch(3)
    batch["x"] = torch.full_like(batch["x"], pixel)
    with pyro.validation_enabled(False):
        trace = poutine.trace(program.guide).get_trace(**batch)
    latents = {site: node["value"].detach() for site, node in sample_sites(trace).items()}
    wide = copy.deepcopy(program).double()
    ours, exact = log_weight(program, batch, latents), log_weight(wide, batch, latents)
    assert all(g.isfinite().all() for g in slopes_of(program, ours))
    move = 0.0
    for _ in range(3):
        changed = copy.deepcopy(wide)
        for p in changed.parameters():
            p.data.copy_(shaken(p.data))
        near = {site: shaken(value.double()) for site, value in latents.items()}
        move = max(move, (log_weight(changed, batch, near) - exact).abs().item())
    assert (ours - exact).abs().item() <= ULPS * (move + torch.finfo(torch.float32).eps * exact.abs().item())
