"""Every family against the hand-written density at the same eta, in float64."""

import math

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals import (
    Bernoulli,
    Conditional,
    DiagonalNormal,
    FullNormal,
    OneHotCategorical,
    StandardNormal,
    UnitNormal,
    one_hot,
)

DIM = 4
FAMILIES = {
    DiagonalNormal: reference.log_diagonal_normal,
    UnitNormal: reference.log_unit_normal,
    FullNormal: reference.log_full_normal,
    Bernoulli: reference.log_bernoulli,
}
PARENTS = [[(3,)], [(5, 3)], [(2, 5, 3)], [(4, 1, 2), (5, 3)], [(5, 3), (4, 1, 2), (1,)]]

families = pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.__name__)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def perceptron(family: type[Conditional], parents_dim: int = 3) -> Conditional:
    conditional = family.mlp(parents_dim, DIM, hidden=(6,)).double()
    for parameter in conditional.parameters():
        nn.init.normal_(parameter, std=0.5)
    return conditional


def value(family: type[Conditional], *leading: int) -> Tensor:
    x = normal(*leading, DIM)
    return (x > 0).double() if family is Bernoulli else x


class Root(nn.Module):
    """A network of no arguments."""

    def __init__(self, eta: Tensor):
        super().__init__()
        self.eta = nn.Parameter(eta)

    def forward(self) -> Tensor:
        return self.eta


# --- densities -------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("shapes", PARENTS, ids=str)
def test_log_prob_is_the_references(family, shapes):
    parents = [normal(*shape) for shape in shapes]
    conditional = perceptron(family, sum(shape[-1] for shape in shapes))
    leading = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
    distribution, eta, x = conditional(*parents), conditional.eta(*parents), value(family, *leading)
    assert (distribution.batch_shape, distribution.event_shape) == (leading, (DIM,))
    assert_same(distribution.log_prob(x), FAMILIES[family](x, eta))
    several = value(family, 7, *leading)
    assert_same(distribution.log_prob(several), FAMILIES[family](several, eta.expand(7, *eta.shape)))


@pytest.mark.parametrize("shape", [(DIM,), (5, DIM), (2, 5, DIM)])
def test_standard_normal_is_the_references(shape):
    prior, z = StandardNormal(DIM).double(), normal(*shape)
    assert (prior().batch_shape, prior().event_shape) == ((), (DIM,))
    assert_same(prior().log_prob(z), reference.log_standard_normal(z))
    assert prior().sample().dtype == torch.float64
    assert list(prior.parameters()) == []
    assert prior.state_dict() == {}
    assert [family.eta_dim(DIM) for family in (StandardNormal, *FAMILIES)] == [0, 2 * DIM, DIM, 14, DIM]


def test_unit_normals_constant_counts():
    """At its mean, log N(mu; mu, I) = -(D / 2) log 2 pi; a half squared error alone would give 0."""
    mu = normal(5, 3)
    log_prob = UnitNormal(nn.Identity())(mu).log_prob(mu)
    assert_same(log_prob, torch.full((5,), -1.5 * math.log(2 * math.pi), dtype=torch.float64))


@families
def test_in_a_pyro_program(family):
    conditional, parents, x = perceptron(family), normal(5, 3), value(family, 5)

    def model():
        with pyro.plate("data", 5):
            pyro.sample("x", conditional(parents), obs=x)

    site = pyro.poutine.trace(model).get_trace()
    assert_same(site.log_prob_sum(), FAMILIES[family](x, conditional.eta(parents)).sum())


# --- eta: parents, networks, leading dimensions ----------------------------------------------------


@families
def test_parents_are_concatenated_in_their_order(family):
    conditional = perceptron(family, 5)
    a, b = normal(4, 1, 2), normal(5, 3)
    joined = torch.cat([a.expand(4, 5, 2), b.expand(4, 5, 3)], -1)
    assert_same(conditional.eta(a, b), conditional.net(joined))
    assert not torch.allclose(conditional.eta(b, a), conditional.net(joined))


@families
def test_eta_is_read_as_documented(family):
    """eta = (mu, log sigma, L' row by row), (mu, log sigma), mu, or logits."""
    eta = normal(family.eta_dim(DIM))
    found = family(nn.Identity())(eta)
    if family is Bernoulli:
        return assert_same(found.mean, 1 / (1 + torch.exp(-eta)))
    scale = torch.eye(DIM, dtype=torch.float64)
    if family is not UnitNormal:
        scale = torch.diag(eta[DIM : 2 * DIM].exp())
    if family is FullNormal:
        below = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
        for (i, j), entry in zip(below, eta[2 * DIM :], strict=True):
            scale[i, j] = entry
    covariance = found.covariance_matrix if family is FullNormal else torch.diag(found.variance)
    assert_same(covariance, scale @ scale.T)
    return assert_same(found.mean, eta[:DIM])


