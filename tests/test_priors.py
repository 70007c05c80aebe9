"""Learned priors: normalised, sampled as they say, their parts where they belong."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
from pyrovae import VAE, ConvEncoder, configuration, fit
from pyrovae.conditionals import (
    AutoregressivePrior,
    Bernoulli,
    DiagonalNormal,
    EnergyPrior,
    FullNormal,
    MixtureOfNormals,
    VampPrior,
)
from pyrovae.nets import MLP, MaskedMLP
from pyrovae.survey import Survey

pytestmark = pytest.mark.usefixtures("float64")


def scattered(prior, std=0.3):
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=std)
    return prior.eval()


PRIORS = {
    "MixtureOfNormals": lambda dim: MixtureOfNormals(dim, 3),
    "VampPrior": lambda dim: VampPrior(DiagonalNormal.mlp(4, dim, (5,)), 4, 3),
    "VampPrior FullNormal": lambda dim: VampPrior(FullNormal.mlp(4, dim, (5,)), 4, 3, unit_interval=False),
    "AutoregressivePrior": lambda dim: AutoregressivePrior(dim, (6,)),
    "EnergyPrior": lambda dim: EnergyPrior.mlp(0, dim, (6,), num_samples=20_000, num_candidates=500),
}
everyone = pytest.mark.parametrize("name", PRIORS)
STEP, CELL = 0.05, 1.0  # of the grid of midpoints, and of the cells in which draws are counted
FALSE_ALARM = 3.719  # the normal quantile of 1 - 1e-4, the rate at which a test of draws fails though all is right


def grid(dim: int) -> Tensor:
    """Midpoints of [-12, 12]^dim, `(M^dim, dim)`."""
    line = torch.arange(-12 + STEP / 2, 12, STEP)
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)


def masses(prior, dim):
    """The grid, and the probability that the density puts about each point."""
    points = grid(dim)
    with torch.no_grad():
        return points, torch.cat([prior().log_prob(part) for part in points.split(2**15)]).exp() * STEP**dim


def chi_squared_is_plausible(counts, expected):
    """Pearson's statistic against its quantile by Wilson and Hilferty (1931); rare cells are taken together."""
    rare = expected < 20
    counts, expected = (torch.cat([v[~rare], v[rare].sum().unsqueeze(0)]) for v in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item()
    freedom = len(counts) - 1
    return statistic < freedom * (1 - 2 / (9 * freedom) + FALSE_ALARM * math.sqrt(2 / (9 * freedom))) ** 3


@everyone
@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_integrates_to_one(name, dim):
    prior = scattered(PRIORS[name](dim))
    total = masses(prior, dim)[1].sum().item()
    error = 5 * prior.log_normalizer()[1].item() if name == "EnergyPrior" else 1e-6
    assert total == pytest.approx(1, abs=error), "seed 0; of the energy within 5 standard errors"


@everyone
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_of_the_density(name, seed):
    torch.manual_seed(seed)
    prior, n = scattered(PRIORS[name](2)), 20_000
    points, mass = masses(prior, 2)
    side = round(24 / CELL)

    def cells(z):
        index = ((z + 12) / CELL).floor().long().clamp(0, side - 1)
        return index[:, 0] * side + index[:, 1]

    expected = torch.zeros(side**2).index_add(0, cells(points), mass / mass.sum())
    z = prior().sample((n,))
    assert z.shape == (n, 2)
    counts = torch.bincount(cells(z), minlength=side**2)
    assert chi_squared_is_plausible(counts.double(), n * expected), f"seed {seed}; false alarms: 1e-4"


@everyone
def test_a_root_has_no_parents_and_no_mean_to_set(name):
    prior = PRIORS[name](2)
    assert (prior().batch_shape, prior().event_shape) == ((), (2,))
    assert prior().expand([5]).log_prob(torch.zeros(2)).shape == (5,)
    assert prior().expand([4, 5]).sample().shape == (4, 5, 2)
    with pytest.raises(TypeError, match=f"Expected no parents for {name.split()[0]}; got 1|takes 1 positional"):
        prior(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="Expected a family with a mean to set"):
        prior.eta_at(torch.zeros(2))
    if name != "EnergyPrior":
        with pytest.raises(TypeError, match="it has no parents"):
            type(prior).mlp(3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOfNormals(2, 0), "Expected num_components to be a positive whole number; got 0"),
        (lambda: MixtureOfNormals(0), "Expected dim to be a positive whole number; got 0"),
        (lambda: VampPrior(DiagonalNormal.mlp(4, 2), 4, 0), "Expected num_components to be a positive whole number"),
        (lambda: VampPrior(DiagonalNormal.mlp(4, 2), 5), "Expected x_dim .*posterior's input, 4; got 5"),
        (
            lambda: VampPrior(DiagonalNormal(ConvEncoder((1, 4, 4), 6, (2,))), 5),
            "Expected x_dim .*posterior's input, 16; got 5",
        ),
        (lambda: AutoregressivePrior(0), "Expected dim to be a positive whole number; got 0"),
        (lambda: AutoregressivePrior(2, (0,)), r"Expected hidden\[0\] to be a positive whole number; got 0"),
        (lambda: AutoregressivePrior(2, 5), "Expected hidden to be a sequence of sizes"),
        (lambda: EnergyPrior.mlp(3, 2), "Expected parents_dim to be 0, .*; got 3"),
        (lambda: EnergyPrior.mlp(0, 2, num_samples=0), "Expected num_samples to be a positive whole number; got 0"),
        (lambda: EnergyPrior(MLP(2, 3), 2)().log_prob(torch.zeros(2)), "EnergyPrior's network to give 1 number; got 3"),
        (lambda: EnergyPrior.mlp(0, 2).log_normalizer(0), "Expected num_samples to be a positive whole number; got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- VampPrior -------------------------------------------------------------------------------------


def vamp(posterior=DiagonalNormal, **options):
    q = posterior.mlp(6, 2, (5,))
    return VAE(VampPrior(q, 6, 4, **options), Bernoulli.mlp(2, 6, (5,)), q)


def test_the_density_is_the_mean_of_the_posteriors_at_the_pseudo_inputs():
    vae, z = vamp(), torch.randn(7, 2)
    each = torch.stack([vae.posterior(u).log_prob(z) for u in vae.prior.pseudo_inputs])
    assert_close(vae.prior().log_prob(z), each.exp().mean(0).log(), rtol=1e-12, atol=1e-12)


def test_a_shared_posterior_is_one_before_and_after_saving(tmp_path):
    vae = vamp()
    names = [name for name, _ in vae.named_parameters()]
    assert len(names) == 1 + 4 + 4  # pseudo-inputs, decoder, posterior
    x = (torch.rand(20, 6) > 0.5).double()
    fit(vae, x, x, epochs=1, progress=False, run_dir=tmp_path / "run")
    pyrovae.save(vae, tmp_path / "weights")
    with safe_open(tmp_path / "weights", "pt") as file:
        assert set(file.keys()) == set(names)
    for path in (tmp_path / "weights", tmp_path / "run"):
        loaded = pyrovae.load(path)
        assert loaded.prior.posterior is loaded.posterior
        assert loaded.state_dict().keys() == vae.state_dict().keys()
        assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())
    filled = pyrovae.load(tmp_path / "weights", vamp())
    assert torch.equal(filled.posterior.eta(x), vae.posterior.eta(x))


def test_a_posterior_of_its_own_stays_its_own(tmp_path):
    vae = VAE(
        VampPrior(DiagonalNormal.mlp(6, 2, (5,)), 6, 4), Bernoulli.mlp(2, 6, (5,)), DiagonalNormal.mlp(6, 2, (5,))
    )
    pyrovae.save(vae, tmp_path / "weights")
    loaded = pyrovae.load(tmp_path / "weights")
    assert loaded.prior.posterior is not loaded.posterior
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(
        ValueError, match=r"has posterior\.net\.layers.* other than prior\.posterior\.net.*, which are one"
    ):
        pyrovae.load(tmp_path / "weights", vamp())


def test_a_configuration_that_shares_what_is_not_there_is_refused():
    config = configuration.describe(vamp())
    assert config["arguments"]["posterior"] == {"shared": "prior.posterior"}
    config["arguments"]["posterior"] = {"shared": "elsewhere"}
    with pytest.raises(ValueError, match="described before; got 'elsewhere'"):
        configuration.build(config)


def test_pseudo_inputs_start_from_data():
    prior, x = vamp().prior, torch.rand(4, 6)
    assert prior.start_from(x) is prior
    assert_close(prior.pseudo_inputs, x.clamp(0.01, 0.99))
    free = vamp(unit_interval=False).prior.start_from(5 * x)
    assert torch.equal(free.pseudo_inputs, 5 * x)
    for bad, message in (
        (x[:, :5], r"Expected pseudo-inputs of the size of the posterior's input, \(K, 6\); got \(4, 5\)"),
        (x[:3], "Expected 4 pseudo-inputs, one for each component; got 3"),
        (x + 1, r"Expected pseudo-inputs within \[0, 1\], or unit_interval=False; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.start_from(bad)


def test_all_components_are_counted_where_memory_is_planned():
    x = (torch.rand(5, 6) > 0.5).double()
    q = DiagonalNormal.mlp(6, 2, (5,))
    many = VAE(VampPrior(q, 6, 300), Bernoulli.mlp(2, 6, (5,)), q)
    assert Survey.of(many, {"x": x}).width >= 300 * 2


# --- autoregressive --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("hidden", [(), (4,), (40,), (7, 40)])
def test_a_masked_network_sees_what_comes_before_and_nothing_else(dim, hidden):
    net = scattered(MaskedMLP(dim, 2, hidden, activation="tanh"))
    jacobian = torch.autograd.functional.jacobian(net, torch.randn(dim)).reshape(2, dim, dim)
    before = torch.ones(dim, dim).tril(-1).bool()
    assert (jacobian[:, ~before] == 0).all()
    assert (jacobian[:, before] != 0).all()


def test_noise_becomes_a_draw_value_by_value():
    prior = scattered(AutoregressivePrior(4, (9,)))
    torch.manual_seed(1)
    z = prior().rsample((5,))
    torch.manual_seed(1)
    eps = torch.randn(5, 4)
    mu, log_sigma = prior.given(z).chunk(2, -1)
    assert_close((z - mu) / log_sigma.exp(), eps)
    assert all(g.any() for g in torch.autograd.grad((z**3).sum(), list(prior.parameters())))


def test_scales_begin_at_one():
    prior = AutoregressivePrior(3, (9,))
    assert torch.equal(prior.given(100 * torch.randn(5, 3))[:, 3:], torch.zeros(5, 3))


# --- energy ----------------------------------------------------------------------------------------


class Square(nn.Module):
    """E(z) = a |z|^2, for which p(z) = N(0, I / (1 + 2 a)) and log Z = -(D / 2) log(1 + 2 a)."""

    def __init__(self, a: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor) -> Tensor:
        return self.a * (z**2).sum(-1, keepdim=True)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_z_is_that_of_quadrature(dim, seed):
    torch.manual_seed(seed)
    prior, points = scattered(PRIORS["EnergyPrior"](dim), 1.0), grid(dim)
    with torch.no_grad():
        log_p = -prior.energy(points) - (points**2).sum(-1) / 2 - dim * math.log(2 * math.pi) / 2
    exact = log_p.logsumexp(0) + dim * math.log(STEP)
    for estimate, error in (
        prior.log_normalizer(),
        prior.log_normalizer(100_000, torch.Generator().manual_seed(seed)),
    ):
        assert 0 < error < 0.1
        assert (estimate - exact).abs() < 5 * error, f"seed {seed}"


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("a", [-0.2, 0.0, 0.7])
def test_log_z_of_a_square_and_its_gradient(dim, a):
    prior = EnergyPrior(Square(a), dim, num_samples=2000)
    repeats = []
    for _ in range(50):
        (gradient,) = torch.autograd.grad(prior.log_z(), prior.net.a)
        repeats.append(gradient)
    found = torch.stack(repeats)
    error = 5 * found.std() / 50**0.5 + 5 / 2000  # its bias falls as 1 / S
    assert (found.mean() + dim / (1 + 2 * a)).abs() < error, "seed 0"
    estimate, error = prior.log_normalizer(200_000, torch.Generator().manual_seed(0))
    assert (estimate + dim / 2 * math.log(1 + 2 * a)).abs() <= 5 * error + 1e-12, "seed 0"


def test_the_standard_error_is_the_scatter_of_the_estimate():
    prior = EnergyPrior(Square(0.7), 2)
    runs = [prior.log_normalizer(1000) for _ in range(400)]
    estimates, errors = map(torch.stack, zip(*runs, strict=True))
    ratio = estimates.std() / errors.mean()
    assert abs(ratio - 1) < 5 / math.sqrt(2 * 400), "seed 0"


def test_eval_mode_has_one_log_z_and_training_mode_estimates_anew():
    prior, z = scattered(PRIORS["EnergyPrior"](2)), torch.randn(5, 2)
    state = torch.get_rng_state()
    first, again = prior().log_prob(z), prior().log_prob(z)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert prior.log_z() == prior.log_normalizer()[0]
    prior.train()
    third, fourth = prior().log_prob(z), prior().log_prob(z)
    assert not torch.equal(third, fourth)
    assert_close(third - fourth, (third - fourth)[:1].expand(5), rtol=0, atol=1e-12)  # one log Z for all data


def test_a_trained_energy_finds_the_density():
    """Maximum likelihood of N(0, 1 / (1 + 2 a)) from its own draws, within 5 standard errors of a."""
    torch.manual_seed(0)
    n, a = 4000, 0.75
    z = torch.randn(n, 2) / math.sqrt(1 + 2 * a)
    prior = EnergyPrior(Square(0.1), 2, num_samples=4000)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    trail = []
    for _ in range(400):
        optimizer.zero_grad()
        (-prior().log_prob(z).mean()).backward()
        optimizer.step()
        trail.append(prior.net.a.item())
    error = (1 + 2 * a) / math.sqrt(2 * 2 * n) * math.sqrt(2)  # of the data, and of the draws for log Z
    assert abs(sum(trail[200:]) / 200 - a) < 5 * error, "seed 0"


def test_the_draws_for_evaluation_are_no_weights_and_always_the_same():
    first, second = EnergyPrior.mlp(0, 3, (4,)), EnergyPrior.mlp(0, 3, (4,))
    assert torch.equal(first.noise, second.noise)
    assert "noise" not in first.state_dict()
    assert "layers.2.bias" not in dict(first.net.named_parameters())
