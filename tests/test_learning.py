"""Ways to learn beside SVI: their gradients by hand, their E-steps, and that each comes to rest where it says."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

from pyrovae import (
    IWAE_ELBO,
    VAE,
    GaussianMixture,
    LatentModel,
    LinearGaussian,
    LocalGuide,
    WakeSleep_ELBO,
    as_program,
    data_plate,
    evaluate,
    fit,
    fit_guide,
    fit_map,
    indexed,
    load,
    mcmc_em,
    posterior_draws,
    reference,
    save,
    variational_em,
)
from pyrovae.conditionals import DiagonalNormal, FullNormal, UnitNormal, VampPrior
from pyrovae.data import Data
from pyrovae.learning.map import _WithPrior, model_parameters
from pyrovae.objectives import CompiledLoss

pytestmark = pytest.mark.usefixtures("float64")
EXACT = {"rtol": 0, "atol": 1e-10}
QUIET = {"seed": 0, "progress": False}


class Helmholtz(LatentModel):
    """A sigmoid belief net, z ~ Bernoulli(a), x | z ~ Bernoulli(W z + b), and q(z | x) of the same kind."""

    def __init__(self, x_dim=4, z_dim=3):
        super().__init__()
        self.prior = nn.Parameter(torch.randn(z_dim))
        self.likelihood, self.posterior = nn.Linear(z_dim, x_dim), nn.Linear(x_dim, z_dim)

    def model(self, x=None):
        with data_plate(x):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            return pyro.sample("x", dist.Bernoulli(logits=self.likelihood(z)).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Bernoulli(logits=self.posterior(x)).to_event(1))

    def log_joint(self, x, z):
        return bernoulli(z, self.prior) + bernoulli(x, self.likelihood(z))

    def log_q(self, z, x):
        return bernoulli(z, self.posterior(x))

    def log_px(self, x):
        z = cube(len(self.prior))
        return self.log_joint(x, z.unsqueeze(1)).logsumexp(0)


def bernoulli(value, logits):
    return (value * logits - softplus(logits)).sum(-1)


def cube(dim):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=dim)))


def gradients(value, program):
    """Those of all parameters by name, zeros where there are none."""
    names, parameters = zip(*program.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def of_elbo(elbo, program, x):
    return gradients(-elbo.differentiable_loss(program.model, program.guide, x=x), program)


# Wake-sleep


def by_hand(program, x, num_particles, phi, log_p, log_q, draw_q, draw_p):
    """What the gradient must be, at the noise of the seed: the guide's draws, then a dream."""
    with torch.no_grad():
        z = draw_q()
        dream = None if phi == "wake" else draw_p()
    log_w = (log_p(x, z) - log_q(z, x)).detach().reshape(num_particles, len(x))
    v = log_w.exp() / log_w.exp().sum(0)
    share = {"sleep": (1, 0), "wake": (0, 1), "both": (0.5, 0.5)}[phi]
    value = (v * log_p(x, z)).sum() + share[1] * (v * log_q(z, x)).sum()
    if dream is not None:
        value = value + share[0] * log_q(*dream).sum()
    return gradients(value, program), log_w.logsumexp(0).sum() - len(x) * math.log(num_particles)


@pytest.mark.parametrize(("num_particles", "phi"), [(1, "sleep"), (4, "sleep"), (4, "wake"), (4, "both")])
@pytest.mark.parametrize("kind", ["Gaussian", "discrete"])
def test_wake_sleep_has_the_gradient_by_hand(kind, num_particles, phi):
    shape = (num_particles, 5) if num_particles > 1 else (5,)
    if kind == "discrete":
        program, x = Helmholtz(), torch.randint(2, (5, 4)).double()
        log_p, log_q = program.log_joint, program.log_q

        def draw_q():
            return dist.Bernoulli(logits=program.posterior(x)).expand([*shape, 3]).sample()

        def draw_p():
            z = dist.Bernoulli(logits=program.prior).expand([5, 3]).sample()
            return z, dist.Bernoulli(logits=program.likelihood(z)).sample()
    else:
        program, x = VAE.mlp(4, 3, (6,), likelihood=UnitNormal), torch.randn(5, 4)
        log_p = lambda x, z: (  # noqa: E731
            reference.log_unit_normal(x, program.likelihood.eta(z)) + reference.log_standard_normal(z)
        )
        log_q = lambda z, x: reference.log_diagonal_normal(z, program.posterior.eta(x).expand(*z.shape[:-1], -1))  # noqa: E731

        def draw_q():
            return program.posterior(x).expand(shape).sample()

        def draw_p():
            z = torch.randn(5, 3)
            return z, program.likelihood(z).sample()

    elbo = WakeSleep_ELBO(num_particles, phi)
    torch.manual_seed(1)
    loss = elbo.differentiable_loss(program.model, program.guide, x=x)
    ours = gradients(-loss, program)
    torch.manual_seed(1)
    theirs, bound = by_hand(program, x, num_particles, phi, log_p, log_q, draw_q, draw_p)
    assert_close(-loss.detach(), bound, **EXACT)
    for name in theirs:
        assert_close(ours[name], theirs[name], **EXACT, msg=name)
    torch.manual_seed(1)
    assert math.isclose(elbo.loss(program.model, program.guide, x=x), loss.item(), rel_tol=1e-12)


