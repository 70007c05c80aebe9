"""IWAE, sticking the landing and free bits: by hand, against quadrature, and what their gradients are."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyrovae import (
    IWAE_ELBO,
    STL_ELBO,
    VAE,
    FreeBits_ELBO,
    LatentModel,
    LinearGaussian,
    data_plate,
    reference,
)
from pyrovae.conditionals import DiagonalNormal, FullNormal, StandardNormal, UnitNormal
from pyrovae.data import as_batch
from pyrovae.traces import sample_sites

pytestmark = pytest.mark.usefixtures("float64")
REPARAMETERIZED = {name: entry for name, entry in zoo.PROGRAMS.items() if entry.reparameterized}
everyone = pytest.mark.parametrize("entry", REPARAMETERIZED.values(), ids=REPARAMETERIZED)
EXACT = {"rtol": 0, "atol": 1e-10}


def loss_and_gradients(elbo, program, data, seed=1, model=None):
    """The loss and the gradients of all parameters, zeros where there are none."""
    torch.manual_seed(seed)
    loss = elbo.differentiable_loss(model or program.model, program.guide, **as_batch(data))
    parameters = list(program.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def latents(program, data, num_particles, seed=1):
    """What the guide draws for K particles after this seed, each `(K, N, D)`, as functions of its parameters."""
    torch.manual_seed(seed)
    with pyro.plate("particles", num_particles, dim=-2):
        trace = poutine.trace(program.guide).get_trace(**as_batch(data))
    return {name: site["value"] for name, site in sample_sites(trace).items()}


class Chain(LatentModel):
    """z2 ~ N(0, I), z1 | z2, x | z1; the guide draws z1, and z2 given z1."""

    def __init__(self):
        super().__init__()
        self.p_z2, self.p_z1, self.p_x = StandardNormal(1), DiagonalNormal.mlp(1, 2, (4,)), UnitNormal.mlp(2, 3, (4,))
        self.q_z1, self.q_z2 = DiagonalNormal.mlp(3, 2, (4,)), DiagonalNormal.mlp(2, 1, (4,))

    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            return pyro.sample("x", self.p_x(z1), obs=x)

    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))


# Values


@everyone
@pytest.mark.parametrize("gradient", ["plain", "dreg"])
def test_iwae_is_the_bound_by_hand_for_each_datum(entry, gradient):
    program, batch = entry.make(), entry.batch(4)
    loss, _ = loss_and_gradients(IWAE_ELBO(3, gradient), program, batch)
    each = reference.importance_bound(program.reference_elbo(**batch, **latents(program, batch, 3)))
    assert_close(-loss, each.sum(), **EXACT)
    assert each.shape == (4,)


@everyone
def test_one_particle_is_the_elbo(entry):
    program, batch = entry.make(), entry.batch(4)
    expected, plain = loss_and_gradients(Trace_ELBO(), program, batch)
    loss, grads = loss_and_gradients(IWAE_ELBO(1), program, batch)
    assert_close(loss, expected, **EXACT)
    for ours, theirs in zip(grads, plain, strict=True):
        assert_close(ours, theirs, **EXACT)
    for elbo in (STL_ELBO(), IWAE_ELBO(1, "dreg")):
        assert_close(loss_and_gradients(elbo, program, batch)[0], expected, **EXACT)


@pytest.mark.parametrize(
    "elbo", [IWAE_ELBO(3), IWAE_ELBO(3, "dreg"), STL_ELBO(2), FreeBits_ELBO(0.3, 3)], ids=lambda e: type(e).__name__
)
def test_a_subsampling_scale_stands_outside_the_logarithm(elbo):
    entry = zoo.PROGRAMS["VAE DiagonalNormal Bernoulli"]
    program, x = entry.make(), entry.data(4)
    loss, grads = loss_and_gradients(elbo, program, x)
    torch.manual_seed(1)
    scaled = elbo.differentiable_loss(poutine.scale(program.model, 2.5), poutine.scale(program.guide, 2.5), x)
    assert_close(scaled.detach(), 2.5 * loss, **EXACT)
    for ours, theirs in zip(torch.autograd.grad(scaled, list(program.parameters())), grads, strict=True):
        assert_close(ours, 2.5 * theirs, **EXACT)


def test_a_program_with_plates_of_its_own_and_masks():
    """Weights are formed for each cell of the plate that all sites share, and summed over the others."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.tensor(0.3))

        def model(self, x, mask):
            with pyro.plate("data", x.shape[-1], dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("time", x.shape[0], dim=-2), poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x, mask):
            with pyro.plate("data", x.shape[-1], dim=-1):
                pyro.sample("z", dist.Normal(self.mu * x.sum(0), 0.7))

    program, x = Sequences(), torch.randn(5, 3)
    mask = torch.rand(5, 3) < 0.7
    for vectorized in (True, False):
        torch.manual_seed(1)
        loss = IWAE_ELBO(4, vectorize_particles=vectorized).differentiable_loss(program.model, program.guide, x, mask)
        torch.manual_seed(1)
        q = dist.Normal(program.mu * x.sum(0), 0.7)
        z = q.expand([4, 1, 3]).sample() if vectorized else torch.stack([q.sample() for _ in range(4)]).unsqueeze(1)
        log_w = dist.Normal(0.0, 1.0).log_prob(z)[:, 0] - q.log_prob(z)[:, 0]
        log_w = log_w + (dist.Normal(z, 1.0).log_prob(x) * mask).sum(1)
        assert_close(-loss, (torch.logsumexp(log_w, 0) - math.log(4)).sum(), **EXACT)


