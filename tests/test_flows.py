"""Flows: densities against Jacobians, integrals and draws; what depends on what; what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.distributions.transforms import AffineAutoregressive, AffineCoupling, Permute
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from pyrovae import VAE, LinearGaussian, configuration, fit
from pyrovae.conditionals import (
    Conditional,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveFlow,
    NeuralSplineFlow,
    PlanarFlow,
    RealNVP,
)
from pyrovae.nets import MaskedMLP
from pyrovae.program import MEAN_DRAWS

pytestmark = pytest.mark.usefixtures("float64")
flows = pytest.mark.parametrize("flow", zoo.FLOWS, ids=lambda flow: flow.__name__)
seeds = pytest.mark.parametrize("seed", [0, 1])


def scattered(conditional: Conditional) -> Conditional:
    """Far from where it begins."""
    for parameter in conditional.parameters():
        nn.init.normal_(parameter, std=0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3)
    return conditional


def made(flow, dim: int, parents: int = 0, **more) -> Conditional:
    options = zoo.FLOWS[flow] | {"steps": 3} | more
    return scattered(flow.mlp(parents, dim, (5,), **options) if parents else flow.root(dim, **options))


def least_dim(flow) -> int:
    return 2 if flow in (RealNVP, NeuralSplineFlow) else 1


# --- densities -------------------------------------------------------------------------------------


def bent(distribution, z: Tensor) -> Tensor:
    for transform in distribution.transforms:
        z = transform(z)
    return z


@flows
@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("parents", [0, 4])
def test_log_density_is_that_by_the_jacobians_determinant(flow, more, parents):
    """Of a draw, whose noise is known, and of the same value as if it came from elsewhere."""
    dim = least_dim(flow) + more
    distribution = made(flow, dim, parents)(*[torch.randn(parents)] * bool(parents))
    for _ in range(5):
        z0 = distribution.base_dist.sample()
        z = bent(distribution, z0)
        expected = distribution.base_dist.log_prob(z0) - jacobian(lambda e: bent(distribution, e), z0).slogdet()[1]
        assert bent(distribution, z0).requires_grad
        torch.testing.assert_close(distribution.log_prob(z.clone()), expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(distribution.log_prob(bent(distribution, z0)), expected, rtol=0, atol=1e-8)


def grid(step: float, reach: float) -> Tensor:
    axis = torch.arange(-reach, reach, step) + step / 2
    return torch.cartesian_prod(axis, axis)


@flows
@pytest.mark.parametrize("parents", [0, 4])
def test_densities_integrate_to_one(flow, parents):
    distribution = made(flow, 2, parents)(*[torch.randn(parents)] * bool(parents))
    with torch.no_grad():
        total = distribution.log_prob(grid(0.05, 24.0)).exp().sum().item() * 0.05**2
    assert abs(total - 1) < 1e-3


def p_value_of_draws(draws: Tensor, distribution) -> float:
    """Of the chi-squared test of the numbers of draws in 10 x 10 cells and outside against the density's integrals."""
    fine, cells = grid(0.02, 4.0), 10
    place = lambda z: ((z + 4) / 8 * cells).floor().long()  # noqa: E731
    inside = (draws.abs() < 4).all(-1)
    index, mass = place(fine), distribution.log_prob(fine).exp() * 0.02**2
    expected = torch.zeros(cells**2 + 1).index_add(0, index[:, 0] * cells + index[:, 1], mass)
    expected[-1] = 1 - expected.sum()
    index = place(draws)
    index = torch.where(inside, index[:, 0] * cells + index[:, 1], cells**2)
    found, expected = index.bincount(minlength=cells**2 + 1).double(), expected * len(draws)
    small = expected < 10  # those go together, and with one that is not
    found, expected = (torch.cat([a[~small][1:], (a[small].sum() + a[~small][0])[None]]) for a in (found, expected))
    statistic = ((found - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(found) - 1) / 2), statistic / 2).item()