def assert_mean(found, expected, name):
    """Monte Carlo, in units of 5 standard errors; seed 0."""
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-12).all(), f"{name}, seed 0"
    assert (error < 0.2 * expected.abs().max()).all(), f"{name}: too noisy to tell"


@pytest.mark.parametrize("phi", ["sleep", "wake"])
def test_the_expected_gradient_is_that_of_all_latents_enumerated(phi):
    """Sums over every z, every pair (z_1, z_2) and every dream, by hand."""
    program, x, num_particles = Helmholtz(3, 2), torch.tensor([[1.0, 0.0, 1.0]]), 2
    elbo, copies = WakeSleep_ELBO(num_particles, phi), x.repeat(500, 1)
    found = [of_elbo(elbo, program, copies) for _ in range(60)]
    z = cube(2)
    pairs = torch.stack([torch.cat([a, b]) for a, b in itertools.product(z.split(1), repeat=2)], 1)  # (2, 16, 2)
    log_p, log_q = program.log_joint(x, pairs), program.log_q(pairs, x)
    chance, v = log_q.sum(0).exp().detach(), (log_p - log_q).softmax(0).detach()
    value = (chance * v * log_p).sum()
    if phi == "wake":
        value = value + (chance * v * log_q).sum()
    else:
        dreams = [(a.expand(8, -1), cube(3)) for a in z.split(1)]
        value = value + sum((program.log_joint(b, a).exp().detach() * program.log_q(a, b)).sum() for a, b in dreams)
    for name, expected in gradients(value, program).items():
        assert_mean(torch.stack([each[name] / 500 for each in found]), expected, name)


def test_the_helmholtz_machine_becomes_as_likely_as_the_truth():
    """log p(x) is exact, over all 8 latents; wake-sleep alone has no gradient through a draw, and needs none."""
    truth = Helmholtz(6, 3)
    nn.init.normal_(truth.likelihood.weight, std=2.0)
    with torch.no_grad():
        x = truth.sample(400)
        best = truth.log_px(x).mean().item()
    share = x.unique(dim=0, return_counts=True)[1] / 400
    most = (share * share.log()).sum().item()  # no model of all 2^6 data can be likelier
    # q(z | x) is factorized and cannot hold the posterior: what the weights of many draws make up for
    for elbo, gap in ((WakeSleep_ELBO(5), 0.1), (WakeSleep_ELBO(20, "wake"), 0.03), (WakeSleep_ELBO(20, "both"), 0.03)):
        torch.manual_seed(3)
        program = Helmholtz(6, 3)
        assert program.log_px(x).mean().item() < best - 1
        history = fit(program, x, elbo=elbo, epochs=100, lr=lambda epoch: 0.1 * 0.97**epoch, **QUIET)
        after = program.log_px(x).mean().item()
        assert best - gap < after < most, elbo.phi
        assert history[-1]["elbo"] < after
        assert abs(evaluate(program, x, 500, **QUIET).log_px.mean().item() - after) < 0.02


def test_wake_sleep_in_fit_resumes(tmp_path):
    x = torch.randint(2, (30, 4)).double()
    torch.manual_seed(5)
    whole, halves = Helmholtz(), Helmholtz()
    halves.load_state_dict(whole.state_dict())
    settings = {"elbo": WakeSleep_ELBO(3, "both"), "batch_size": 8, **QUIET}
    fit(whole, x, epochs=3, **settings)
    fit(halves, x, epochs=2, run_dir=tmp_path / "run", **settings)
    fit(halves, x, epochs=3, run_dir=tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(value, halves.state_dict()[name]) for name, value in whole.state_dict().items())


def by_tracing(elbo, program, x):
    elbo.differentiable_loss(program.model, program.guide, x=x)
    graphs = CompiledLoss(elbo, program.model, program.guide).graphs
    graphs.trace(frozenset(), x=x)
    return graphs.num_traces


def test_wake_sleep_and_map_can_be_compiled():
    x = torch.randint(2, (5, 4)).double()
    assert by_tracing(WakeSleep_ELBO(3, "both"), Helmholtz(), x) == 1
    program = Helmholtz()
    assert by_tracing(_WithPrior(Trace_ELBO(), [(program.prior, dist.Normal(0.0, 1.0))], 10), program, x) == 1