def test_latents_that_all_data_share_have_one_weight():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.5, 0.5))

    x = torch.randn(4)
    torch.manual_seed(1)
    loss = IWAE_ELBO(3).differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    z = dist.Normal(0.5, 0.5).expand([3, 1]).sample()
    log_w = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.5, 0.5).log_prob(z)
    log_w = log_w.squeeze(1) + dist.Normal(z, 1.0).log_prob(x).sum(1)
    assert_close(-loss, torch.logsumexp(log_w, 0) - math.log(3), **EXACT)


# Gradients


@pytest.mark.parametrize("posterior", [DiagonalNormal, UnitNormal])
def test_the_doubly_reparameterized_gradient_is_that_by_hand(posterior):
    program, x = VAE.mlp(6, 3, (8,), likelihood=UnitNormal, posterior=posterior), torch.randn(4, 6)
    _, grads = loss_and_gradients(IWAE_ELBO(3, "dreg"), program, x)
    eta = program.posterior.eta(x)
    log_q = {"DiagonalNormal": reference.log_diagonal_normal, "UnitNormal": reference.log_unit_normal}
    log_p = lambda z: (  # noqa: E731
        reference.log_unit_normal(x, program.likelihood.eta(z)) + reference.log_standard_normal(z)
    )
    z = latents(program, x, 3)["z"]
    value = reference.dreg_value(log_p, lambda z: log_q[posterior.__name__](z, eta.expand(3, *eta.shape)), z)
    by_hand = torch.autograd.grad(-value.sum(), list(program.posterior.parameters()))
    bound = reference.importance_bound(program.reference_elbo(x, z))
    of_model = torch.autograd.grad(-bound.sum(), list(program.likelihood.parameters()))
    for (name, _), ours, hand in zip(program.named_parameters(), grads, [*of_model, *by_hand], strict=True):
        assert_close(ours, hand, **EXACT, msg=name)


def small():
    """A linear-Gaussian model of one latent with a guide that is wrong, and one datum."""
    torch.manual_seed(3)
    program = LinearGaussian(2, 1, DiagonalNormal.mlp(2, 1, hidden=()))
    nn.init.normal_(program.posterior.net.layers[-1].weight, std=0.3)
    return program, torch.tensor([[0.7, -1.1]])


