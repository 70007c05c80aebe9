"""Several stochastic layers: against exact posteriors, exact likelihoods, and the VAE that one layer is."""

import math
from typing import get_args

import pyro
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyrovae import MLP, VAE, HierarchicalVAE, compare, evaluate, load, log_weights, reference, save
from pyrovae.conditionals import DiagonalNormal, FloorNormal, FullNormal, StandardNormal, UnitNormal
from pyrovae.data import Data
from pyrovae.models.hierarchical import GuideKind

KINDS = get_args(GuideKind)
every_kind = pytest.mark.parametrize("kind", KINDS)


def linear(weight: Tensor, bias: Tensor | float, sigma: Tensor | float) -> DiagonalNormal:
    """N(weight parents + bias, diag(sigma^2))."""
    out_dim, in_dim = weight.shape
    net = MLP(in_dim, 2 * out_dim, hidden=())
    with torch.no_grad():
        layer = net.layers[0]
        layer.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
        ones = torch.ones(out_dim)
        layer.bias.copy_(torch.cat([bias * ones, torch.log(sigma * ones)]))
    return DiagonalNormal(net)


def linear_model(a: Tensor, b: Tensor, sigma_1: float, sigma_x: float, shift: float):
    """Priors and likelihood of z2 ~ N(0, I), z1 ~ N(A z2, s_1^2 I), x ~ N(B z1 + shift, s_x^2 I)."""
    return [linear(a, 0.0, sigma_1), StandardNormal(a.shape[1])], linear(b, shift, sigma_x)


def exact_log_prob(x: Tensor, a: Tensor, b: Tensor, sigma_1: float, sigma_x: float, shift: float) -> Tensor:
    covariance = b @ (a @ a.T + sigma_1**2 * torch.eye(len(a))) @ b.T + sigma_x**2 * torch.eye(len(b))
    return torch.distributions.MultivariateNormal(torch.full((len(b),), shift), covariance).log_prob(x)


def exact_posteriors(kind: str, a: Tensor, b: Tensor, sigma_1: float, sigma_x: float, shift: float):
    """q of z1 and z2 where A and B are diagonal, `(D,)`, so that every unit is a chain of three numbers."""
    v_1 = a**2 + sigma_1**2  # of z1
    v_x = b**2 * v_1 + sigma_x**2
    given_x = linear((a * b / v_x).diag(), -shift * a * b / v_x, (1 - (a * b) ** 2 / v_x).sqrt())  # of z2
    if kind == "bottom-up":
        first = linear((b * v_1 / v_x).diag(), -shift * b * v_1 / v_x, (v_1 - (b * v_1) ** 2 / v_x).sqrt())
        return [first, linear((a / v_1).diag(), 0.0, (1 - a**2 / v_1).sqrt())]
    if kind == "ladder":  # p(x | z1) as a density of z1
        return [linear((1 / b).diag(), -shift / b, sigma_x / b.abs()), given_x]
    variance = 1 / (1 / sigma_1**2 + b**2 / sigma_x**2)
    of_x = variance * b / sigma_x**2
    weight = torch.cat([(variance * a / sigma_1**2).diag(), of_x.diag()], 1)
    return [linear(weight, -shift * of_x, variance.sqrt()), given_x]


@every_kind
@pytest.mark.usefixtures("float64")
def test_with_the_exact_posterior_every_weight_is_p_of_x(kind):
    a, b, others = torch.tensor([0.8, -1.5, 0.3]), torch.tensor([1.2, 0.4, -0.9]), (0.7, 0.5, 0.6)
    priors, likelihood = linear_model(a.diag(), b.diag(), *others)
    program = HierarchicalVAE(priors, likelihood, exact_posteriors(kind, a, b, *others), kind)
    x = torch.randn(6, 3)
    log_px = exact_log_prob(x, a.diag(), b.diag(), *others)
    assert_close(log_weights(program, x, 20), log_px.expand(20, -1), rtol=0, atol=1e-10)