@pytest.mark.slow
def test_compiled_wake_sleep_reaches_the_same_weights():
    x = torch.randint(2, (30, 4)).double()
    torch.manual_seed(5)
    plain, compiled = Helmholtz(), Helmholtz()
    compiled.load_state_dict(plain.state_dict())
    for program, compile in ((plain, False), (compiled, True)):
        fit(program, x, elbo=WakeSleep_ELBO(3, "both"), epochs=3, compile=compile, **QUIET)
    for name, value in plain.state_dict().items():
        assert_close(value, compiled.state_dict()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_particles"), ((2, "dream"), "phi"), ((1, "wake"), "at least 2"), ((1, "both"), "at least 2")],
)
def test_wake_sleep_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        WakeSleep_ELBO(*arguments)


def test_what_cannot_be_dreamed_is_named():
    class Doubled(Helmholtz):
        def model(self, x=None):
            return super().model(None if x is None else 1 - x)

    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="site 'x', which observes something else"):
        of_elbo(WakeSleep_ELBO(), Doubled(), x)
    of_elbo(WakeSleep_ELBO(2, "wake"), Doubled(), x)

    class Helped(Helmholtz):
        def guide(self, x):
            with data_plate(x):
                pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Bernoulli(logits=self.posterior(x)).to_event(1))

    with pytest.raises(ValueError, match="got a, which the model lacks"):
        of_elbo(WakeSleep_ELBO(), Helped(), x)


# Priors on parameters


def test_the_model_is_told_from_its_guide_by_what_log_p_depends_on():
    x = torch.randint(2, (5, 6)).double()
    vae = VAE.mlp(6, 3, (4,))
    assert set(model_parameters(vae, {"x": x})) == {n for n, _ in vae.named_parameters() if n.startswith("likelihood")}
    linear = LinearGaussian(6, 2)
    assert set(model_parameters(linear, {"x": x})) == {"weight", "bias", "log_sigma"}
    linear.bias.requires_grad_(False)
    assert set(model_parameters(linear, {"x": x})) == {"weight", "log_sigma"}
    q = DiagonalNormal.mlp(6, 3, (4,))
    vamp = VAE(VampPrior(q, 6, 2), vae.likelihood, q)
    assert set(model_parameters(vamp, {"x": x})) == set(dict(vamp.named_parameters()))

    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    state = torch.get_rng_state()
    program = as_program(model, guide)
    (only,) = model_parameters(program, {"x": x[:, 0]})
    assert only.startswith("pyro_params.scale")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("elbo", [None, IWAE_ELBO(3), WakeSleep_ELBO(2, "wake")], ids=["ELBO", "IWAE", "wake"])
def test_the_prior_adds_its_own_gradient_once_an_epoch(elbo, monkeypatch):
    """Over minibatches of unequal size, at fixed theta: sum of gradients = those without prior + d log p(theta)."""
    program, x = VAE.mlp(6, 3, (4,), likelihood=UnitNormal), torch.randn(10, 6)
    prior = {
        "likelihood.net.layers.0.weight": dist.Normal(1.0, 0.5),
        "likelihood.net.layers.2.bias": dist.Laplace(0.0, 2.0),
    }
    sums = {}
    for with_prior in (True, False):
        grads = []

        class Still(torch.optim.SGD):
            def step(self, closure=None):
                grads.append([p.grad.clone() for g in self.param_groups for p in g["params"]])  # noqa: B023

        settings = {"elbo": elbo, "epochs": 1, "batch_size": 4, "optimizer": Still, **QUIET}
        if with_prior:
            fit_map(program, x, prior=prior, **settings)
        else:
            fit(program, x, **settings)
        sums[with_prior] = [torch.stack(each).sum(0) for each in zip(*grads, strict=True)]
        assert len(grads) == 3
    for (name, p), ours, plain in zip(program.named_parameters(), sums[True], sums[False], strict=True):
        p = p.detach()
        by_hand = {"likelihood.net.layers.0.weight": (p - 1) / 0.25, "likelihood.net.layers.2.bias": p.sign() / 2}
        assert_close(ours - plain, by_hand.get(name, torch.zeros_like(p)), **EXACT, msg=name)


@pytest.mark.parametrize(
    "make", [lambda: LinearGaussian(4, 2), lambda: GaussianMixture(4, 3)], ids=["linear", "mixture"]
)
def test_the_loss_is_minus_log_p_of_data_and_parameters(make):
    """The guide being the exact posterior, also where clusters are summed over."""
    program, x = make(), torch.randn(10, 4)
    log_prior = sum(dist.Normal(0.0, 2.0).log_prob(p).sum() for p in model_parameters(program, {"x": x}).values())
    exact = (program.log_prob(x).sum() + log_prior).item()
    history = fit_map(program, x, prior=dist.Normal(0.0, 2.0), epochs=1, batch_size=4, lr=1e-14, **QUIET)
    assert math.isclose(history[0]["loss"], -exact / 10, rel_tol=1e-8)
    assert math.isclose(history[0]["elbo"], program.log_prob(x).mean().item(), rel_tol=1e-8)


