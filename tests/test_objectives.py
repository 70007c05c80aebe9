"""Compiled ELBOs: losses, gradients and noise are those of their namesakes in Pyro, call after call."""

import copy
import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.distributions import constraints
from pyro.distributions.testing.fakes import NonreparameterizedGamma, NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae import IWAE_ELBO, STL_ELBO, FreeBits_ELBO, LatentModel, as_program
from pyrovae.compiled import CompileError
from pyrovae.objectives import (
    CompiledFreeBits_ELBO,
    CompiledIWAE_ELBO,
    CompiledLoss,
    CompiledSTL_ELBO,
    CompiledTrace_ELBO,
    CompiledTraceEnum_ELBO,
    CompiledTraceMeanField_ELBO,
)

TRACE = (CompiledTrace_ELBO, Trace_ELBO)
MEAN_FIELD = (CompiledTraceMeanField_ELBO, TraceMeanField_ELBO)
ENUM = (CompiledTraceEnum_ELBO, TraceEnum_ELBO)
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}

float64 = pytest.mark.usefixtures("float64")


class Step(NamedTuple):
    """What a call gives: the loss, all gradients, and the random state after."""

    loss: float
    grads: dict[str, Tensor | None]
    noise: Tensor


def stored():
    return dict(pyro.get_param_store().named_parameters())


def stepped(elbo, model, guide, *args, params=None, seed=1):
    """`loss_and_grads` under known noise."""
    params = stored() if params is None else dict(params)
    for p in params.values():
        p.grad = None
    torch.manual_seed(seed)
    loss = elbo.loss_and_grads(model, guide, *args)
    return Step(loss, {name: p.grad for name, p in params.items()}, torch.get_rng_state())


def differentiated(elbo, model, guide, *args, params=None, seed=1, divide=1, **batch):
    """The module form, `elbo(model, guide)`, under known noise."""
    params = stored() if params is None else dict(params)
    for p in params.values():
        p.grad = None
    torch.manual_seed(seed)
    loss = elbo(model, guide)(*args, **batch)
    (loss / divide).backward()
    return Step(loss.item(), {name: p.grad for name, p in params.items()}, torch.get_rng_state())


def assert_near(ours, theirs, name=""):
    """Equal up to rounding, relative to the size of the tensor."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    tolerance = ROUNDING[theirs.dtype] * max(1.0, theirs.detach().abs().max().item())
    assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def assert_same(ours, theirs):
    assert type(ours.loss) is type(theirs.loss)
    assert math.isfinite(theirs.loss)
    assert_near(ours.loss, theirs.loss, "loss")
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        assert (ours.grads[name] is None) == (grad is None), name
        if grad is not None:
            assert_near(ours.grads[name], grad, name)
    assert torch.equal(ours.noise, theirs.noise), "another amount of noise was drawn"


def assert_as_namesake(pair, model, guide, *args, more=(), **settings):
    """The second, compiled call of a program, and calls with other arguments and noise, against the namesake."""
    compiled, plain = (elbo(**settings) for elbo in pair)
    for elbo in (compiled, plain):  # parameters are made, max_plate_nesting is guessed
        elbo.loss_and_grads(model, guide, *args)
    for seed, given in enumerate((args, args, *more)):
        ours = stepped(compiled, model, guide, *given, seed=seed)
        assert_same(ours, stepped(plain, model, guide, *given, seed=seed))
    return compiled


def data(n=4, dim=2, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Every program of the zoo


def assert_as_namesake_on_the_zoo(entry, pair):
    program, batch = entry.make(), entry.batch(5)
    compiled, plain = (elbo() for elbo in pair)
    params = dict(program.named_parameters())
    compiled(program.model, program.guide)(**batch)
    for seed in (1, 2):
        ours = differentiated(compiled, program.model, program.guide, params=params, seed=seed, **batch)
        assert_same(ours, differentiated(plain, program.model, program.guide, params=params, seed=seed, **batch))
    assert compiled.num_traces == 1


def slow_unless(*quick):
    """All programs of the zoo; those that are not named here are slow."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in zoo.PROGRAMS]
    return pytest.mark.parametrize("name", names)


@float64
@slow_unless(
    "VAE DiagonalNormal Bernoulli",
    "VAE UnitNormal DiagonalNormal",
    "VAE FullNormal FullNormal",
    "VAE convolutional",
    "LinearGaussian exact",
    "VAE InverseAutoregressiveFlow",
    "VAE NeuralSplineFlow prior",
    "VAE prior VampPrior",
    "VAE prior EnergyPrior",
    "VAE DiscretizedLogisticMixture",
    "VAE PixelCNN",
    "AuxiliaryVAE",
    "HierarchicalVAE bottom-up",
    "HierarchicalVAE ladder of three",
    "ConditionalVAE",
)
def test_programs_of_the_zoo_have_the_loss_gradients_and_noise_of_the_namesake(name):
    assert_as_namesake_on_the_zoo(zoo.PROGRAMS[name], TRACE)


