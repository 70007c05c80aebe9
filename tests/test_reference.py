"""The equations by hand against torch.distributions, automatic Jacobians, integrals and draws; all in float64."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from torch import Tensor

from pyrovae import conditionals, reference

DIMS = (1, 2, 5)
GAUSSIANS = ("DiagonalNormal", "FullNormal", "UnitNormal")
ETA_DIM = {"DiagonalNormal": lambda d: 2 * d, "UnitNormal": lambda d: d, "FullNormal": lambda d: d * (d + 3) // 2}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def family(name: str, eta: Tensor) -> td.Distribution:
    """The same density by torch.distributions; L filled entry by entry."""
    if name == "UnitNormal":
        return td.Independent(td.Normal(eta, torch.ones_like(eta)), 1)
    dim = next(d for d in range(1, 20) if ETA_DIM[name](d) == eta.shape[-1])
    mu, log_sigma = eta[..., :dim], eta[..., dim : 2 * dim]
    if name == "DiagonalNormal":
        return td.Independent(td.Normal(mu, log_sigma.exp()), 1)
    scale, position = torch.zeros(*eta.shape[:-1], dim, dim, dtype=eta.dtype), 2 * dim
    for i in range(dim):
        scale[..., i, i] = log_sigma[..., i].exp()
        for j in range(i):
            scale[..., i, j] = eta[..., position]
            position += 1
    return td.MultivariateNormal(mu, scale_tril=scale)


# --- log densities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
def test_log_standard_normal(shape):
    z = normal(*shape, scale=3)
    expected = td.Independent(td.Normal(torch.zeros_like(z), torch.ones_like(z)), 1).log_prob(z)
    assert_same(reference.log_standard_normal(z), expected)


@pytest.mark.parametrize("name", sorted(ETA_DIM))
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 4)])
def test_log_normals(name, dim, leading):
    x, eta = normal(*leading, dim, scale=3), normal(*leading, ETA_DIM[name](dim), seed=1)
    assert_same(reference.LIKELIHOODS[name](x, eta), family(name, eta).log_prob(x))


def test_log_bernoulli():
    logits = torch.cat([normal(40, scale=5), torch.tensor([0.0, 1e3, -1e3, 30, -30], dtype=torch.float64)])
    logits = logits.reshape(5, 9)
    for x in (torch.zeros_like(logits), torch.ones_like(logits), (normal(5, 9) > 0).double()):
        expected = td.Independent(td.Bernoulli(logits=logits), 1).log_prob(x)
        assert_same(reference.log_bernoulli(x, logits), expected)


@pytest.mark.parametrize(
    ("x", "logit", "expected"),
    [(1, 1e3, 0), (0, 1e3, -1e3), (1, -1e3, -1e3), (0, -1e3, 0), (1, 0, -math.log(2)), (0.25, 8, 2 - 8.0003354063731)],
)
def test_log_bernoulli_values(x, logit, expected):
    x, logit = (torch.tensor([value], dtype=torch.float64) for value in (x, logit))
    assert reference.log_bernoulli(x, logit).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("logit", [-1e3, -3.0, -1e-9, 0.0, 1e-9, 3.0, 1e3])
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_log_bernoulli_gradient_is_x_minus_the_mean(x, logit):
    logits = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    reference.log_bernoulli(torch.tensor([x], dtype=torch.float64), logits).backward()
    assert logits.grad.item() == pytest.approx(x - torch.sigmoid(logits).item(), abs=1e-10)


# --- posteriors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("dim", DIMS)
def test_log_q_is_log_p_eps_less_the_log_determinant(name, dim):
    transform, _ = reference.POSTERIORS[name]
    eps, eta = normal(dim), normal(ETA_DIM[name](dim), seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda e: transform(e, eta)[0], eps)
    log_p_eps = td.Normal(0.0, 1.0).log_prob(eps).sum()
    z, log_q = transform(eps, eta)
    assert_same(log_q, log_p_eps - torch.linalg.slogdet(jacobian).logabsdet)
    assert_same(log_q, family(name, eta).log_prob(z))
    assert_same(transform(torch.zeros_like(eps), eta)[0], family(name, eta).mean)


@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 4)])
def test_noise_inverts(name, leading):
    transform, noise = reference.POSTERIORS[name]
    eps, eta = normal(*leading, 3), normal(*leading, ETA_DIM[name](3), seed=1)
    assert_same(noise(transform(eps, eta)[0], eta), eps)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_leading_dimensions_are_one_by_one(name):
    transform, _ = reference.POSTERIORS[name]
    eps, eta = normal(2, 4, 3), normal(2, 4, ETA_DIM[name](3), seed=1)
    z, log_q = transform(eps, eta)
    for i, j in ((0, 0), (1, 3)):
        one_z, one_log_q = transform(eps[i, j], eta[i, j])
        assert_same(z[i, j], one_z)
        assert_same(log_q[i, j], one_log_q)


@pytest.mark.parametrize("dim", DIMS)
def test_full_normal_has_the_triangle_of_the_conditional(dim):
    """J J^T of the transform is the covariance, so that the entries of L' stand in the same order."""
    eta = normal(ETA_DIM["FullNormal"](dim), seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda eps: reference.full_normal(eps, eta)[0], normal(dim))
    q = conditionals.FullNormal(torch.nn.Identity()).distribution(eta)
    assert_same(q.scale_tril, jacobian)
    assert_same(q.covariance_matrix, jacobian @ jacobian.T)
    assert_same(q.mean, eta[:dim])