def test_map_is_the_mode_in_closed_form():
    """b ~ N(0, tau^2 I):  b = (I + C / (N tau^2))^-1 mean(x),  C the likeliest covariance about this b."""
    x, tau = some_data(3, 1, 60), 0.2
    mean = x.mean(0)
    b = mean
    for _ in range(200):
        covariance = likeliest((x - b).T @ (x - b) / len(x), 1)
        b = torch.linalg.solve(torch.eye(3) + covariance / (len(x) * tau**2), mean)
    program = LinearGaussian(3, 1)
    fit_map(
        program, x, prior={"bias": dist.Normal(0.0, tau)}, epochs=400, batch_size=60, lr=falling(0.05, 400), **QUIET
    )
    assert (b - mean).abs().max() > 0.1
    assert_close(program.bias.detach(), b, rtol=0, atol=2e-3)
    assert_close(covariance_of(program), covariance, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": {"posterior.net.layers.0.bias": dist.Normal(0.0, 1.0)}}, "parameters of the model.*posterior"),
        ({"prior": {"no": dist.Normal(0.0, 1.0)}}, "got one for 'no'"),
        ({"prior": 1.0}, "distribution, or a dict of them; got float"),
        ({"prior": dist.Normal(torch.zeros(7), 1.0)}, r"prior of shape \(4, 3\), or one number's"),
        ({"prior": dist.Normal(torch.zeros(2, 1, 1), 1.0)}, r"got \(2, 1, 1\)"),
        ({"prior": dist.HalfNormal(1.0, validate_args=False)}, "a density as it begins; got HalfNormal"),
        ({"prior": dist.Normal(0.0, 1.0), "labeled": torch.zeros(2, 6)}, "got labeled"),
        ({"prior": dist.Normal(0.0, 1.0), "elbo": 3}, "pyro.infer.ELBO"),
        ({"prior": dist.Normal(0.0, 1.0), "elbo": IWAE_ELBO(), "kl_weight": 0.5}, "kl_weight with an ELBO of Pyro's"),
        ({"prior": dist.Normal(0.0, 1.0), "epochs": 0}, "epochs"),
    ],
)
def test_map_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_map(VAE.mlp(6, 3, (4,)), torch.ones(8, 6), progress=False, **settings)


def test_a_model_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    for run in (lambda p, x: fit_map(p, x, prior=dist.Normal(0.0, 1.0)), mcmc_em):
        with pytest.raises(ValueError, match="a model with parameters to train"):
            run(as_program(model, guide), torch.zeros(3))


# A guide for each datum


class Counts(LatentModel):
    """rate ~ Gamma(2, 1), x | rate ~ Poisson(a rate): p(rate | x) = Gamma(2 + x, 1 + a), p(x) negative binomial."""

    def __init__(self):
        super().__init__()
        self.log_a = nn.Parameter(torch.tensor(0.5))

    def model(self, x=None):
        with data_plate(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            return pyro.sample("x", dist.Poisson(self.log_a.exp() * rate), obs=x)

    def log_px(self, x):
        return dist.GammaPoisson(2.0, torch.exp(-self.log_a)).log_prob(x)


class Plates(LatentModel):
    """Latents of a plate beside the data's, on an interval and on a simplex."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(3))

    def model(self, x=None):
        n = 1 if x is None else len(x)
        with pyro.plate("data", n, dim=-1):
            s = pyro.sample("s", dist.Uniform(0.5, torch.full((2,), 2.0)).to_event(1))
            with pyro.plate("time", 4, dim=-2):
                w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
                pyro.sample("x", dist.Normal((w * self.mu).sum(-1), s[..., 0]), obs=None if x is None else x.T)


def exact_gaussian(program, x):
    q = program.exact_posterior(x)
    return q.mean.detach(), q.covariance_matrix.detach(), q.precision_matrix.detach()


def test_the_e_step_finds_the_mean_field_posterior_in_closed_form():
    """The exact mean, and sigma^2 = 1 / diag(precision); there the gradient is zero in expectation."""
    program, x = LinearGaussian(4, 2), torch.randn(6, 4)
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    local = fit_guide(
        program, x, steps=1500, lr=0.05, elbo=Trace_ELBO(num_particles=16, vectorize_particles=True), **QUIET
    )
    mean, _, precision = exact_gaussian(program, x)
    log_sigma = -precision.diagonal(dim1=-2, dim2=-1).log() / 2
    assert_close(local.mu[0].weight.detach(), mean, rtol=0, atol=0.02)
    assert_close(local.log_sigma[0].weight.detach(), log_sigma.expand(6, 2), rtol=0, atol=0.02)
    assert all(torch.equal(p, before[name]) for name, p in program.named_parameters())
    with torch.no_grad():
        local.mu[0].weight.copy_(mean)
        local.log_sigma[0].weight.copy_(log_sigma)
    batch = indexed(x).tensors
    elbo = Trace_ELBO()
    found = [gradients(elbo.differentiable_loss(local.model, local.guide, **batch), local) for _ in range(500)]
    for name in ("mu.0.weight", "log_sigma.0.weight"):
        values = torch.stack([each[name] for each in found])
        assert (values.mean(0).abs() < 5 * values.std(0) / 500**0.5).all(), "seed 0"


class Logarithm(LatentModel):
    """z ~ LogNormal(0, 1), x | z ~ N(a + log z, s^2): the posterior of log z is Gaussian, and p(x) = N(a, 1 + s^2)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def model(self, x=None):
        with data_plate(x):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(self.a + z.log(), 0.5), obs=x)