@float64
@slow_unless("VAE DiagonalNormal Bernoulli", "VAE UnitNormal DiagonalNormal", "LinearGaussian amortized")
def test_programs_of_the_zoo_have_the_analytic_kl_terms_of_the_namesake(name):
    assert_as_namesake_on_the_zoo(zoo.PROGRAMS[name], MEAN_FIELD)


@pytest.mark.parametrize("pair", [TRACE, MEAN_FIELD], ids=["Trace", "TraceMeanField"])
@slow_unless("VAE DiagonalNormal Bernoulli")
def test_programs_of_the_zoo_agree_in_single_precision(name, pair):
    assert_as_namesake_on_the_zoo(zoo.PROGRAMS[name], pair)


BOUNDS = {
    "IWAE": (CompiledIWAE_ELBO, IWAE_ELBO, (3,)),
    "DReG": (CompiledIWAE_ELBO, IWAE_ELBO, (3, "dreg")),
    "STL": (CompiledSTL_ELBO, STL_ELBO, ()),
    "FreeBits": (CompiledFreeBits_ELBO, FreeBits_ELBO, (0.1,)),
}


@float64
@pytest.mark.parametrize("bound", BOUNDS)
@slow_unless("VAE FullNormal Bernoulli", "ConditionalVAE")
def test_programs_of_the_zoo_have_the_bounds_of_their_namesakes(name, bound):
    compiled, plain, settings = BOUNDS[bound]
    assert_as_namesake_on_the_zoo(zoo.PROGRAMS[name], (lambda: compiled(*settings), lambda: plain(*settings)))


# What a program may be made of. Each function returns a model and a guide of x, N x 2.


def two_latents(normal=dist.Normal, gamma=dist.Gamma):
    """a, (z1 -> z2), b -> x, drawn by the guide in another order, each of another shape or kind."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(2) + a.unsqueeze(-1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1[..., 0], 1.0))
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z1 + (z2 * b).unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        scale = pyro.param("scale", lambda: torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", normal(loc + x, scale).to_event(1))
            z2 = pyro.sample("z2", normal((loc * z1).sum(-1), scale))
            pyro.sample("b", gamma(1.0 + z2**2, 1.0 / scale))
        pyro.sample("a", normal(loc.sum(), scale))

    return model, guide


def bernoulli_latent():
    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            z = pyro.sample("z", dist.Normal(on, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * loc, 1.0).to_event(1), obs=x)

    def guide(x):
        logits = pyro.param("logits", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(logits=logits + x).to_event(1))
            pyro.sample("z", dist.Normal(x + on, 1.0).to_event(1))

    return model, guide


def counts_and_simplices():
    """Poisson and categorical latents, by their scores; a Dirichlet one, by its implicit derivative."""

    def model(x):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(share))
            count = pyro.sample("count", dist.Poisson(0.7))
            pyro.sample("x", dist.Normal((kind - count).unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)

    def guide(x):
        share = pyro.param("share_q", lambda: torch.ones(3) / 3, constraint=constraints.simplex)
        rate = pyro.param("rate", lambda: torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("count", dist.Poisson(rate * x[:, 0].exp()))
            pyro.sample("kind", dist.Categorical(share))
        pyro.sample("share", dist.Dirichlet(1 + 5 * share))

    return model, guide


def subsampled():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            loc = pyro.param("loc", lambda: torch.randn(len(x), 2), event_dim=1)
            scale = pyro.param("scale", lambda: torch.rand(len(x), 2) + 0.1, constraint=constraints.positive)
            pyro.sample("z", dist.Normal(loc, scale[rows]).to_event(1))

    return model, guide


def masked(normal=dist.Normal):
    def model(x):
        shift = pyro.param("shift", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", dist.Normal(z + shift, 1.0).mask(x < 1).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 1] > -1):
            pyro.sample("z", normal(loc * x, 1.0).mask(x < 1).to_event(1))

    return model, guide


def scaled(normal=dist.Normal):
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.scale(scale=torch.tensor(5.0)):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("z", normal(loc * x, 1.0).to_event(1))

    return model, guide


def several_plates(normal=dist.Normal):
    """A row's, a column's and a cell's latents."""

    def model(x):
        rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            c = pyro.sample("c", dist.Normal(a + b, 1.0))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
        loc = pyro.param("loc", lambda: torch.randn(3))
        with columns:
            b = pyro.sample("b", normal(loc[0] + x.mean(0), 1.0))
        with rows:
            a = pyro.sample("a", normal(loc[1] + x.mean(1, keepdim=True), 1.0))
        with rows, columns:
            pyro.sample("c", normal(loc[2] * x + a - b, 1.0))

    return model, guide