# --- bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["Bernoulli", *sorted(ETA_DIM)])
@pytest.mark.parametrize("posterior", GAUSSIANS)
@pytest.mark.parametrize("particles", [(), (6,), (2, 3)])
def test_vae_elbo_is_its_three_terms(posterior, likelihood, particles):
    x_dim, z_dim, n = 3, 2, 4
    encoder = normal(x_dim, ETA_DIM[posterior](z_dim), seed=1)
    decoder = normal(z_dim, ETA_DIM.get(likelihood, lambda d: d)(x_dim), seed=2)
    x, eps = (normal(n, x_dim, seed=3) > 0).double(), normal(*particles, n, z_dim, seed=4)
    elbo = reference.vae_elbo(
        x,
        eps,
        posterior_net=lambda x: torch.tanh(x @ encoder),
        likelihood_net=lambda z: torch.tanh(z @ decoder),
        posterior=reference.POSTERIORS[posterior][0],
        likelihood=reference.LIKELIHOODS[likelihood],
    )
    q = family(posterior, torch.tanh(x @ encoder))
    if posterior == "FullNormal":
        z = q.mean + (q.scale_tril @ eps.unsqueeze(-1)).squeeze(-1)
    else:
        z = q.mean + q.stddev * eps
    eta = torch.tanh(z @ decoder)
    p_x = td.Independent(td.Bernoulli(logits=eta), 1) if likelihood == "Bernoulli" else family(likelihood, eta)
    log_p_z = td.Independent(td.Normal(torch.zeros_like(z), 1.0), 1).log_prob(z)
    assert elbo.shape == (*particles, n)
    assert_same(elbo, p_x.log_prob(x) + log_p_z - q.log_prob(z))


@pytest.mark.parametrize("num_particles", [1, 7, 100])
@pytest.mark.parametrize("zeros", [False, True])
def test_importance_bound(num_particles, zeros):
    log_w = normal(num_particles, 5)
    if zeros:
        log_w[: num_particles // 2] = -torch.inf
    direct = torch.log(torch.exp(log_w).sum(0) / num_particles)
    assert_same(reference.importance_bound(log_w), direct)
    for offset in (1e4, -1e4):  # where the direct sum would overflow
        torch.testing.assert_close(reference.importance_bound(log_w + offset), direct + offset, rtol=1e-12, atol=0)


# --- closed forms ----------------------------------------------------------------------------------


KLS = {"DiagonalNormal": reference.kl_diagonal_standard, "FullNormal": reference.kl_full_standard}


def standard(dim: int) -> td.Distribution:
    return td.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(KLS))
@pytest.mark.parametrize("dim", DIMS)
def test_kl_is_torchs(name, dim):
    eta = normal(2, 4, ETA_DIM[name](dim))
    q = family(name, eta)
    scale = q.scale_tril if name == "FullNormal" else torch.diag_embed(q.stddev)
    expected = td.kl_divergence(td.MultivariateNormal(q.mean, scale_tril=scale), standard(dim).expand((2, 4)))
    assert_same(KLS[name](eta), expected)
    assert_same(KLS[name](torch.zeros_like(eta)), torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(KLS))
@pytest.mark.parametrize("seed", [11])
def test_kl_is_the_mean_of_log_q_less_log_p(name, seed):
    eta = normal(ETA_DIM[name](3), seed=1, scale=0.7)
    z, log_q = reference.POSTERIORS[name][0](normal(200_000, 3, seed=seed), eta.expand(200_000, -1))
    terms = log_q - standard(3).log_prob(z)
    error = terms.std() / math.sqrt(len(terms))
    assert abs(terms.mean() - KLS[name](eta)) < 5 * error, f"seed {seed}: {terms.mean()} and {KLS[name](eta)}"


