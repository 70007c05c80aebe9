"""Sums of weights against direct formulas, k-hat against draws of known shape and a scalar implementation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrovae.weights import WeightSums, pareto_k_hat

OFFSETS = (0.0, 1e4, -1e4)
STATISTICS = ("log_mean", "elbo", "ess", "standard_error", "k_hat")


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def summed(log_w: Tensor, chunk: int | None = None) -> WeightSums:
    sums = WeightSums(len(log_w))
    for part in log_w.split(chunk or len(log_w)):
        sums.add(part)
    return sums


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def log_weights(num_particles: int, offset: float, zeros: bool) -> Tensor:
    """Columns that range from nearly equal weights to one that carries the sum."""
    log_w = normal(num_particles, 6) * torch.tensor([1e-3, 0.3, 1, 3, 10, 100], dtype=torch.float64) + offset
    if zeros:
        log_w[torch.rand(log_w.shape, generator=random(1)) < 0.3] = -torch.inf
    return log_w


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("num_particles", [2, 7, 1000])
def test_sums_are_the_direct_formulas(num_particles, offset, zeros):
    log_w = log_weights(num_particles, offset, zeros)
    log_w[0] = offset  # no column without weight
    sums, largest = summed(log_w), log_w.max(0).values
    w = (log_w - largest).exp()
    ess = w.sum(0) ** 2 / (w**2).sum(0)
    error = (w - w.mean(0)).square().sum(0).sqrt() / w.sum(0)
    assert_same(sums.log_mean(), largest + w.mean(0).log())
    assert_same(sums.elbo(), log_w.mean(0))
    assert_same(sums.ess(), ess)
    assert_same(sums.standard_error() ** 2, error**2)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_enter_the_result(chunk, offset, zeros):
    log_w = log_weights(1500, offset, zeros)
    whole, parts = summed(log_w), summed(log_w, chunk)
    for name in ("log_mean", "elbo", "ess", "k_hat"):
        assert_same(getattr(parts, name)(), getattr(whole, name)())
    assert_same(parts.standard_error() ** 2, whole.standard_error() ** 2)


def test_single_precision_is_summed_in_double():
    log_w = normal(500, 4).float()
    for name in STATISTICS:
        assert torch.equal(getattr(summed(log_w), name)(), getattr(summed(log_w.double()), name)())


def test_one_particle():
    sums = summed(torch.tensor([[-3.0, 1e4]], dtype=torch.float64))
    assert sums.log_mean().tolist() == sums.elbo().tolist() == [-3, 1e4]
    assert sums.ess().tolist() == [1, 1]
    assert sums.standard_error().isnan().all()
    assert sums.k_hat().isnan().all()


@pytest.mark.parametrize("num_particles", [25, 1000])
@pytest.mark.parametrize("level", [0.0, -104.3, 1e4, -1e4])
def test_equal_weights(level, num_particles):
    sums = summed(torch.full((num_particles, 3), level, dtype=torch.float64), 10)
    assert_same(sums.log_mean(), torch.full((3,), level, dtype=torch.float64))
    assert_same(sums.ess(), torch.full((3,), num_particles, dtype=torch.float64))
    assert (sums.ess() <= num_particles).all()
    assert (sums.standard_error() ** 2 <= 1e-12 / num_particles).all()
    assert sums.k_hat().tolist() == [0, 0, 0]


def test_a_particle_that_carries_everything():
    log_w = torch.full((100, 1), -1e4, dtype=torch.float64)
    log_w[37] = 1e4
    sums = summed(log_w, 7)
    assert sums.ess().item() == pytest.approx(1, rel=1e-12)
    assert sums.standard_error().item() == pytest.approx(math.sqrt(1 - 1 / 100), rel=1e-12)
    assert sums.log_mean().item() == pytest.approx(1e4 - math.log(100), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.5])
@pytest.mark.parametrize("seed", [3])
def test_delta_method_error_is_the_spread_of_log_mean(sigma, seed):
    """log w ~ N(0, sigma^2): 4,000 replications, each a column; the spread's own error is its 1/sqrt(2 R)."""
    num_particles, replications = 500, 4000
    sums = summed(sigma * normal(num_particles, replications, seed=seed))
    spread, told = sums.log_mean().std().item(), sums.standard_error().mean().item()
    exact = math.sqrt(math.expm1(sigma**2) / num_particles)
    assert abs(spread - told) < 5 * spread / math.sqrt(2 * replications), f"seed {seed}: {spread} and {told}"
    assert abs(spread - exact) < 5 * spread / math.sqrt(2 * replications), f"seed {seed}: {spread} and {exact}"