def mean_field():
    """Global and local latents of several families, in one order in model and guide."""

    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(share * z + rate, 1.0).to_event(1), obs=x)

    def guide(x):
        positive = pyro.param("positive", lambda: torch.rand(4) + 0.5, constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(positive[0], positive[1]))
        pyro.sample("share", dist.Dirichlet(positive[2:]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * positive[0], positive[1]).to_event(1))

    return model, guide


def only_scaled():
    """A minibatch that is told the size of the whole: the plate draws rows, which nobody looks at."""

    def model(x):
        share = pyro.sample("share", dist.Beta(torch.ones(2), 1.0).to_event(1))
        with pyro.plate("data", 100, subsample_size=len(x)):
            count = pyro.sample("count", dist.Poisson(1.0))
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * share + count.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        positive = pyro.param("positive", lambda: torch.rand(2) + 0.5, constraint=constraints.positive)
        pyro.sample("share", dist.Beta(positive, 1.0).to_event(1))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("count", dist.Poisson(x[:, 0].exp()))
            pyro.sample("z", dist.Gamma(positive, 1.0).expand_by([len(x)]).to_event(1))

    return model, guide


def by_score(program):
    return program(NonreparameterizedNormal)


@float64
@pytest.mark.parametrize(
    "make",
    [
        lambda: two_latents(NonreparameterizedNormal, NonreparameterizedGamma),
        counts_and_simplices,
        subsampled,
        only_scaled,
        lambda: by_score(masked),
        lambda: by_score(scaled),
        lambda: by_score(several_plates),
    ],
    ids=[
        "two latents by score",
        "counts and simplices",
        "subsampled",
        "only scaled",
        "masked by score",
        "scaled by score",
        "several plates by score",
    ],
)
def test_programs_of_many_kinds_have_the_loss_gradients_and_noise_of_the_namesake(make):
    compiled = assert_as_namesake(TRACE, *make(), data(), more=[(data(seed=1),), (data(seed=2),)])
    assert compiled.num_traces == 1


@float64
def test_a_bernoulli_latent_has_the_noise_of_the_namesake():
    assert_as_namesake(TRACE, *bernoulli_latent(), data(), more=[(data(seed=1),)])


@float64
@pytest.mark.parametrize("make", [mean_field, masked, scaled])
def test_analytic_kl_terms_are_those_of_the_namesake(make):
    assert_as_namesake(MEAN_FIELD, *make(), data(), more=[(data(seed=1),)])


@float64
@pytest.mark.parametrize(
    ("make", "vectorized"),
    [(masked, True), (lambda: by_score(scaled), False), (lambda: by_score(scaled), True)],
    ids=["vectorized", "by score, in a loop", "by score, vectorized"],
)
def test_several_particles_are_those_of_the_namesake(make, vectorized):
    assert_as_namesake(TRACE, *make(), data(), num_particles=3, vectorize_particles=vectorized, more=[(data(seed=1),)])


@float64
def test_a_loop_over_a_plate_whose_index_is_used_is_refused():
    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(loc, 1.0).to_event(1), obs=x[i])

    def guide(x):
        pass

    compiled = CompiledTrace_ELBO()
    compiled.loss_and_grads(model, guide, data())
    with pytest.raises(CompileError, match="does not depend on values"):
        compiled.loss_and_grads(model, guide, data())


@float64
def test_an_autoguide_has_the_loss_gradients_and_noise_of_the_namesake():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, sigma).to_event(1), obs=x)

    compiled = assert_as_namesake(TRACE, model, AutoNormal(model), data())
    assert compiled.num_traces == 1, "what the guide notes for itself, in the namesake's call between, is no change"


@float64
def test_a_flow_has_the_loss_gradients_and_noise_of_the_namesake():
    model, _ = scaled()
    flow = transforms.affine_autoregressive(2, [5])

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0), [flow]))

    compiled = assert_as_namesake(TRACE, model, guide, data())
    assert compiled.num_traces == 1, "what a transform caches, in the namesake's call between, is no change"


@float64
def test_a_pyro_module_has_the_loss_gradients_and_noise_of_the_namesake():
    model, _ = masked()

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](2, 2)
            self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))

    assert_as_namesake(TRACE, model, Guide(), data(), more=[(data(seed=1),)])