class Seen(nn.Module):
    """Passes on, and keeps the shape that passed."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape)
        return x


def test_a_network_with_batch_norm_sees_rows():
    norm, seen = nn.BatchNorm1d(6, momentum=1.0), Seen()
    q = DiagonalNormal(nn.Sequential(seen, nn.Linear(3, 6), norm, nn.Tanh(), nn.Linear(6, 8))).double()
    x = normal(2, 5, 3)
    q(x)
    assert seen.shape == (10, 3)
    assert_same(norm.running_mean, q.net[1](x).mean((0, 1)))  # over both leading dimensions at once
    q.eval()
    one_by_one = torch.stack([q.eta(row) for row in x.reshape(10, 3)])
    assert seen.shape == (1, 3)
    for leading in ((10,), (2, 5), (5, 1, 2)):
        assert_same(q.eta(x.reshape(*leading, 3)), one_by_one.reshape(*leading, 8))


@families
def test_a_root_with_parameters(family):
    eta = normal(family.eta_dim(DIM))
    root, x = family(Root(eta)), value(family, 7)
    assert (root().batch_shape, root().event_shape) == ((), (DIM,))
    assert_same(root().log_prob(x), FAMILIES[family](x, eta.expand(7, -1)))


# --- gradients and draws ---------------------------------------------------------------------------


def assert_all_have_gradients(conditional: Conditional) -> None:
    for name, parameter in conditional.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@families
@pytest.mark.parametrize("shapes", [[(5, 3)], [(4, 1, 2), (5, 3)]], ids=str)
def test_gradients_of_log_prob_are_the_references(family, shapes):
    parents, dim = [normal(*shape) for shape in shapes], sum(shape[-1] for shape in shapes)
    conditional, x = perceptron(family, dim), value(family, *torch.broadcast_shapes(*(s[:-1] for s in shapes)))
    conditional(*parents).log_prob(x).sum().backward()
    assert_all_have_gradients(conditional)
    expected = torch.autograd.grad(FAMILIES[family](x, conditional.eta(*parents)).sum(), list(conditional.parameters()))
    for parameter, gradient in zip(conditional.parameters(), expected, strict=True):
        assert_same(parameter.grad, gradient)


@pytest.mark.parametrize("family", [DiagonalNormal, UnitNormal, FullNormal], ids=lambda family: family.__name__)
def test_reparameterized_draws_are_the_references_transform(family):
    """At the noise that the reference finds behind a draw, its transform gives the draw and the same gradients."""
    conditional, parents = perceptron(family), normal(5, 3)
    transform, noise = reference.POSTERIORS[family.__name__]
    z, eta = conditional(parents).rsample(), conditional.eta(parents)
    by_hand, _ = transform(noise(z, eta).detach(), eta)
    assert_same(z, by_hand)
    (z**3).sum().backward()
    assert_all_have_gradients(conditional)
    expected = torch.autograd.grad((by_hand**3).sum(), list(conditional.parameters()))
    for parameter, gradient in zip(conditional.parameters(), expected, strict=True):
        assert_same(parameter.grad, gradient)


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_full_normal_have_mean_mu_and_covariance_l_lt(seed):
    torch.manual_seed(seed)
    n, eta = 100_000, normal(FullNormal.eta_dim(DIM))
    z = FullNormal(Root(eta))().sample((n,))
    scale = torch.diag(eta[DIM : 2 * DIM].exp())
    scale[[1, 2, 2, 3, 3, 3], [0, 0, 1, 0, 1, 2]] = eta[2 * DIM :]
    c = scale @ scale.T
    mean_error = (c.diagonal() / n).sqrt()
    assert ((z.mean(0) - eta[:DIM]).abs() < 5 * mean_error).all(), f"seed {seed}: {z.mean(0)} and {eta[:DIM]}"
    covariance_error = ((c.diagonal().outer(c.diagonal()) + c**2) / n).sqrt()
    assert ((z.T.cov() - c).abs() < 5 * covariance_error).all(), f"seed {seed}: {z.T.cov()} and {c}"


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_bernoulli_have_mean_sigmoid_eta(seed):
    torch.manual_seed(seed)
    n, eta = 100_000, 2 * normal(DIM)
    x, p = Bernoulli(Root(eta))().sample((n,)), torch.sigmoid(eta)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert ((x.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all(), f"seed {seed}: {x.mean(0)} and {p}"


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 6, 7, 8, 10, 13])
def test_eta_of_the_wrong_size_for_full_normal(size):
    with pytest.raises(ValueError, match=rf"FullNormal's network to give 2 D \+ D \(D - 1\) / 2 numbers .*got {size}"):
        FullNormal(nn.Identity())(normal(5, size))


@pytest.mark.parametrize("dim", range(1, 30))
def test_eta_of_the_right_size_for_full_normal(dim):
    assert FullNormal.eta_dim(dim) == dim * (dim + 3) // 2
    assert FullNormal(nn.Identity())(normal(2, FullNormal.eta_dim(dim))).event_shape == (dim,)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_eta_of_the_wrong_size_for_diagonal_normal(size):
    """An odd number cannot be mu and log sigma; three would broadcast to two means with one sigma."""
    with pytest.raises(ValueError, match=f"Expected .*got {size}"):
        DiagonalNormal(nn.Identity())(normal(5, size))


def test_standard_normal_takes_neither_parents_nor_a_network():
    with pytest.raises(TypeError, match="Expected no parents for StandardNormal; got 2"):
        StandardNormal(DIM)(normal(5, 3), normal(5, 2))
    with pytest.raises(TypeError, match=r"Expected StandardNormal\(dim\): it has no parents and no network"):
        StandardNormal.mlp(3, DIM, hidden=(4,))


@pytest.mark.parametrize("dim", [0, -1])
def test_standard_normal_has_a_positive_size(dim):
    with pytest.raises(ValueError, match=f"Expected dim to be a positive whole number; got {dim}"):
        StandardNormal(dim)


@families
def test_parents_that_do_not_fit(family):
    with pytest.raises(ValueError, match=r"Expected the network's input to have shape \(\*, 3\); got \(5, 4\)"):
        perceptron(family)(normal(5, 4))


def test_a_conditional_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Conditional(nn.Identity())


@pytest.mark.parametrize("family", [DiagonalNormal, UnitNormal, FullNormal, Bernoulli])
def test_training_starts_at_the_mean_that_is_given(family):
    mean = torch.tensor([0.2, 0.5, 0.9])
    conditional = family.mlp(4, 3, hidden=(5,))
    assert conditional.start_at(mean) is conditional
    at_zero = conditional(torch.zeros(2, 4))
    torch.testing.assert_close(at_zero.mean, mean.expand(2, 3))
    if family is not Bernoulli:
        torch.testing.assert_close(at_zero.variance, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Expected mean for \d+ outputs; got shape \(2,\)"):
        conditional.start_at(mean[:2])
    with pytest.raises(ValueError, match=r"Expected an MLP as network; got Linear"):
        family(torch.nn.Linear(4, family.eta_dim(3))).start_at(mean)


def test_a_bernoulli_starts_within_reach_of_its_gradients():
    logits = Bernoulli.mlp(4, 2).start_at(torch.tensor([0.0, 1.0])).eta(torch.zeros(4))
    torch.testing.assert_close(logits.sigmoid(), torch.tensor([0.001, 0.999]))


@families
def test_scales_and_correlations_begin_at_one_and_zero_whatever_the_parents(family):
    eta = family.mlp(3, DIM, hidden=(6,), activation="softplus").eta(100 * torch.randn(5, 3))
    assert eta[:, :DIM].abs().min() > 0
    assert torch.equal(eta[:, DIM:], torch.zeros(5, family.eta_dim(DIM) - DIM))


def test_one_hot_vectors_against_the_hand_written_density():
    eta, y = normal(5, DIM), torch.eye(DIM, dtype=torch.float64)[[0, 3, 1, 1, 2]]
    assert_same(OneHotCategorical.mlp(3, DIM, hidden=(6,)).distribution(eta).log_prob(y), reference.log_one_hot(y, eta))
    assert_same(
        OneHotCategorical.uniform(DIM)().log_prob(y.float()).double(), torch.full((5,), -math.log(DIM)).double()
    )
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    start = OneHotCategorical.mlp(3, 4, ()).start_at(probabilities)
    assert torch.allclose(start.distribution(start.net.layers[-1].bias).probs, probabilities)


@pytest.mark.parametrize("y", [torch.zeros(3), torch.eye(3), torch.zeros(3, dtype=torch.bool)])
def test_one_hot_refuses_what_is_no_integer(y):
    with pytest.raises(ValueError, match="Expected labels that are integers"):
        one_hot(y, 3)


def test_one_hot_of_what_is_no_class_is_zero():
    assert one_hot(torch.tensor([[1, 3], [-1, 0]]), 3).tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]]]