@flows
@seeds
@torch.no_grad()
def test_draws_have_the_density(flow, seed):
    """Fails once in 10,000 times for a right flow; sees draws that are a tenth too wide."""
    torch.manual_seed(seed)
    distribution = made(flow, 2)()
    draws = distribution.sample((20_000,))
    assert p_value_of_draws(draws, distribution) > 1e-4, f"seed {seed}"
    assert p_value_of_draws(draws.mean(0) + 1.1 * (draws - draws.mean(0)), distribution) < 1e-4, f"seed {seed}"


@flows
@torch.no_grad()
def test_draws_before_the_last_have_their_density_too(flow):
    distribution = made(flow, 3)()
    first, _ = distribution.sample((5,)), distribution.sample((5,))
    torch.testing.assert_close(distribution.log_prob(first), distribution.log_prob(first.clone()))


@flows
def test_shapes_broadcast(flow):
    """Each row of any number of leading dimensions has the density that it has alone."""
    q, parents = made(flow, 3, 4), torch.randn(2, 5, 4)
    distribution = q(parents)
    assert (distribution.batch_shape, distribution.event_shape) == ((2, 5), (3,))
    z = distribution.expand((7, 2, 5)).rsample()
    alone = torch.stack([q(parents[1, i]).log_prob(z[:, 1, i]) for i in range(5)], 1)
    torch.testing.assert_close(distribution.log_prob(z)[:, 1], alone)
    torch.testing.assert_close(distribution.log_prob(z[0, 0, 0])[1, 2], q(parents[1, 2]).log_prob(z[0, 0, 0]))
    root = made(flow, 3)

    def model():
        with pyro.plate("data", 6):
            return pyro.sample("z", root())

    site = pyro.poutine.trace(model).get_trace().nodes["z"]
    assert site["value"].shape == (6, 3)
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), root().log_prob(site["value"].clone()))


# --- against Pyro's own ----------------------------------------------------------------------------


def test_an_inverse_autoregressive_step_is_pyros():
    root = made(InverseAutoregressiveFlow, 4, steps=1)
    net = root.nets[0]

    class Net(nn.Module):
        permutation = torch.arange(4)

        def forward(self, z):
            return net(z, z[..., :0]).unbind(-2)

    theirs = dist.TransformedDistribution(
        root().base_dist, [AffineAutoregressive(Net(), stable=True, sigmoid_bias=0.0)]
    )
    z = torch.randn(6, 4)
    torch.testing.assert_close(root().log_prob(z), theirs.log_prob(z), rtol=0, atol=1e-10)


def test_real_nvp_is_pyros_couplings():
    root = made(RealNVP, 5, steps=2)

    def coupling(net):
        return AffineCoupling(2, lambda a: net(a).unflatten(-1, (2, 3)).unbind(-2), dim=-1)

    flip = Permute(torch.arange(4, -1, -1))
    first, second = map(coupling, root.nets)
    theirs = dist.TransformedDistribution(root().base_dist, [first, flip, second, flip])
    z = torch.randn(6, 5)
    torch.testing.assert_close(root().log_prob(z), theirs.log_prob(z), rtol=0, atol=1e-10)


# --- what depends on what --------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize(("dim", "hidden"), [(1, (3,)), (4, (4,)), (5, (9, 6)), (3, ())])
def test_a_masked_network_sees_exactly_what_comes_before(dim, hidden, context, reverse):
    net, h = MaskedMLP(dim, 2, hidden, context, "tanh", reverse), torch.randn(context)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    seen = jacobian(lambda x: net(x, h), torch.randn(dim)) != 0
    before = torch.ones(dim, dim).triu(1).T.bool()
    assert torch.equal(seen, (before.T if reverse else before).expand(2, dim, dim))
    if context:
        assert bool((jacobian(lambda h: net(torch.randn(dim), h), h) != 0).all())