# Labels, x is N x 1


def labels(in_guide, enumerate_="parallel", kl_weight=False):
    """y ~ Categorical(w), x | y ~ Normal; y by enumeration in the guide, or summed out of the model."""
    infer = {"enumerate": enumerate_}

    def model(x, weight=1.0):
        w = pyro.param("w", lambda: torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(3))
        with pyro.plate("data", len(x)), poutine.scale(scale=weight if kl_weight else 1.0):
            y = pyro.sample("y", dist.Categorical(w), infer=infer)
            pyro.sample("x", dist.Normal(loc[y], 1.0), obs=x[:, 0])

    def guide(x, weight=1.0):
        if in_guide:
            logits = pyro.param("logits", lambda: torch.randn(3))
            with pyro.plate("data", len(x)), poutine.scale(scale=weight if kl_weight else 1.0):
                pyro.sample("y", dist.Categorical(logits=logits * x), infer=infer)

    return model, guide


def label_and_latents():
    """An enumerated label, a drawn count and a latent by its score, in the guide."""

    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(3))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            count = pyro.sample("count", dist.Poisson(1.0))
            z = pyro.sample("z", dist.Normal(loc[y] + count, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        logits = pyro.param("logits", lambda: torch.randn(3))
        rate = pyro.param("rate", lambda: torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits * x), infer={"enumerate": "parallel"})
            pyro.sample("count", dist.Poisson(rate))
            pyro.sample("z", NonreparameterizedNormal(logits.sum() + y, 1.0))

    return model, guide


@float64
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: labels(True), {}),
        (lambda: labels(True, "sequential"), {"max_plate_nesting": 1}),
        (lambda: labels(False), {}),
        (label_and_latents, {"num_particles": 3, "vectorize_particles": True}),
    ],
    ids=["parallel", "sequential", "in the model", "with latents"],
)
def test_enumerated_labels_have_the_loss_gradients_and_noise_of_the_namesake(make, settings):
    compiled = assert_as_namesake(ENUM, *make(), data(dim=1), more=[(data(dim=1, seed=1),)], **settings)
    assert compiled.num_traces == 1


@float64
def test_a_sum_over_labels_may_be_weighted_by_an_argument():
    """Must not read the weight: Pyro makes a Python number of it."""
    x = data(dim=1)
    model, guide = labels(False, kl_weight=True)
    assert_as_namesake(ENUM, model, guide, x, 0.5, more=[(x, 0.7)], max_plate_nesting=1)


@float64
def test_costs_of_labels_of_probability_zero_are_left_out():
    """Where q(y) is exactly 0, -log q(y) is infinite: 0 * inf must not reach the loss or its gradients."""
    model, _ = labels(True)
    closed = torch.zeros(4, 3).index_put((torch.arange(4), torch.tensor([0, 1, 2, 0])), torch.tensor(-math.inf))
    one_hot = torch.full((4, 3), -math.inf).index_put((torch.arange(4), torch.tensor([2, 1, 0, 0])), torch.tensor(0.0))

    def guide(x, forbidden):
        logits = pyro.param("logits", lambda: torch.randn(3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits + forbidden), infer={"enumerate": "parallel"})

    x = data(dim=1)
    elbo = assert_as_namesake(
        ENUM, lambda x, _: model(x), guide, x, closed, more=[(x, one_hot), (x, 0 * one_hot.exp())], max_plate_nesting=1
    )
    assert elbo.num_traces == 1


@float64
@pytest.mark.parametrize("pair", [TRACE, MEAN_FIELD, ENUM], ids=["Trace", "TraceMeanField", "TraceEnum"])
def test_the_loss_alone_is_that_of_the_namesake(pair):
    """Must hold for `loss`, as SVI's evaluate_loss calls it, and for `differentiable_loss` without gradients."""
    (model, guide), x = labels(True) if pair is ENUM else masked(), data(dim=1 if pair is ENUM else 2)
    compiled, plain = (elbo(max_plate_nesting=1) for elbo in pair)
    compiled.loss(model, guide, x)
    losses = []
    for elbo in (compiled, plain):
        torch.manual_seed(1)
        losses.append(elbo.loss(model, guide, x))
    assert type(losses[0]) is float
    assert_near(*losses)
    if pair is not ENUM:  # there Pyro itself raises without gradients
        with torch.no_grad():
            torch.manual_seed(1)
            value = compiled(model, guide)(x)
        assert not value.requires_grad
        assert_near(value.item(), losses[1])
    assert all(p.grad is None for p in stored().values())


# Networks with a train and an eval mode