def test_a_local_guide_of_constrained_latents_may_be_the_posterior():
    """All weights are then equal, and log p(x) exact with a single draw; without the transform's volume it is not."""
    program, x = Logarithm(), torch.tensor([0.0, 1.0, -3.0])
    local = fit_guide(program, x, steps=400, **QUIET)
    mean, sigma = (x - program.a.detach()) / 1.25, math.sqrt(0.2)
    assert_close(local.mu[0].weight.detach().squeeze(), mean, rtol=0, atol=0.1)
    assert_close(local.log_sigma[0].weight.detach().exp(), torch.full((3, 1), sigma), rtol=0, atol=0.05)
    with torch.no_grad():
        local.mu[0].weight.copy_(mean.unsqueeze(1))
        local.log_sigma[0].weight.fill_(math.log(sigma))
    found = evaluate(local, indexed(x), 2, **QUIET).log_px
    assert_close(found, dist.Normal(program.a.detach(), math.sqrt(1.25)).log_prob(x), **EXACT)
    assert local.sample(3).shape == (3,)
    assert_close(local.encode(indexed(x)), (mean + sigma**2 / 2).exp(), rtol=0.1, atol=0)


def test_the_e_step_begins_where_data_are_likely():
    """Of two modes the one far from the prior's mean holds nearly all of the posterior."""

    class Wells(LatentModel):
        def __init__(self):
            super().__init__()
            self.depth = nn.Parameter(torch.tensor(1.0))

        def model(self, x=None):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                mean = self.depth * ((-20 * (z + 1) ** 2).exp() + (-5 * (z - 0.4) ** 2).exp() / 2)
                return pyro.sample("x", dist.Normal(mean, 0.05), obs=x)

    x = torch.ones(5)
    local = fit_guide(Wells(), x, **QUIET)
    assert_close(local.mu[0].weight.detach().squeeze(), -x, rtol=0, atol=0.1)


def test_plates_and_supports_are_found():
    program, x = Plates(), torch.randn(5, 4)
    local = LocalGuide.of(program, {"x": x})
    shapes = {latent.name: latent.shape for latent in local.latents}
    assert shapes == {"w": (4, 2), "s": (2,)}
    trace = poutine.trace(local.guide).get_trace(**indexed({"x": x}).tensors)
    assert trace.nodes["w"]["value"].shape == (4, 5, 3)
    assert trace.nodes["s"]["value"].shape == (5, 2)
    draws = posterior_draws(program, {"x": x}, 3, warmup=3, **QUIET)
    assert draws["w"].shape == (3, 4, 5, 3)
    assert_close(draws["w"].sum(-1), torch.ones(3, 4, 5))
    assert ((draws["s"] > 0.5) & (draws["s"] < 2)).all()


def test_only_the_rows_of_a_minibatch_move():
    program, x = LinearGaussian(4, 2), torch.randn(6, 4)
    local = LocalGuide.of(program, x)
    with local.sparse() as tables:
        optimizer = torch.optim.SparseAdam(tables, lr=0.1)
        for rows in ([0, 2, 3], [1, 2, 4]):
            before = [table.detach().clone() for table in tables]
            batch = indexed(x).rows(torch.tensor(rows)).tensors
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(local.model, local.guide, **batch).backward(inputs=tables)
            optimizer.step()
            for table, old in zip(tables, before, strict=True):
                moved = (table != old).any(1).nonzero().squeeze(1).tolist()
                assert moved == rows
    history = fit(local, indexed(x), epochs=1, **QUIET)  # and all at once, by plain SVI
    assert math.isfinite(history[0]["elbo"])