@every_kind
@pytest.mark.usefixtures("float64")
def test_log_px_of_a_linear_gaussian_hierarchy_is_the_exact_one(kind):
    """By a guide wider than the posterior, whose weights are bounded, so that their standard error holds."""
    a, b, others = torch.tensor([0.8, -1.5, 0.3]), torch.tensor([1.2, 0.4, -0.9]), (0.7, 0.5, 0.6)
    priors, likelihood = linear_model(a.diag(), b.diag(), *others)
    posteriors = exact_posteriors(kind, a, b, *others)
    with torch.no_grad():
        for posterior in posteriors:
            posterior.net.layers[0].bias[3:] += 0.3
    program = HierarchicalVAE(priors, likelihood, posteriors, kind)
    x = program.sample(50)
    result = evaluate(program, x, 2000, seed=1, progress=False)
    error = (result.log_px - exact_log_prob(x, a.diag(), b.diag(), *others)).abs() / result.standard_error
    assert (result.standard_error > 1e-3).all()
    assert (error < 5).all(), f"seeds 0, 1: {error.max()} standard errors"


@pytest.mark.usefixtures("float64")
def test_the_ladder_multiplies_densities():
    """q(z1 | z2, x) on a grid is q^(z1 | x) p(z1 | z2) over its integral."""
    program = HierarchicalVAE.mlp(4, (1, 2), ((5,), (5,)), guide_kind="ladder")
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, 4)
    trace = pyro.poutine.trace(program.guide).get_trace(x)
    z2, posterior = trace.nodes["z2"]["value"], trace.nodes["z1"]["fn"]
    grid = torch.linspace(-15, 15, 20_001)
    z1 = grid[:, None, None]
    product = program.posteriors[0](x).log_prob(z1) + program.priors[0](z2).log_prob(z1)
    normalized = product - torch.log(torch.trapezoid(product.exp(), grid, dim=0))
    near = normalized > -50
    assert_close(posterior.log_prob(z1)[near], normalized[near], rtol=0, atol=1e-8)


@pytest.mark.usefixtures("float64")
def test_product_of_normals_by_hand():
    first, second = torch.tensor([[2.0, math.log(1.0)]]), torch.tensor([[-1.0, math.log(0.5)]])
    expected = torch.tensor([[(2 - 4) / 5, -math.log(5) / 2]])  # precisions 1 and 4
    assert_close(reference.product_of_normals(first, second), expected)


@every_kind
def test_the_ladder_and_others_stay_finite_at_extreme_scales(kind):
    program = HierarchicalVAE.mlp(4, (3, 2), ((5,), (5,)), guide_kind=kind)
    with torch.no_grad():
        program.posteriors[0].net.layers[-1].bias[3:] = torch.tensor([-40.0, 0.0, 40.0])
    trace = pyro.poutine.trace(program.guide).get_trace(torch.zeros(2, 4))
    assert torch.isfinite(trace.log_prob_sum())


@every_kind
def test_one_layer_is_the_vae(kind):
    vae = VAE.mlp(6, 3, (8, 7))
    program = HierarchicalVAE([vae.prior], vae.likelihood, [vae.posterior], kind)
    x = (torch.rand(5, 6) > 0.5).float()
    weights = []
    for each in (vae, program):
        torch.manual_seed(1)
        weights.append(log_weights(each, x, 4))
    assert torch.equal(*weights)
    torch.manual_seed(2)
    first = VAE.mlp(6, 3, (8, 7)).state_dict().values()
    torch.manual_seed(2)
    second = HierarchicalVAE.mlp(6, (3,), [(8, 7)], guide_kind=kind).state_dict().values()
    assert sorted(map(str, first)) == sorted(map(str, second))


def test_by_default_it_is_the_two_layer_network_of_burda_et_al():
    program = HierarchicalVAE.mlp(784)
    p_x, p_z1, q_z1, q_z2 = (
        (part.net.in_dim, part.net.hidden, part.net.out_dim, part.net.activation)
        for part in (program.likelihood, program.priors[0], *program.posteriors)
    )
    assert p_x == (100, (200, 200), 784, "tanh")
    assert p_z1 == (50, (100, 100), 200, "tanh")
    assert q_z1 == (784, (200, 200), 200, "tanh")
    assert q_z2 == (100, (100, 100), 100, "tanh")
    assert isinstance(program.priors[1], StandardNormal)
    assert program.guide_kind == "bottom-up"