class Network(LatentModel):
    """A VAE with batch normalisation and dropout, and a number that its model reads."""

    def __init__(self, x_dim=2, z_dim=3, plain=False):
        super().__init__()
        self.kl_weight = 1.0
        layers = [] if plain else [nn.BatchNorm1d(5), nn.Dropout(0.4)]
        self.encoder = nn.Sequential(nn.Linear(x_dim, 5), *layers, nn.Tanh(), nn.Linear(5, z_dim))
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(z_dim, x_dim))

    def model(self, x, weight=1.0):
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.encoder[-1].out_features)
            with poutine.scale(scale=self.kl_weight * weight):
                z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, weight=1.0):
        with pyro.plate("data", len(x)), poutine.scale(scale=self.kl_weight * weight):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def registered(network):
    """Model and guide of a network whose parameters Pyro knows."""

    def model(x, weight=1.0):
        pyro.module("network", network)
        network.model(x, weight)

    return model, network.guide


def assert_same_state(ours, theirs):
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            assert_near(ours.state_dict()[name], value, name)
        else:
            assert torch.equal(ours.state_dict()[name], value), name


@float64
def test_train_and_eval_mode_hold_for_batch_norm_and_dropout():
    ours, x = Network(), data(6)
    theirs = copy.deepcopy(ours)
    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    for seed, mode in enumerate((True, True, False, True, False, False, True)):
        for program in (ours, theirs):
            program.train(mode)
        step = differentiated(compiled, ours.model, ours.guide, x, params=ours.named_parameters(), seed=seed)
        assert_same(
            step, differentiated(plain, theirs.model, theirs.guide, x, params=theirs.named_parameters(), seed=seed)
        )
        assert_same_state(ours, theirs)
    assert ours.encoder[1].num_batches_tracked == 4
    assert compiled.num_traces == 2


# In SVI and in one's own loop


def label_vae():
    """A VAE with an enumerated label."""
    encoder, decoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z + y), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=encoder(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(encoder(x) + y, scale).to_event(1))

    return model, guide


@float64
@pytest.mark.parametrize(
    ("pair", "make"),
    [
        (TRACE, lambda: registered(Network(plain=True))),
        (MEAN_FIELD, lambda: registered(Network(plain=True))),
        (ENUM, label_vae),
    ],
    ids=["Trace", "TraceMeanField", "TraceEnum"],
)
def test_svi_stays_together_with_the_namesake_for_200_steps(pair, make):
    x, runs = data(8), []
    for elbo in (pair[0](), pair[1]()):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(*make(), pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
        pyro.set_rng_seed(2)
        losses = [svi.step(x) for _ in range(200)]
        assert isinstance(losses[-1], float)
        losses += [svi.evaluate_loss(x), svi.evaluate_loss(x)]
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        runs.append((torch.tensor(losses), params, torch.get_rng_state()))
    (losses, params, noise), (their_losses, their_params, their_noise) = runs
    assert_close(losses, their_losses, rtol=0, atol=1e-8)
    assert params.keys() == their_params.keys()
    for name, value in their_params.items():
        assert_close(params[name], value, rtol=0, atol=1e-8, msg=name)
    assert torch.equal(noise, their_noise)


@float64
def test_an_elbo_goes_on_after_the_parameter_store_was_cleared():
    """Must learn the parameters that are made anew, and not go on with those that were traced."""
    x, runs = data(), []
    for elbo in (CompiledTrace_ELBO(), Trace_ELBO()):
        model, guide = masked()
        losses = []
        for seed in range(3):
            pyro.clear_param_store()
            torch.manual_seed(seed)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
            losses += [svi.step(x) for _ in range(4)]
        runs.append((torch.tensor(losses), dict(pyro.get_param_store().items())))
    assert_near(runs[0][0], runs[1][0])
    for name, value in runs[1][1].items():
        assert_near(runs[0][1][name], value, name)


@float64
def test_an_optimizer_without_pyro_stays_together_with_the_namesake():
    """Ten epochs with a ragged last batch and a KL weight that moves: two shapes, two traces."""
    batches = data(25).split(10)
    ours = Network(plain=True)
    theirs = copy.deepcopy(ours)
    compiled, step = CompiledTrace_ELBO(), 0
    optimizers = [torch.optim.Adam(program.parameters(), lr=1e-3) for program in (ours, theirs)]
    for _ in range(10):
        for x in batches:
            step += 1
            losses = []
            for program, elbo, optimizer in zip((ours, theirs), (compiled, Trace_ELBO()), optimizers, strict=True):
                optimizer.zero_grad()
                torch.manual_seed(step)
                loss = elbo(program.model, program.guide)(x, step / 30)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert compiled.num_traces == 2
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-8, msg=name)