def by_quadrature(program, x, num_particles, points=40):
    """The bound's exact gradient: Gauss and Hermite's rule over the noise of all particles."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grids = torch.cartesian_prod(*[torch.tensor(nodes)] * num_particles).reshape(-1, num_particles)
    total = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * num_particles)
    total = total.reshape(-1, num_particles).prod(1)
    mu, log_sigma = program.posterior.eta(x).chunk(2, -1)
    z = mu + log_sigma.exp() * grids.T.unsqueeze(-1)  # (K, points^K, 1), one datum
    elbos = reference.vae_elbo(
        x.expand(len(grids), -1),
        grids.T.unsqueeze(-1),
        posterior_net=program.posterior.eta,
        likelihood_net=program._likelihood_eta,
        likelihood=reference.log_diagonal_normal,
    )
    assert z.shape[:-1] == elbos.shape
    bound = (total * reference.importance_bound(elbos)).sum()
    return torch.autograd.grad(-bound, list(program.parameters()))


def moments(elbo, program, x, repeats=400, copies=100):
    """Mean, and standard error, of the gradients over many draws for one datum."""
    draws = [loss_and_gradients(elbo, program, x.expand(copies, -1), seed=seed)[1] for seed in range(repeats)]
    stacked = [torch.stack(each) / copies for each in zip(*draws, strict=True)]
    return [g.mean(0) for g in stacked], [g.std(0) / repeats**0.5 for g in stacked]


@pytest.mark.parametrize(
    ("elbo", "num_particles"),
    [(IWAE_ELBO(2), 2), (IWAE_ELBO(2, "dreg"), 2), (IWAE_ELBO(3, "dreg"), 3), (STL_ELBO(1), 1), (STL_ELBO(2), 1)],
    ids=["IWAE", "DReG", "DReG 3", "STL", "STL 2"],
)
def test_gradients_are_unbiased_for_the_bounds_own(elbo, num_particles):
    program, x = small()
    exact = by_quadrature(program, x, num_particles)
    means, errors = moments(elbo, program, x)
    for (name, _), mean, error, true in zip(program.named_parameters(), means, errors, exact, strict=True):
        assert (error > 0).any(), name
        assert ((mean - true).abs() < 5 * error + 1e-9).all(), f"{name}, seeds 0 to 399: {mean} {true} {error}"


@pytest.mark.parametrize(
    ("elbo", "plain"), [(STL_ELBO(), Trace_ELBO()), (IWAE_ELBO(4, "dreg"), IWAE_ELBO(4))], ids=["STL", "DReG"]
)
def test_latents_that_hang_on_each_other_have_unbiased_gradients(elbo, plain):
    torch.manual_seed(0)
    program, x = Chain(), torch.tensor([[0.5, -1.0, 2.0]])
    ours, theirs = (moments(each, program, x) for each in (elbo, plain))
    for (name, _), a, a_error, b, b_error in zip(program.named_parameters(), *ours, *theirs, strict=True):
        assert ((a - b).abs() < 5 * torch.hypot(a_error, b_error) + 1e-9).all(), f"{name}, seeds 0 to 399"


@pytest.mark.parametrize("elbo", [STL_ELBO(), IWAE_ELBO(5, "dreg")], ids=["STL", "DReG"])
def test_the_gradient_of_an_exact_guide_has_no_noise_at_all(elbo):
    program, x = LinearGaussian(3, 1, DiagonalNormal.mlp(3, 1, hidden=())), torch.randn(4, 3)
    exact = program.exact_posterior(torch.zeros(1, 3))
    slope = torch.stack([program.exact_posterior(row).mean - exact.mean[0] for row in torch.eye(3)])
    layer = program.posterior.net.layers[-1]
    with torch.no_grad():
        layer.weight[0], layer.bias[0] = slope[:, 0], exact.mean[0, 0]
        layer.bias[1] = exact.covariance_matrix[0, 0, 0].log() / 2
    _, noisy = loss_and_gradients(Trace_ELBO(), program, x)
    _, grads = loss_and_gradients(elbo, program, x)
    of_guide = [name.startswith("posterior") for name, _ in program.named_parameters()]
    assert any(of_guide)
    for is_guide, ours, plain in zip(of_guide, grads, noisy, strict=True):
        if is_guide:
            assert_close(ours, torch.zeros_like(ours), rtol=0, atol=1e-9)
            assert plain.abs().max() > 1e-2


def test_the_signal_of_the_doubly_reparameterized_gradient_does_not_drown():
    """Signal-to-noise in the guide's parameters: that of plain IWAE falls with K, that of DReG rises."""
    program, x = small()

    def ratio(num_particles, gradient):
        means, errors = moments(IWAE_ELBO(num_particles, gradient), program, x, repeats=300, copies=10)
        names = [name for name, _ in program.named_parameters()]
        kept = [i for i, name in enumerate(names) if name.startswith("posterior")]
        signal, noise = (torch.cat([each[i].flatten() for i in kept]) for each in (means, errors))
        return (signal.abs() / (noise * 300**0.5)).mean().item()

    assert ratio(64, "plain") < 0.6 * ratio(2, "plain"), "seeds 0 to 299"
    assert ratio(64, "dreg") > 1.2 * ratio(2, "dreg"), "seeds 0 to 299"