@pytest.mark.parametrize(("kind", "first"), [("top-down", 784 + 50), ("ladder", 784)])
def test_top_down_networks_have_the_same_layers_between_x_and_each_latent(kind, first):
    q_z1, q_z2 = (part.net for part in HierarchicalVAE.mlp(784, guide_kind=kind).posteriors)
    assert (q_z1.in_dim, q_z1.hidden, q_z1.out_dim) == (first, (200, 200), 200)
    assert (q_z2.in_dim, q_z2.hidden, q_z2.out_dim) == (784, (200, 200, 100, 100), 100)


@every_kind
def test_active_units_are_counted_for_each_layer(kind, tmp_path):
    program = HierarchicalVAE.mlp(6, (3, 2), ((7,), (7,)), guide_kind=kind)
    x = (torch.rand(40, 6) > 0.5).float()
    with torch.no_grad():
        program.posteriors[1].net.layers[-1].weight.zero_()
    assert evaluate(program, x, 200, seed=0, progress=False).active_units["z2"] == 0
    with torch.no_grad():
        program.posteriors[1].net.layers[-1].weight[0] = 5.0
    result = evaluate(program, x, 200, seed=0, progress=False)
    assert set(result.active_units) == {"z1", "z2"}
    assert result.active_units["z2"] == 1
    save(program, tmp_path / "weights")
    again = load(tmp_path / "weights")
    assert isinstance(again, HierarchicalVAE)
    assert again.guide_kind == kind


@every_kind
def test_reference_and_trace_elbo_are_compared(kind):
    program = HierarchicalVAE.mlp(6, (3, 2), ((7,), (7,)), guide_kind=kind).double()
    comparison = compare(program, Data((torch.rand(5, 6) > 0.5).double()), (1, 10), seed=0, progress=False)
    assert comparison.difference < 1e-12


def test_no_reference_where_a_family_has_none():
    class Mine(DiagonalNormal):
        pass

    posterior = Mine(MLP(6, 4))
    program = HierarchicalVAE([StandardNormal(2)], DiagonalNormal.mlp(2, 6), [posterior])
    assert program.reference_elbo(torch.zeros(3, 6), z1=torch.zeros(3, 2)) is None


def ladder_of(prior, posterior):
    return HierarchicalVAE(
        [prior, StandardNormal(2)], UnitNormal.mlp(3, 6), [posterior, FullNormal.mlp(6, 2)], "ladder"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HierarchicalVAE([], UnitNormal.mlp(3, 6), []), "lists of one common length, at least 1; got 0 and 0"),
        (
            lambda: HierarchicalVAE([StandardNormal(2)], UnitNormal.mlp(2, 6), []),
            "Expected priors and posteriors to be lists of one common length, at least 1; got 1 and 0",
        ),
        (lambda: HierarchicalVAE.mlp(6, (), ()), "Expected z_dims and hidden to have one common length.*got 0 and 0"),
        (lambda: HierarchicalVAE.mlp(6, (3, 2), ((5,),)), "Expected z_dims and hidden .* got 2 and 1"),
        (
            lambda: HierarchicalVAE.mlp(6, (3, 2), guide_kind="sideways"),
            "Expected guide_kind to be one of bottom-up, top-down, ladder; got 'sideways'",
        ),
        (
            lambda: ladder_of(FloorNormal.mlp(2, 3), DiagonalNormal.mlp(6, 3)),
            "Expected priors of a ladder below its top to be of DiagonalNormal; got FloorNormal",
        ),
        (
            lambda: ladder_of(DiagonalNormal.mlp(2, 3), FullNormal.mlp(6, 3)),
            "Expected posteriors of a ladder below its top to be of DiagonalNormal; got FullNormal",
        ),
        (lambda: HierarchicalVAE.mlp(6, (3, 0)), "got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_families_at_the_top_of_a_ladder_and_elsewhere():
    ladder = ladder_of(DiagonalNormal.mlp(2, 3), DiagonalNormal.mlp(6, 3))
    assert log_weights(ladder, torch.randn(4, 6), 3).shape == (3, 4)
    program = HierarchicalVAE(
        [FullNormal.mlp(2, 3), StandardNormal(2)],
        UnitNormal.mlp(3, 6),
        [FullNormal.mlp(2 + 6, 3), FullNormal.mlp(6, 2)],
        "top-down",
    )
    comparison = compare(program.double(), torch.randn(4, 6).double(), 1, seed=0, progress=False)
    assert comparison.difference < 1e-12