@float64
def test_arguments_that_require_gradients_get_them():
    """Here data and a KL weight that is a tensor, through losses that are weighted and added up."""
    network = Network(plain=True)
    model, guide = registered(network)
    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    compiled.loss_and_grads(model, guide, data().requires_grad_(), torch.tensor(0.5).requires_grad_())
    for number in range(1, 4):
        grads = []
        for elbo in (compiled, plain):
            x, weight = data(seed=number).requires_grad_(), torch.tensor(number / 3).requires_grad_()
            network.zero_grad()
            torch.manual_seed(number)
            elbo.loss_and_grads(model, guide, x, weight)
            loss = elbo(model, guide)
            (loss(x, weight) / 10 + 2 * loss(x + 1, weight)).backward()
            grads.append([x.grad, weight.grad, *(p.grad for p in network.parameters())])
        for ours, theirs in zip(*grads, strict=True):
            assert_near(ours, theirs)
    assert compiled.num_traces == 1


@float64
@pytest.mark.parametrize("form", ["loss_and_grads", "differentiable_loss"])
def test_arguments_that_were_computed_pass_gradients_on(form):
    """Two arguments from one network: one pass backward through it, not two."""
    net, grads = nn.Sequential(nn.Linear(2, 4), nn.Tanh()), []

    def model(x, shift):
        pyro.param("loc", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    def guide(x, shift):
        loc = pyro.param("loc", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + x - shift, 1.0).to_event(1))

    compiled = CompiledTrace_ELBO()
    for elbo in (compiled, compiled, Trace_ELBO()):
        net.zero_grad()
        torch.manual_seed(1)
        loss = getattr(elbo, form)(model, guide, *net(data()).chunk(2, dim=1))
        if form == "differentiable_loss":
            loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for ours, theirs in zip(grads[1], grads[2], strict=True):
        assert_near(ours, theirs)


# Gradients where they belong


@float64
def test_gradients_are_added_to_those_that_are_there():
    (model, guide), x = masked(), data()
    compiled, totals = CompiledTrace_ELBO(), []
    for elbo in (compiled, compiled, Trace_ELBO()):
        for p in stored().values():
            p.grad = None
        for seed in range(3):
            torch.manual_seed(seed)
            elbo.loss_and_grads(model, guide, x)
        totals.append([p.grad for p in stored().values()])
    for ours, theirs in zip(*totals[1:], strict=True):
        assert_near(ours, theirs)


@float64
def test_gradients_are_added_in_place():
    """Whoever holds a .grad, as a flat view of all gradients does, must see what is added to it."""
    (model, guide), x = masked(), data()
    compiled = CompiledTrace_ELBO()
    for elbo in (Trace_ELBO(), compiled, compiled, compiled):
        before = stored()["loc"].grad if stored() else None
        elbo.loss_and_grads(model, guide, x)
        assert before is None or stored()["loc"].grad is before


@float64
def test_gradients_of_two_parameters_never_share_memory():
    """Must leave b's gradient alone where a's is clipped: the loss is a function of a + b."""

    class Sum(LatentModel):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

        def model(self, x):
            pyro.module("sum", self)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.a + self.b, 1.0).to_event(1), obs=x)

        def guide(self, x):
            pass

    program, x, norms = Sum(), data(), []
    compiled = CompiledTrace_ELBO()
    for elbo in (compiled, compiled, Trace_ELBO()):
        program.zero_grad()
        elbo.loss_and_grads(program.model, program.guide, x)
        nn.utils.clip_grad_norm_(program.parameters(), 1.0)
        norms.append(torch.cat([program.a.grad, program.b.grad]).norm())
    assert_near(norms[1], norms[2])


@float64
def test_networks_that_are_not_declared_get_their_gradients_in_every_call():
    """Pyro's loss_and_grads leaves them alone without a word; a loop of one's own would train nothing at first."""
    net, x = nn.Linear(2, 2), data()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    def guide(x):
        pass

    compiled, grads = CompiledTrace_ELBO(), []
    for _ in range(2):
        net.zero_grad()
        compiled.loss_and_grads(model, guide, x)
        grads.append(net.weight.grad.clone())
    net.zero_grad()
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    for grad in grads:
        assert_near(grad, net.weight.grad)