@pytest.fixture(params=[(1, 1), (4, 2), (2, 4)], ids=str)
def linear(request):
    """W, b and log s of a linear-Gaussian model, and six data."""
    x_dim, z_dim = request.param
    log_sigma = torch.tensor(-0.4, dtype=torch.float64)
    return normal(x_dim, z_dim), normal(x_dim, seed=1), log_sigma, normal(6, x_dim, seed=2, scale=2)


def joint(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor) -> Tensor:
    p_x = td.Independent(td.Normal(z @ weight.T + bias, log_sigma.exp()), 1)
    return p_x.log_prob(x) + td.Independent(td.Normal(torch.zeros_like(z), 1.0), 1).log_prob(z)


def test_linear_gaussian_obeys_bayes_at_any_z(linear):
    """log p(x) = log p(x, z) - log p(z | x)."""
    *parameters, x = linear
    mean, covariance = reference.linear_gaussian_posterior(x, *parameters)
    z = normal(3, 6, mean.shape[-1], seed=5, scale=2)
    log_posterior = td.MultivariateNormal(mean, covariance).log_prob(z)
    log_px = reference.linear_gaussian_log_prob(x, *parameters)
    assert_same(joint(x, z, *parameters) - log_posterior, log_px.expand(3, 6))
    assert_same(reference.linear_gaussian_elbo(x, z, log_posterior, *parameters), log_px.expand(3, 6))


def test_linear_gaussian_against_torch(linear):
    weight, bias, log_sigma, x = linear
    variance = (2 * log_sigma).exp().expand(len(bias))
    marginal = td.LowRankMultivariateNormal(bias, weight, variance)
    assert_same(reference.linear_gaussian_log_prob(x, weight, bias, log_sigma), marginal.log_prob(x))
    assert_same(
        reference.linear_gaussian_log_prob(x.reshape(2, 3, -1), weight, bias, log_sigma),
        marginal.log_prob(x).reshape(2, 3),
    )


def test_linear_gaussian_posterior_is_the_conditional_of_the_joint_gaussian(linear):
    """From the covariance of (z, x): mean W^T C^-1 (x - b), covariance I - W^T C^-1 W, C = W W^T + s^2 I."""
    weight, bias, log_sigma, x = linear
    c = weight @ weight.T + (2 * log_sigma).exp() * torch.eye(len(bias), dtype=torch.float64)
    gain = weight.T @ torch.linalg.inv(c)
    mean, covariance = reference.linear_gaussian_posterior(x, weight, bias, log_sigma)
    assert_same(mean, (x - bias) @ gain.T)
    assert_same(covariance, torch.eye(weight.shape[1], dtype=torch.float64) - gain @ weight)


def test_linear_gaussian_elbo_at_any_log_q(linear):
    *parameters, x = linear
    z, log_q = normal(3, 6, parameters[0].shape[1], seed=6), normal(3, 6, seed=7)
    assert_same(reference.linear_gaussian_elbo(x, z, log_q, *parameters), joint(x, z, *parameters) - log_q)


GRID = torch.linspace(-60, 60, 240_001, dtype=torch.float64).unsqueeze(-1)


@pytest.mark.parametrize(
    "log_density",
    [
        reference.log_standard_normal,
        lambda x: reference.log_unit_normal(x, torch.tensor([1.3], dtype=torch.float64)),
        lambda x: reference.log_diagonal_normal(x, torch.tensor([1.3, 0.8], dtype=torch.float64)),
        lambda x: reference.log_full_normal(x, torch.tensor([1.3, 0.8], dtype=torch.float64).expand(len(x), 2)),
        lambda x: reference.linear_gaussian_log_prob(x, normal(1, 2), normal(1), normal(1)[0]),
    ],
    ids=["standard", "unit", "diagonal", "full", "linear"],
)
def test_densities_integrate_to_one(log_density):
    assert torch.trapezoid(log_density(GRID).exp(), GRID.squeeze(-1)).item() == pytest.approx(1, abs=1e-10)


def test_bernoulli_sums_to_one():
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    assert reference.log_bernoulli(x, normal(4, scale=3)).exp().sum().item() == pytest.approx(1, abs=1e-12)


# --- independence ----------------------------------------------------------------------------------


def test_reference_imports_nothing_of_pyro_or_pyrovae():
    found = set()
    files = Path(reference.__file__).parent.glob("*.py")
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in ("__import__", "importlib", "distributions"), f"line {node.lineno}"
    assert {name for name in found if not name.startswith("pyrovae.reference")} == {
        "math",
        "collections.abc",
        "typing",
        "torch",
    }