def test_a_local_guide_is_saved_and_loaded(tmp_path):
    x = torch.randn(6, 4)
    local, other = (LocalGuide.of(LinearGaussian(4, 2), x) for _ in range(2))
    variational_em(local, x, epochs=2, **QUIET)
    save(local, tmp_path / "local.safetensors")
    load(tmp_path / "local.safetensors", other)
    found = [evaluate(each, indexed(x), 3, **QUIET).log_px for each in (local, other)]
    assert torch.equal(*found)


def test_validation_chooses_the_weights():
    x, val = torch.randn(30, 4), torch.randn(12, 4)
    program, without = LinearGaussian(4, 2), LinearGaussian(4, 2)
    without.load_state_dict(program.state_dict())
    local = LocalGuide.of(program, x)
    settings = {"epochs": 6, "lr": lambda epoch: 0.05 if epoch < 4 else 3.0, **QUIET}
    history = variational_em(local, x, val, **settings)
    best = max(history, key=lambda row: row["val_elbo"])["epoch"]
    assert best < 6
    plain = variational_em(LocalGuide.of(without, x), x, **settings)
    assert [row["elbo"] for row in history] == [row["elbo"] for row in plain]
    assert abs(evaluate(local, indexed(x), 1, **QUIET).elbo.mean().item() - history[best - 1]["elbo"]) < 1e-9


# Chains


def repeated(x, n):
    return x.repeat_interleave(n, 0)