@float64
def test_hooks_of_parameters_are_honoured():
    """Once for each call, where they came after the trace, until they are removed; before it they are refused."""
    network, x = Network(plain=True), data()
    model, guide = registered(network)
    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    params = dict(network.named_parameters())

    def check(step):
        assert_same(step(compiled, model, guide, x, params=params), step(plain, model, guide, x, params=params))

    early = network.decoder[1].weight.register_hook(lambda grad: 2 * grad)
    compiled.loss_and_grads(model, guide, x)
    with pytest.raises(CompileError, match="without hooks"):
        compiled.loss_and_grads(model, guide, x)
    early.remove()
    late = None
    for change in ("none", "one after the trace", "removed"):
        if change == "one after the trace":
            late = network.decoder[1].bias.register_hook(lambda grad: 3 * grad)
        elif change == "removed":
            late.remove()
        check(stepped)
        check(differentiated)
    called = []
    network.decoder[1].bias.register_post_accumulate_grad_hook(lambda p: called.append(p.grad.clone()))
    check(stepped)
    assert len(called) == 2
    assert_near(*called)


# What changes between calls


@float64
def test_a_parameter_that_is_frozen_stays_as_it_is():
    """In SVI and by its gradient; and one that is freed again, or was frozen at the trace, learns."""
    x, weights = data(), []
    for elbo in (CompiledTrace_ELBO(), Trace_ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(0)
        network = Network(plain=True).eval()  # in train mode pyro.module warns of what is frozen
        svi = SVI(*registered(network), pyro.optim.Adam({"lr": 0.1}), loss=elbo)
        values = []
        for free in (True, False, True):
            network.decoder[1].weight.requires_grad_(free)
            network.zero_grad()
            for _ in range(3):
                svi.step(x)
            values.append(network.decoder[1].weight.detach().clone())
        weights.append(values)
    for ours, theirs in zip(*weights, strict=True):
        assert_near(ours, theirs)
    assert torch.equal(weights[0][0], weights[0][1])


@float64
@pytest.mark.parametrize("at_first", [True, False], ids=["free at first", "frozen at first"])
def test_gradients_follow_requires_grad(at_first):
    network, x = Network(plain=True).eval(), data()
    args = (*registered(network), x)
    compiled = CompiledTrace_ELBO()
    params = dict(network.named_parameters())
    for free in (at_first, at_first, not at_first, at_first):
        network.decoder[1].weight.requires_grad_(free)
        for step in (stepped, differentiated):
            assert_same(step(compiled, *args, params=params), step(Trace_ELBO(), *args, params=params))


@float64
def test_loaded_weights_and_changed_numbers_are_read():
    network, x = Network(plain=True), data()
    registered_model, guide = registered(network)
    outside = {"temperature": 1.0}

    def model(x):
        with poutine.scale(scale=outside["temperature"]):
            registered_model(x)

    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    compiled.loss_and_grads(model, guide, x)
    params = dict(network.named_parameters())

    def check(num_traces):
        assert_same(stepped(compiled, model, guide, x, params=params), stepped(plain, model, guide, x, params=params))
        assert compiled.num_traces == num_traces

    check(1)
    network.load_state_dict(Network(plain=True).state_dict())
    check(1)
    network.decoder[1].weight.data = torch.randn(2, 3)
    check(1)
    network.kl_weight = 0.5
    check(2)
    outside["temperature"] = 0.25
    check(3)
    network.kl_weight, outside["temperature"] = 1.0, 1.0
    check(3)


@float64
def test_a_parameter_object_may_be_replaced():
    """One that pyro.param does not name: with pyro.module, the store would keep the old one, as Pyro does."""
    net, x = nn.Linear(2, 2), data()
    _, guide = masked()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    compiled.loss_and_grads(model, guide, x)
    for _ in range(2):
        params = dict(net.named_parameters())
        assert_same(stepped(compiled, model, guide, x, params=params), stepped(plain, model, guide, x, params=params))
        net.weight = nn.Parameter(torch.randn(2, 2))


@float64
@pytest.mark.parametrize(("particles", "scale"), [((1, 3), (1.0, 1.0)), ((1, 1), (1.0, 0.3))])
def test_an_elbos_own_settings_and_handlers_around_a_call_may_change(particles, scale):
    (model, guide), x = masked(), data()
    compiled, plain = CompiledTrace_ELBO(), Trace_ELBO()
    compiled.loss_and_grads(model, guide, x)
    for compiled.num_particles, factor in zip(particles, scale, strict=True):
        plain.num_particles = compiled.num_particles
        with poutine.scale(scale=factor):
            assert_same(stepped(compiled, model, guide, x), stepped(plain, model, guide, x))


# Several programs, and whose parameters are whose


@float64
def test_one_elbo_serves_two_programs():
    x = data()
    elbo, plain = CompiledTrace_ELBO(), Trace_ELBO()
    programs = [masked(), scaled()]
    for model, guide in programs:
        elbo.loss_and_grads(model, guide, x)
    for _ in range(2):
        for model, guide in programs:
            assert_same(stepped(elbo, model, guide, x), stepped(plain, model, guide, x))
    assert elbo.num_traces == 2


@float64
def test_functions_as_a_program_run_compiled_in_their_own_scope():
    x = data()
    program, elsewhere = as_program(*masked()), masked()
    Trace_ELBO().loss_and_grads(*elsewhere, 2 * x)  # parameters of the same names, in the global store
    before = {name: p.detach().clone() for name, p in stored().items()}
    with pytest.warns(UserWarning, match="exists in Pyro's global parameter store"), program.scope():
        Trace_ELBO().loss_and_grads(program.model, program.guide, x)
    elbo, plain = CompiledTrace_ELBO(), Trace_ELBO()
    params = dict(program.named_parameters())
    for seed in range(4):
        with program.scope():
            ours = stepped(elbo, program.model, program.guide, x, params=params, seed=seed)
        with program.scope():
            assert_same(ours, stepped(plain, program.model, program.guide, x, params=params, seed=seed))
    assert elbo.num_traces == 1
    assert any(grad is not None for grad in ours.grads.values())
    assert all(torch.equal(p, before[name]) for name, p in stored().items())


# The rest


@float64
def test_a_compiled_loss_is_the_loss_with_its_variables_and_gradients():
    (model, guide), x = masked(), data()
    elbo = Trace_ELBO(num_particles=2)
    elbo.loss_and_grads(model, guide, x)
    loss = CompiledLoss(CompiledTrace_ELBO(num_particles=2), model, guide)
    given = x.clone().requires_grad_()
    torch.manual_seed(1)
    value, variables, grads = loss(given)
    assert {id(variable) for variable in variables} == {id(p) for p in (*stored().values(), given)}
    torch.manual_seed(1)
    theirs = elbo.differentiable_loss(model, guide, given)
    assert_near(value, theirs.detach())
    for grad, other in zip(grads, torch.autograd.grad(theirs, variables), strict=True):
        assert_near(grad, other)
    assert loss.graphs.num_traces == 1


@float64
def test_a_loss_that_cannot_be_compiled_goes_on_uncompiled_where_it_may():
    _, guide = scaled()
    elbo, x = Trace_ELBO(), data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z if z.sum() > 0 else -z, 1.0).to_event(1), obs=x)

    elbo.loss_and_grads(model, guide, x)
    loss = CompiledLoss(elbo, model, guide, compile="auto")
    for seed in range(3):
        torch.manual_seed(seed)
        if seed:
            value, variables, grads = loss(x)
        else:
            with pytest.warns(UserWarning, match=r"Goes on uncompiled\. .*after site 'z'"):
                value, variables, grads = loss(x)
        theirs = stepped(elbo, model, guide, x, seed=seed)
        assert_near(value.item(), theirs.loss)
        assert variables == [stored()["loc"]]
        assert_near(grads[0], theirs.grads["loc"])
        assert torch.equal(theirs.noise, torch.get_rng_state())


