"""Likelihoods of classes, grey values and pixels in order: normalised, sampled as they say, by hand the same."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
from pyrovae import VAE, reference
from pyrovae.conditionals import (
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    FloorNormal,
    PixelCNN,
)

pytestmark = pytest.mark.usefixtures("float64")
GREYS = torch.arange(256, dtype=torch.float64) / 255
FAMILIES = {
    "FloorNormal": lambda: FloorNormal.mlp(3, 6, (5,), floor=0.2),
    "Categorical": lambda: Categorical.mlp(3, 6, (5,), num_classes=4),
    "ContinuousBernoulli": lambda: ContinuousBernoulli.mlp(3, 6, (5,)),
    "DiscretizedLogisticMixture": lambda: DiscretizedLogisticMixture.mlp(3, 6, (5,), num_components=3),
    "PixelCNN": lambda: PixelCNN.mlp(3, 6, (5,), image_shape=(1, 2, 3), channels=3, num_layers=2, kernel_size=3),
    "PixelCNN colour": lambda: PixelCNN.mlp(3, 6, (5,), image_shape=(3, 1, 2), channels=2, num_layers=1),
}
everyone = pytest.mark.parametrize("name", FAMILIES)
FALSE_ALARM = 3.719  # the normal quantile of 1 - 1e-4, the rate at which a test of draws fails though all is right


def scattered(name, std=0.5):
    family = FAMILIES[name]()
    for parameter in family.parameters():
        nn.init.normal_(parameter, std=std)
    return family


def assert_drawn_from(counts: Tensor, probabilities: Tensor, seed: int) -> None:
    """Pearson's statistic against its quantile by Wilson and Hilferty (1931); rare values are taken together."""
    expected = counts.sum() * probabilities
    rare = expected < 20
    counts, expected = (torch.cat([v[~rare], v[rare].sum().unsqueeze(0)]) for v in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item()
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + FALSE_ALARM * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"seed {seed}; false alarms: 1e-4"


@everyone
@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_log_prob_and_its_gradients_are_those_by_hand(name, leading):
    family, parents = scattered(name), torch.randn(*leading, 3)
    x = family(parents).sample()
    assert (family(parents).batch_shape, family(parents).event_shape, x.dtype) == (leading, (6,), torch.float64)
    by_hand = family.by_hand(reference.LIKELIHOODS)
    ours, hand = family(parents).log_prob(x), by_hand(x, family.eta(parents))
    assert_close(ours, hand, rtol=1e-10, atol=1e-10)
    several = family(parents).sample((7,))
    assert_close(family(parents).log_prob(several)[3], by_hand(several[3], family.eta(parents)), rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value.sum(), list(family.parameters())) for value in (ours, hand)]
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@everyone
def test_every_value_has_its_place_in_a_broadcast(name):
    family, a, b = scattered(name), torch.randn(4, 1, 2), torch.randn(5, 1)
    together = family(a, b)
    x = together.sample()
    one = family(a[2, 0], b[3])
    assert_close(together.log_prob(x)[2, 3], one.log_prob(x[2, 3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "family", [FloorNormal, Categorical, ContinuousBernoulli, DiscretizedLogisticMixture, PixelCNN]
)
def test_a_vae_takes_it_as_it_is(family):
    vae = VAE.mlp(16, 2, (5,), likelihood=family)
    x = vae.sample(3)
    assert x.shape == (3, 16)
    assert vae.likelihood(torch.zeros(3, 2)).log_prob(x).isfinite().all()


@pytest.mark.parametrize("name", ["FloorNormal", "Categorical", "ContinuousBernoulli", "DiscretizedLogisticMixture"])
def test_means_are_those_of_draws(name):
    family, n = scattered(name), 20_000
    p = family(torch.randn(3))
    x = p.sample((n,))
    assert ((x.mean(0) - p.mean).abs() < 5 * x.std(0) / n**0.5).all(), "seed 0"


@pytest.mark.parametrize("name", ["FloorNormal", "Categorical", "ContinuousBernoulli", "DiscretizedLogisticMixture"])
def test_training_starts_at_the_mean_that_is_given(name):
    mean = torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    family = FAMILIES[name]()
    assert family.start_at(mean) is family
    tolerance = 0.05 if name == "DiscretizedLogisticMixture" else 1e-8  # whose ends of 0 and 1 take the rest
    assert_close(family(torch.zeros(3)).mean, mean, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical.mlp(2, 3, num_classes=0), "num_classes|out_dim"),
        (lambda: Categorical(nn.Identity(), 0), "Expected num_classes to be a positive whole number; got 0"),
        (lambda: Categorical(nn.Identity(), 4)(torch.zeros(6)), "C D numbers for C = 4 and some D; got 6"),
        (lambda: FloorNormal(nn.Identity(), 0.0), r"Expected floor to be positive and finite; got 0\.0"),
        (lambda: FloorNormal(nn.Identity())(torch.zeros(3)), "FloorNormal's network to give 2 D numbers .*; got 3"),
        (lambda: DiscretizedLogisticMixture(nn.Identity(), 0), "Expected num_components to be a positive whole number"),
        (lambda: DiscretizedLogisticMixture(nn.Identity(), 2)(torch.zeros(8)), "3 K D numbers for K = 2 .*; got 8"),
        (lambda: PixelCNN.mlp(2, 6), r"Expected image_shape=\(channels, height, width\) of 6 values; got \(1, 2, 2\)"),
        (
            lambda: PixelCNN(nn.Identity(), (2, 3)),
            r"Expected image_shape to be \(channels, height, width\); got \(2, 3\)",
        ),
        (lambda: PixelCNN(nn.Identity(), (1, 2, 3), kernel_size=4), "Expected kernel_size to be odd; got 4"),
        (lambda: PixelCNN(nn.Identity(), (1, 2, 3))(torch.zeros(5)), "a number for each of 6 values; got 5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# of the named family: data that it does not have, and what is said of them
OUTSIDE = {
    "bytes": ("DiscretizedLogisticMixture", torch.full((4, 6), 17.0), "k / 255 for k = 0, ..., 255; got 17"),
    "between bytes": ("DiscretizedLogisticMixture", torch.full((4, 6), 0.5), "k / 255 .*; got 0.5"),
    "half a class": ("Categorical", torch.full((4, 6), 1.5), r"lower_bound=0, upper_bound=3\); got 1.5"),
    "one class more": ("Categorical", torch.full((4, 6), 4.0), r"upper_bound=3\); got 4"),
    "beyond one": ("ContinuousBernoulli", torch.full((4, 6), 1.25), r"upper_bound=1.0\); got 1.25"),
    "grey pixels": ("PixelCNN", torch.full((4, 6), 0.25), r"\{0, 1\}; got 0.25"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_data_of_another_kind_are_refused(case):
    name, bad, message = OUTSIDE[case]
    vae = VAE.mlp(6, 3, (5,))
    vae.likelihood = FAMILIES[name]()
    mixed = torch.zeros(4, 6)
    mixed[2, 4] = bad[0, 0]  # one value among many that are right
    for x in (bad, mixed):
        for verb in (pyrovae.evaluate, pyrovae.fit):
            with pytest.raises(ValueError, match=rf"\['x'\] within the support of site 'x', .*{message}"):
                verb(vae, x.to(torch.get_default_dtype()), progress=False)


# --- classes ---------------------------------------------------------------------------------------


def test_probabilities_of_classes_sum_to_one():
    p = Categorical(nn.Identity(), 3)(3 * torch.randn(5, 6))
    every = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).unsqueeze(1)
    assert_close(p.log_prob(every).exp().sum(0), torch.ones(5), rtol=0, atol=1e-12)
    assert torch.equal(p.log_prob(every), p.log_prob(every.long()))


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_classes(seed):
    torch.manual_seed(seed)
    p = Categorical(nn.Identity(), 5)(torch.randn(5))
    x = p.sample((20_000,))[:, 0]
    assert_drawn_from(torch.bincount(x.long(), minlength=5).double(), p.base_dist.probs[0], seed)


# --- a floor ---------------------------------------------------------------------------------------


def test_no_likelihood_is_above_that_of_the_floor():
    p = FloorNormal(nn.Identity(), 0.2)(torch.tensor([0.3, -1e3]))
    assert p.log_prob(torch.tensor([0.3])).item() == pytest.approx(-math.log(0.2) - math.log(2 * math.pi) / 2)
    line = torch.linspace(-3, 3, 20_001).unsqueeze(-1)
    assert torch.trapezoid(p.log_prob(line).exp(), line[:, 0]).item() == pytest.approx(1, abs=1e-6)


# --- continuous Bernoulli --------------------------------------------------------------------------

LOGITS = [-300.0, -20.0, -3.0, -0.5001, -0.4999, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.4999, 0.5001, 3.0, 20.0, 300.0]


@pytest.mark.parametrize("logit", LOGITS)
def test_the_continuous_bernoulli_integrates_to_one(logit):
    p = ContinuousBernoulli(nn.Identity())(torch.tensor([logit]))
    line = torch.linspace(0, 1, 200_001)
    density = p.log_prob(line.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, line).item() == pytest.approx(1, abs=1e-6)
    assert torch.trapezoid(density * line, line).item() == pytest.approx(p.mean.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_gradient_is_x_less_its_mean_and_its_curvature_is_finite(dtype):
    eta = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    x = torch.rand(len(LOGITS), dtype=dtype)
    p = ContinuousBernoulli(nn.Identity())(eta)
    (gradient,) = torch.autograd.grad(p.log_prob(x), eta, create_graph=True)
    exact = ContinuousBernoulli(nn.Identity())(eta.detach().double()).mean
    assert_close(gradient.double(), x.double() - exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    curvature = torch.autograd.grad(gradient.sum(), eta)[0]
    assert ((curvature < 0) & (curvature > -0.1)).all()


def test_the_continuous_bernoulli_of_torch_is_the_same_where_it_is_right():
    eta, x = torch.linspace(-8, 8, 50), torch.rand(50)
    theirs = torch.distributions.ContinuousBernoulli(logits=eta)
    ours = ContinuousBernoulli(nn.Identity())(eta)
    assert_close(ours.log_prob(x), theirs.log_prob(x).sum(), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(
        lambda eta: ContinuousBernoulli(nn.Identity())(eta).log_prob(x), eta.clone().requires_grad_()
    )


@pytest.mark.parametrize("logit", [-20.0, -1.0, 0.0, 1e-7, 0.3, 5.0])
def test_draws_of_the_continuous_bernoulli(logit):
    x = ContinuousBernoulli(nn.Identity())(torch.tensor([logit])).sample((20_000,))[:, 0]
    edges = torch.linspace(0, 1, 21)
    cdf = edges if logit == 0 else torch.expm1(logit * edges) / math.expm1(logit)
    assert_drawn_from(torch.histc(x, 20, 0, 1), cdf.diff(), 0)


# --- logistics -------------------------------------------------------------------------------------


def logistics(n, num_components=3, scale=2.0):
    eta = torch.randn(n, 3, num_components, 1) * scale
    eta[:, 1] -= 3
    return DiscretizedLogisticMixture(nn.Identity(), num_components)(eta.flatten(1))


@pytest.mark.parametrize("scale", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("num_components", [1, 3])
def test_probabilities_of_grey_values_sum_to_one(num_components, scale):
    p = logistics(20, num_components, scale)
    log_p = p.log_prob(GREYS.reshape(256, 1, 1))
    assert log_p.isfinite().all()
    assert_close(log_p.exp().sum(0), torch.ones(20), rtol=0, atol=1e-10)
    assert_close((log_p.exp() * GREYS.unsqueeze(-1)).sum(0), p.mean[:, 0], rtol=0, atol=1e-10)


def test_single_precision_is_near_double_also_in_the_tails():
    p = logistics(50)
    single = DiscretizedLogisticMixture(nn.Identity(), 3)(
        torch.stack([p.base_dist.mu, p.base_dist.log_s, p.base_dist.log_pi], 1).transpose(2, 3).flatten(1).float()
    )
    greys = GREYS.reshape(256, 1, 1)
    assert_close(single.log_prob(greys.float()).double(), p.log_prob(greys), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_grey_values(seed):
    torch.manual_seed(seed)
    p = logistics(1)
    x = p.sample((50_000,))[:, 0, 0]
    assert p.support.check(x.unsqueeze(-1)).all()
    counts = torch.bincount((x * 255).round().long(), minlength=256).double()
    assert_drawn_from(counts, p.log_prob(GREYS.reshape(256, 1, 1)).exp()[:, 0], seed)


def test_bytes_of_single_precision_are_in_the_support():
    assert logistics(1).support.check(torch.arange(256, dtype=torch.float32).unsqueeze(-1) / 255).all()


# --- pixels ----------------------------------------------------------------------------------------

PIXELS = pytest.mark.parametrize("name", ["PixelCNN", "PixelCNN colour"])


def images(dim=6):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=dim)))


@PIXELS
def test_probabilities_of_images_sum_to_one_and_draws_follow_them(name):
    p = scattered(name, 0.8)(torch.randn(3))
    probabilities = p.log_prob(images()).exp()
    assert_close(probabilities.sum(), torch.ones(()), rtol=0, atol=1e-12)
    index = (p.sample((20_000,)) * 2.0 ** torch.arange(5, -1, -1)).sum(-1).long()
    assert_drawn_from(torch.bincount(index, minlength=64).double(), probabilities, 0)


@PIXELS
def test_a_pixel_sees_those_before_it_and_nothing_else(name):
    family = scattered(name)
    colors, height, width = family.image_shape
    x, eta = torch.rand(6), torch.randn(6)
    jacobian = torch.autograd.functional.jacobian(lambda x: family.logits(x, eta), x)
    order = torch.arange(6).reshape(colors, height * width).T.flatten()  # pixel by pixel, channel by channel
    later = torch.ones(6, 6).triu().bool()
    assert (jacobian[order][:, order][later] == 0).all()
    assert (jacobian[order][:, order].diagonal(-1) != 0).any()


def test_pixels_begin_as_a_bernoulli_decoder_at_the_mean_that_is_given():
    mean = torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    family = FAMILIES["PixelCNN"]().start_at(mean)
    x = images()
    expected = torch.distributions.Bernoulli(mean).log_prob(x).sum(-1)
    assert_close(family(torch.zeros(3)).log_prob(x), expected)
    with pytest.raises(NotImplementedError):
        family(torch.zeros(3)).mean  # noqa: B018