def test_nuts_draws_from_the_exact_posterior():
    """Copies of one datum are independent chains; mean and covariance within 5 standard errors."""
    program, x, n = LinearGaussian(4, 2), torch.randn(2, 4), 600
    draws = posterior_draws(program, repeated(x, n), 1, warmup=60, batch_size=2 * n, **QUIET)["z"]
    for z, mean, covariance in zip(draws[0].split(n), *exact_gaussian(program, x)[:2], strict=False):
        assert ((z.mean(0) - mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all(), "seed 0"
        found = torch.cov(z.T)
        variance = covariance.diagonal()
        error = ((variance.outer(variance) + covariance**2) / n).sqrt()
        assert ((found - covariance).abs() < 5 * error).all(), "seed 0"


def test_nuts_counts_the_volume_of_its_transform():
    program, n = Counts(), 600
    draws = posterior_draws(program, torch.full((n,), 3.0), 1, warmup=60, batch_size=n, **QUIET)["rate"][0]
    posterior = dist.Gamma(torch.tensor(5.0), 1 + program.log_a.detach().exp())
    assert abs(draws.mean() - posterior.mean) < 5 * (posterior.variance / n) ** 0.5, "seed 0"
    error = posterior.variance * ((2 + 6 / 5) / n) ** 0.5  # the kurtosis of Gamma(5) is 3 + 6 / 5
    assert abs(draws.var() - posterior.variance) < 5 * error, "seed 0"


def test_a_program_without_a_guide_learns_by_nuts():
    """The likeliest a of negative binomial counts: E[x] = 2 a."""
    x = dist.GammaPoisson(2.0, 0.5).sample((300,))
    program = Counts()
    settings = {"batch_size": 300, "draws": 3, "warmup": 20}
    mcmc_em(program, x, epochs=60, lr=falling(0.1, 60), **settings, **QUIET)
    exact = x.mean() / 2
    information = 300 * 2 * exact / (1 + exact)  # of log a
    assert abs(program.log_a.item() - exact.log().item()) < 1 / information**0.5


# Where each way comes to rest


def some_data(x_dim, z_dim, n):
    generator = torch.Generator().manual_seed(4)
    weight = torch.linalg.qr(torch.randn(x_dim, z_dim, generator=generator)).Q * torch.linspace(2.0, 1.3, z_dim)
    z, noise = (torch.randn(n, dim, generator=generator) for dim in (z_dim, x_dim))
    return 1 + z @ weight.T + 0.5 * noise


def likeliest(covariance, z_dim):
    """W W^T + s^2 I at maximum likelihood (Tipping and Bishop 1999, eq. 7 and 8)."""
    values, vectors = torch.linalg.eigh(covariance)
    variance = values[:-z_dim].mean()
    leading = vectors[:, -z_dim:]
    return leading @ (values[-z_dim:] - variance).diag() @ leading.T + variance * torch.eye(len(covariance))


def covariance_of(program):
    with torch.no_grad():
        return program.weight @ program.weight.T + (2 * program.log_sigma).exp() * torch.eye(program.x_dim)


def falling(lr, epochs, last=0.02):
    """Constant for half of the epochs, then geometrically down."""
    return lambda epoch: lr * last ** max(0.0, (2 * epoch - epochs) / epochs)


class Affine(nn.Module):
    """mu = A x + c, and a covariance that is the same for all data: what the exact posterior is."""

    def __init__(self, x_dim, z_dim):
        super().__init__()
        self.mean, self.rest = nn.Linear(x_dim, z_dim), nn.Parameter(torch.zeros(z_dim * (z_dim + 1) // 2))

    def forward(self, x):
        return torch.cat([self.mean(x), self.rest.expand(len(x), -1)], -1)


def by_elbo(elbo):
    return lambda p, x, epochs, size, lr: fit(p, x, elbo=elbo, epochs=epochs, batch_size=size, lr=lr, **QUIET)


def by_variational_em(p, x, epochs, size, lr):
    rate = lambda epoch: 2 * lr(epoch)  # noqa: E731
    variational_em(
        LocalGuide.of(p, x), x, steps=3, local_lr=rate, elbo=TraceMeanField_ELBO(), epochs=epochs, batch_size=size,
        lr=lr, **QUIET,
    )  # fmt: skip


def by_map(p, x, epochs, size, lr):
    """A wide prior on W: its shift, O(1/N), is below the tolerance."""
    fit_map(p, x, prior={"weight": dist.Normal(0.0, 10.0)}, epochs=epochs, batch_size=size, lr=lr, **QUIET)


def by_mcmc_em(p, x, epochs, size, lr):
    epochs = epochs // 3
    mcmc_em(
        p,
        x,
        draws=3,
        warmup=20,
        epochs=epochs,
        batch_size=size,
        lr=lambda epoch: lr(3 * epoch),
        **QUIET,
    )


WAYS = {
    "wake-sleep": by_elbo(WakeSleep_ELBO(5)),
    "reweighted wake-sleep": by_elbo(WakeSleep_ELBO(5, "wake")),
    "both phases": by_elbo(WakeSleep_ELBO(5, "both")),
    "variational EM": by_variational_em,
    "MAP": by_map,
    "MCMC-EM": by_mcmc_em,
}
SMALL, LARGE = (3, 1, 200, 240, 100, 0.1), (4, 2, 200, 400, 50, 0.05)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_reaches_the_maximum_of_the_likelihood_in_closed_form(way, size):
    """Of probabilistic PCA: to 0.01 nats in mean log p(x), and to 0.15 of the largest entry in W W^T + s^2 I."""
    x_dim, z_dim, n, epochs, batch_size, lr = size
    x = some_data(x_dim, z_dim, n)
    expected = likeliest(torch.cov(x.T, correction=0), z_dim)
    best = dist.MultivariateNormal(x.mean(0), expected).log_prob(x).mean().item()
    torch.manual_seed(1)
    program = LinearGaussian(x_dim, z_dim, FullNormal(Affine(x_dim, z_dim)))
    assert program.log_prob(x).mean().item() < best - 1
    WAYS[way](program, x, epochs, batch_size, falling(lr, epochs))
    assert best - 0.01 < program.log_prob(x).mean().item() < best + 1e-9
    assert ((covariance_of(program) - expected).abs() < 0.15 * expected.max()).all()


# What all share


def variational(program, x, **settings):
    return variational_em(LocalGuide.of(program, x), x, **settings)


RUNS = {
    "variational_em": lambda p, x: variational(p, x, epochs=2, batch_size=8, **QUIET),
    "mcmc_em": lambda p, x: mcmc_em(p, x, epochs=2, batch_size=8, warmup=3, draws=2, **QUIET),
    "fit_map": lambda p, x: fit_map(p, x, prior=dist.Normal(0.0, 1.0), epochs=2, batch_size=8, **QUIET),
    "fit_guide": lambda p, x: fit_guide(p, x, steps=3, **QUIET),
    "posterior_draws": lambda p, x: posterior_draws(p, x, 2, warmup=2, **QUIET)["z"],
}


def linear_functions():
    """Probabilistic PCA in pyro.param."""

    def model(x):
        weight = pyro.param("weight", lambda: torch.ones(3))
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * weight, sigma).to_event(1), obs=x)

    def guide(x):
        mu = pyro.param("mu", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x @ mu, 1.0))

    return as_program(model, guide, plate="rows")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("make", [lambda: LinearGaussian(3, 1), linear_functions], ids=["class", "functions"])
def test_a_seed_tells_all_and_nothing_is_left_behind(name, make):
    x, found = torch.randn(20, 3), []
    for drawn in (1, 2):
        torch.manual_seed(0)
        program = make()
        torch.manual_seed(drawn)  # the state outside must not enter
        state = torch.get_rng_state()
        program.eval()
        result = RUNS[name](program, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert not program.training
        result = result.state_dict() if isinstance(result, nn.Module) else result
        found.append((result, {key: value.clone() for key, value in program.state_dict().items()}))
    (first, weights), (second, others) = found
    if isinstance(first, list):
        for rows in (first, second):
            assert [row["epoch"] for row in rows] == [1, 2]
            for row in rows:
                del row["seconds"]
        assert first == second
    else:
        assert_close(first, second, rtol=0, atol=0)
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert not pyro.get_param_store().keys()


def test_em_trains_the_model_alone():
    for name in ("variational_em", "mcmc_em"):
        program = VAE.mlp(6, 2, (4,), likelihood=UnitNormal)
        before = {key: value.clone() for key, value in program.state_dict().items()}
        RUNS[name](program, torch.randn(20, 6))
        moved = {key for key, value in program.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == {key for key in before if key.startswith("likelihood")}
    program = linear_functions()
    RUNS["variational_em"](program, torch.randn(20, 3))
    assert any("weight" in key for key in program.state_dict())  # a pyro.param of the program itself


def no_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0).expand([4]).to_event(1), obs=x)


def outside(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)


def moving(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).unsqueeze(-1).expand([len(x), 4]).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["variational_em", "mcmc_em", "fit_guide", "posterior_draws"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Helmholtz(4, 2), "continuous latents; got site 'z', Independent, which is discrete"),
        (lambda: GaussianMixture(4, 3), "got site 'c', OneHotCategorical, which is discrete"),
        (lambda: as_program(no_latents, no_latents), "a program with latents"),
        (lambda: as_program(outside, outside), "site 'z' inside the plate 'data'"),
        (lambda: torch.nn.Linear(4, 2), "a LatentModel; got Linear"),
    ],
    ids=["discrete", "clusters", "no latents", "outside", "no program"],
)
def test_em_refuses_before_anything_runs(name, make, message):
    with pytest.raises(ValueError, match=message):
        RUNS[name](make(), torch.ones(6, 4))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda p, x: variational_em(p, x), "a LocalGuide; got LinearGaussian"),
        (lambda p, x: variational_em(LocalGuide.of(p, x), x[:3]), "the 6 data that the guide is for; got 3"),
        (lambda p, x: variational(p, x, steps=0), "steps"),
        (lambda p, x: variational(p, x, local_lr=-1.0), "local_lr"),
        (lambda p, x: variational(p, x, elbo=3), "pyro.infer.ELBO"),
        (lambda p, x: variational(p, x, elbo=WakeSleep_ELBO()), "no dreams"),
        (lambda p, x: mcmc_em(p, x, draws=0), "draws"),
        (lambda p, x: mcmc_em(p, x, warmup=0), "warmup"),
        (lambda p, x: mcmc_em(p, x, warmup=1.5), "warmup"),
        (lambda p, x: mcmc_em(p, x, epochs=0), "epochs"),
        (lambda p, x: mcmc_em(p, x, lr=0.0), "lr"),
        (lambda p, x: mcmc_em(p, {"y": x}), "a batch for model"),
        (lambda p, x: mcmc_em(p, x.log()), "finite values"),
        (lambda p, x: posterior_draws(p, x, 0), "num_draws"),
        (lambda p, x: fit_guide(p, x, lr=math.nan), "lr"),
        (lambda p, x: fit_guide(p, torch.utils.data.DataLoader(x)), "data in memory"),
        (lambda p, x: LocalGuide(p, [], 0), "num_data"),
    ],
)
def test_em_refuses_settings(run, message):
    with pytest.raises(ValueError, match=message):
        run(LinearGaussian(4, 2), -torch.ones(6, 4))