def test_a_loss_that_is_not_a_number_is_told():
    (model, guide), x = scaled(), data().float()
    elbo = CompiledTrace_ELBO()
    elbo.loss_and_grads(model, guide, x)
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        assert math.isnan(elbo.loss_and_grads(model, guide, x * math.nan))


def test_a_choice_by_a_value_is_an_error_that_names_the_site_and_the_line():
    def model(x):
        shift = pyro.param("shift", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if z.sum() > 0:  # this line
                z = z + 1
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    _, guide = scaled()
    elbo, x = CompiledTrace_ELBO(), data().float()
    elbo.loss_and_grads(model, guide, x)
    with pytest.raises(CompileError, match=r"after site 'z', at .*test_objectives.py:\d+: if z.sum\(\) > 0") as caught:
        elbo.loss_and_grads(model, guide, x)
    assert "compile=False" in str(caught.value)
    assert set(stored()) == {"shift", "loc"}


@float64
def test_a_parameter_that_only_a_later_call_makes_is_learned_from_then_on():
    """That call runs uncompiled, as the first does."""
    _, guide = scaled()
    late, x = {"on": False}, data()

    def model(x):
        shift = pyro.param("late", lambda: torch.randn(2)) if late["on"] else torch.ones(2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    elbo, plain = CompiledTrace_ELBO(), Trace_ELBO()
    for on in (False, False, True, True, False):
        late["on"] = on
        elbo.loss_and_grads(model, guide, x)
        assert ("late" in pyro.get_param_store()) >= on
        ours = stepped(elbo, model, guide, x)
        assert_same(ours, stepped(plain, model, guide, x))
        assert (ours.grads.get("late") is not None) == on