# Free bits


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("nats", [0.0, 0.3, 100.0])
def test_free_bits_are_those_by_hand(nats, groups):
    torch.manual_seed(0)
    program, x = VAE.mlp(6, 4, (8,), likelihood=UnitNormal), torch.randn(5, 6)
    nn.init.normal_(program.posterior.net.layers[-1].weight, std=0.5)
    loss, grads = loss_and_gradients(FreeBits_ELBO(nats, groups), program, x)
    z = latents(program, x, 1)["z"][0]
    mu, log_sigma = program.posterior.eta(x).chunk(2, -1)
    each = -(((z - mu) / log_sigma.exp()) ** 2) / 2 - log_sigma + z**2 / 2
    kl = each.reshape(5, groups, -1).sum(-1)
    by_hand = 5 * reference.free_bits_bound(reference.log_unit_normal(x, program.likelihood.eta(z)), kl, nats)
    assert_close(-loss, by_hand.detach(), **EXACT)
    expected = torch.autograd.grad(-by_hand, list(program.parameters()))
    for ours, hand in zip(grads, expected, strict=True):
        assert_close(ours, hand, **EXACT)


def test_free_bits_below_which_all_is_free_are_an_autoencoder():
    """With lambda beyond every KL its gradient is that of E_q[log p(x | z)] alone."""
    torch.manual_seed(0)
    program, x = VAE.mlp(6, 4, (8,), likelihood=UnitNormal), torch.randn(5, 6)
    _, grads = loss_and_gradients(FreeBits_ELBO(1e6), program, x)
    log_px_z = reference.log_unit_normal(x, program.likelihood.eta(latents(program, x, 1)["z"][0])).sum()
    for ours, hand in zip(grads, torch.autograd.grad(-log_px_z, list(program.parameters())), strict=True):
        assert_close(ours, hand, **EXACT)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE_ELBO(0), "num_particles to be a whole number of at least 1; got 0"),
        (lambda: IWAE_ELBO(2.5), "num_particles to be a whole number"),
        (lambda: IWAE_ELBO(2, "DREG"), "gradient to be one of plain, dreg; got 'DREG'"),
        (lambda: STL_ELBO(-1), "num_particles to be a whole number"),
        (lambda: FreeBits_ELBO(-0.1), "nats to be a number of at least 0; got -0.1"),
        (lambda: FreeBits_ELBO(math.nan), "nats to be a number of at least 0"),
        (lambda: FreeBits_ELBO(1.0, 0), "groups to be a whole number of at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run(elbo, program, x):
    return elbo.differentiable_loss(program.model, program.guide, x)


def test_groups_that_do_not_divide_the_latents():
    program = VAE.mlp(6, 4, (8,))
    with pytest.raises(ValueError, match="groups to divide the 4 latents of site 'z'; got 3"):
        run(FreeBits_ELBO(1.0, 3), program, torch.zeros(2, 6))


def test_groups_of_a_density_that_is_no_product():
    program = VAE.mlp(6, 4, (8,), posterior=FullNormal)
    with pytest.raises(ValueError, match="product over the dimensions of site 'z' for groups=2"):
        run(FreeBits_ELBO(1.0, 2), program, torch.zeros(2, 6))
    assert torch.isfinite(run(FreeBits_ELBO(1.0), program, torch.zeros(2, 6)))


def test_a_latent_that_is_not_reparameterized():
    entry = zoo.LABELED["M2"]
    with pytest.raises(ValueError, match=r"reparameterized latents .* OneHotCategorical at site 'y'"):
        run(IWAE_ELBO(2), entry.make(), entry.data(3))


def test_latents_of_model_and_guide_that_differ():
    other = Chain()
    with pytest.raises(ValueError, match=r"latent sites of the model, \['z1', 'z2'\]; got \['z'\]"):
        STL_ELBO().differentiable_loss(other.model, VAE.mlp(3, 4, (8,)).guide, torch.zeros(2, 3))


def test_sites_of_different_scales():
    program = VAE.mlp(6, 4, (8,))
    with pytest.raises(ValueError, match="one scale for all sites under this bound"):
        IWAE_ELBO(2).differentiable_loss(poutine.scale(program.model, 2.0), program.guide, torch.zeros(2, 6))


def test_a_site_whose_event_was_forgotten():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 1, 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2, 1, 3), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z' to be those of its plates"):
        IWAE_ELBO(1).differentiable_loss(model, guide, torch.zeros(5, 3))