def test_data_outside_the_support_are_refused():
    for name in ("mcmc_em", "fit_guide"):
        with pytest.raises(ValueError, match="support"):
            RUNS[name](VAE.mlp(4, 2, (3,)), torch.full((6, 4), 0.5))


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError, match="finite"):
        RUNS["mcmc_em"](LinearGaussian(4, 2), torch.full((6, 4), 1e200))


def test_data_drawn_anew_keep_their_numbers():
    data = indexed(Data(torch.rand(5, 4), dynamic=True))
    batches = list(data.batches(2, shuffle=torch.Generator().manual_seed(0)))
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == [0, 1, 2, 3, 4]
    assert indexed(data) is data
    history = variational(VAE.mlp(4, 2, (3,)), data, epochs=2, **QUIET)
    assert math.isfinite(history[-1]["elbo"])


@pytest.mark.parametrize("entry", ["VAE PlanarFlow", "HierarchicalVAE ladder", "AuxiliaryVAE", "ConditionalVAE"])
def test_every_way_takes_the_programs_of_the_zoo(entry):
    entry = zoo.PROGRAMS[entry]
    batch = entry.batch(10)
    for elbo in (WakeSleep_ELBO(), WakeSleep_ELBO(2, "both")):
        assert math.isfinite(fit(entry.make(), batch, elbo=elbo, epochs=1, **QUIET)[0]["elbo"])
    program = entry.make()
    variational(program, batch, epochs=1, **QUIET)
    mcmc_em(program, batch, epochs=1, warmup=2, draws=1, **QUIET)