@pytest.mark.parametrize("flow", [InverseAutoregressiveFlow, MaskedAutoregressiveFlow])
def test_autoregressive_steps_are_triangular_in_turn(flow):
    steps = made(flow, 4, step_hidden=(12,))().transforms
    lower = torch.ones(4, 4).tril().bool()
    for t, step in enumerate(steps):
        seen = jacobian(step, torch.randn(4)) != 0
        assert torch.equal(seen, lower.T if t % 2 else lower)


@pytest.mark.parametrize("flow", [RealNVP, NeuralSplineFlow])
def test_couplings_leave_one_half_alone_in_turn(flow):
    steps = made(flow, 5, step_hidden=(12,))().transforms
    for t, step in enumerate(steps):
        seen = jacobian(step, torch.rand(5)) != 0
        expected = torch.eye(5).bool()
        expected[2:, :2] = True
        assert torch.equal(seen, expected.flip(0, 1) if t % 2 else expected)


@flows
def test_each_datum_has_its_own_flow(flow):
    q, z = made(flow, 3, 4), torch.randn(3, 3)
    seen = jacobian(lambda x: q(x).log_prob(z), torch.randn(3, 4)).abs().sum(-1)
    assert torch.equal(seen > 0, torch.eye(3).bool())


@flows
def test_all_parameters_have_gradients(flow):
    q = made(flow, 3, 4)
    z = q(torch.randn(20, 4)).rsample()
    (q(torch.randn(20, 4)).log_prob(z) + (z**3).sum(-1)).sum().backward()
    assert [name for name, p in q.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- work that is spared, and where training begins ------------------------------------------------


def calls_of_networks(flow: Conditional, run) -> int:
    calls = []
    hooks = [net.register_forward_hook(lambda *_: calls.append(1)) for net in flow.nets]
    run()
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_an_inverse_autoregressive_draw_is_one_pass_and_its_density_none():
    root, other = made(InverseAutoregressiveFlow, 5), torch.randn(5)
    distribution = root()
    assert calls_of_networks(root, lambda: distribution.log_prob(distribution.rsample())) == 3
    assert calls_of_networks(root, lambda: distribution.log_prob(other)) == 3 * 5


def test_a_masked_autoregressive_density_is_one_pass():
    root, z = made(MaskedAutoregressiveFlow, 5), torch.randn(5)
    assert calls_of_networks(root, lambda: root().log_prob(z)) == 3
    assert calls_of_networks(root, lambda: root().sample()) == 3 * 5


def test_training_begins_near_the_gaussian():
    """Gates are near sigmoid(2), shifts near 0."""
    q = InverseAutoregressiveFlow.mlp(784, 20, (50,), steps=1)
    step, eps = q(torch.rand(784)).transforms[0], torch.randn(50, 20)
    torch.testing.assert_close(step(eps), eps * torch.tensor(2.0).sigmoid(), rtol=0, atol=0.15)
    start = q.start_at(torch.arange(20.0))(torch.zeros(784)).base_dist
    torch.testing.assert_close(start.mean, torch.arange(20.0))
    torch.testing.assert_close(start.variance, torch.ones(20))


@flows
def test_a_posterior_of_the_usual_constructor_saves_loads_and_learns(flow):
    vae = VAE.mlp(6, 3, (8,), posterior=flow)
    again = configuration.build(configuration.describe(vae))
    again.load_state_dict(vae.state_dict())
    z, x = torch.randn(4, 3), torch.rand(4, 6)
    assert torch.equal(vae.posterior(x).log_prob(z), again.posterior(x).log_prob(z))


def test_it_comes_closer_to_a_correlated_posterior_than_any_factorized_gaussian():
    """The gap that the best of those leaves is known: -1/2 log det of the correlations in the posterior's precision."""
    torch.manual_seed(0)
    program = LinearGaussian(4, 2, InverseAutoregressiveFlow.mlp(4, 2, (), steps=2, step_hidden=(16,)))
    for parameter in (program.weight, program.bias, program.log_sigma):
        parameter.requires_grad_(False)
    program.weight.copy_(torch.tensor([[1.0, 0.8], [0.8, 1.0], [0.5, 0.5], [1.0, 1.0]]))
    x = program.sample(200)
    precision = program.exact_posterior(x).precision_matrix[0]
    best = -(precision.logdet() - precision.diagonal().log().sum()) / 2
    fit(program, x, epochs=150, batch_size=100, lr=1e-2, seed=0, progress=False)
    q = program.posterior(x)
    with torch.no_grad():
        z = q.rsample((500,))
        gap = (q.log_prob(z) - program.exact_posterior(x).log_prob(z)).mean()
    assert 0 < gap < best / 2, f"seed 0: {gap} and {best}"


def test_the_mean_of_a_flow_is_that_of_the_same_draws_at_every_call():
    """Householder's is known: the reflected mean of the Gaussian."""
    vae = VAE.mlp(6, 3, (8,), posterior=HouseholderFlow)
    scattered(vae.posterior)
    x, state = torch.rand(4, 6), torch.get_rng_state()
    mean = vae.encode(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(mean, vae.encode(x))
    q = vae.posterior(x)
    turned = bent(q, q.base_dist.mean)
    error = (q.sample((2000,)).std(0) / MEAN_DRAWS**0.5).detach()
    assert ((mean - turned).abs() < 5 * error).all(), "seed 0"


# --- what is refused -------------------------------------------------------------------------------


@flows
@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", -1), ("steps", 1.5), ("dim", 0)])
def test_sizes_are_positive(flow, name, value):
    arguments = {"dim": 3, name: value}
    for make in (flow.root, lambda **given: flow.mlp(4, **given)):
        with pytest.raises(ValueError, match=f"Expected {name} to be a positive whole number; got {value}"):
            make(**arguments)


@pytest.mark.parametrize("flow", [RealNVP, NeuralSplineFlow])
def test_one_value_has_no_halves(flow):
    with pytest.raises(ValueError, match="Expected dim to be 2 or more, for one half bends the other; got 1"):
        flow.root(1)


@flows
def test_eta_of_another_size(flow):
    with pytest.raises(
        ValueError, match=rf"Expected {flow.__name__}'s network to give 2 dim \+ context_dim = 6 .*got 5"
    ):
        flow(nn.Identity(), 3, **zoo.FLOWS[flow])(torch.zeros(2, 5))


def test_other_sizes():
    with pytest.raises(ValueError, match="Expected context_dim to be 0 or more; got -1"):
        RealNVP.root(3, context_dim=-1)
    with pytest.raises(ValueError, match="Expected bins to be 2 or more, and below 1000; got 1"):
        NeuralSplineFlow.root(3, bins=1)
    with pytest.raises(ValueError, match=r"Expected hidden layers of at least 3 units, one a degree; got \(2,\)"):
        InverseAutoregressiveFlow.root(4, step_hidden=(2,))
    with pytest.raises(ValueError, match="Expected activation to be one of"):
        InverseAutoregressiveFlow.root(4, step_activation="cosine")
    with pytest.raises(ValueError, match=r"Expected hidden\[0\] to be a positive whole number; got 0"):
        MaskedMLP(3, hidden=(0,))


def test_planar_pushes_stay_invertible_and_gentle():
    """Whatever u and w: w u' > -1, and a value's noise is found to rounding."""
    root = PlanarFlow.root(2, steps=1)
    nn.init.normal_(root.own, std=5.0)
    distribution = root()
    z0 = 3 * torch.randn(1000, 2)
    z = bent(distribution, z0)
    found = distribution.transforms[0].inv(z.clone())
    assert math.isfinite(distribution.log_prob(z.clone()).sum().item())
    torch.testing.assert_close(bent(distribution, found), z, rtol=0, atol=1e-10)