def scalar_k_hat(log_w_descending: list[float]) -> float:
    """Zhang and Stephens (2009), equations 5 to 8, with kappa = -k; then the prior of Vehtari et al. (2024)."""
    top, end = log_w_descending[0], log_w_descending[-1]
    x = sorted(math.exp(log_w - top) - math.exp(end - top) for log_w in log_w_descending[:-1])
    n, m = len(x), 30 + math.floor(math.sqrt(len(x)))
    quartile = x[math.floor(n / 4 + 0.5) - 1]

    def kappa(theta: float) -> float:
        return -math.fsum(math.log1p(-theta * value) for value in x) / n

    thetas = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]
    profile = [n * (math.log(theta / kappa(theta)) + kappa(theta) - 1) for theta in thetas]
    weights = [1 / math.fsum(math.exp(min(other - mine, 700)) for other in profile) for mine in profile]
    theta = math.fsum(w * t for w, t in zip(weights, thetas, strict=True))
    return (-n * kappa(theta) + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("size", [5, 6, 20, 95])
def test_k_hat_is_the_scalar_profile(size):
    scale = torch.tensor([1e-3, 0.1, 0.5, 1, 3, 10, 50, 200], dtype=torch.float64)
    largest = (scale * normal(size + 1, 8, seed=size) + 1e3 * normal(8)).sort(0, descending=True).values
    by_hand = torch.tensor([scalar_k_hat(column.tolist()) for column in largest.T], dtype=torch.float64)
    torch.testing.assert_close(pareto_k_hat(largest), by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("num_particles", "size"), [(21, 5), (100, 20), (225, 45), (226, 46), (1000, 95)])
def test_the_tail_is_the_largest_fifth_or_three_roots(num_particles, size):
    """Vehtari et al. (2024): M = ceil(min(K / 5, 3 sqrt K)); the cut is the next largest weight."""
    log_w = normal(num_particles, 4)
    largest = log_w.sort(0, descending=True).values[: size + 1]
    by_hand = torch.tensor([scalar_k_hat(column.tolist()) for column in largest.T], dtype=torch.float64)
    torch.testing.assert_close(summed(log_w, 9).k_hat(), by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("xi", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [5])
def test_k_hat_recovers_the_shape_of_generalized_pareto_draws(xi, seed):
    """Averages over 200 columns of M = 1,000 draws of GPD(xi, sigma = 0.7) above a cut of 0.3."""
    size, columns = 1000, 200
    u = torch.rand(size, columns, generator=random(seed), dtype=torch.float64)
    draws = 0.3 + 0.7 * ((1 - u) ** -xi - 1) / xi
    tail = draws.sort(0, descending=True).values
    k_hat = pareto_k_hat(torch.cat([tail, torch.full((1, columns), 0.3, dtype=torch.float64)]).log())
    expected, shrinkage = (size * xi + 5) / (size + 10), size / (size + 10)
    error = shrinkage * (1 + xi) / math.sqrt(size)  # of one column
    assert abs(k_hat.mean() - expected) < 5 * error / math.sqrt(columns), f"seed {seed}: {k_hat.mean()}"
    # the spread of the columns has that size, up to its own error
    assert abs(k_hat.std() - error) < 5 * error / math.sqrt(2 * columns), f"seed {seed}: {k_hat.std()} and {error}"


@pytest.mark.parametrize("xi", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [6])
def test_k_hat_of_pareto_weights(xi, seed):
    """Weights u^-xi, u uniform: above any order statistic their excess is GPD(xi). K = 10,000, so M = 300."""
    columns = 200
    log_w = -xi * torch.rand(10_000, columns, generator=random(seed), dtype=torch.float64).log()
    k_hat, error = summed(log_w, 1000).k_hat(), (1 + xi) / math.sqrt(300) * 300 / 310
    expected = (300 * xi + 5) / 310
    assert abs(k_hat.mean() - expected) < 5 * error / math.sqrt(columns), f"seed {seed}: {k_hat.mean()}"


@pytest.mark.parametrize("scale", [300.0, 3000.0])
def test_k_hat_is_above_the_limit_where_one_weight_carries_all(scale):
    """Hundreds of nats between the largest weights: nothing to trust, and k-hat must say so."""
    assert (summed(scale * normal(1000, 5)).k_hat() > 0.7).all()


@pytest.mark.parametrize("size", [0, 1, 4])
def test_k_hat_of_a_short_tail_is_nan(size):
    assert pareto_k_hat(normal(size + 1, 3).sort(0, descending=True).values).isnan().tolist() == [True] * 3


def test_k_hat_below_21_particles_is_nan():
    assert summed(normal(20, 3)).k_hat().isnan().all()
    assert summed(normal(21, 3)).k_hat().isfinite().all()


@pytest.mark.parametrize("lower_end", [-2.0, -math.inf])
def test_ties_with_the_lower_end(lower_end):
    """M = 20: with 8 of them tied there is no tail to fit; with 3 there is, and it is fitted."""
    largest = normal(21, 2).sort(0, descending=True).values
    largest[-9:, 0] = lower_end
    largest[-4:, 1] = lower_end
    k_hat = pareto_k_hat(largest)
    assert k_hat[0].isnan()
    assert k_hat[1].item() == pytest.approx(scalar_k_hat(largest[:, 1].tolist()), abs=1e-10)


def test_ties_within_the_tail_are_fitted():
    largest = torch.tensor(np.repeat([3.0, 2.0, 1.5, 1.0, 0.0], [1, 2, 3, 4, 1]), dtype=torch.float64)
    assert pareto_k_hat(largest.unsqueeze(1)).item() == pytest.approx(scalar_k_hat(largest.tolist()), abs=1e-10)


def test_k_hat_does_not_depend_on_the_unit_of_the_weights():
    largest = normal(31, 5).sort(0, descending=True).values
    torch.testing.assert_close(pareto_k_hat(largest + 1e4), pareto_k_hat(largest), rtol=1e-8, atol=1e-8)
