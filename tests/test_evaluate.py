"""evaluate and compare, held against exact likelihoods, against formulas by hand, and against bad programs."""

import importlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import (
    VAE,
    AuxiliaryVAE,
    LatentModel,
    LinearGaussian,
    as_program,
    compare,
    data_plate,
    evaluate,
    fit,
    log_weights,
    reference,
)
from pyrovae.conditionals import DiagonalNormal, FullNormal
from pyrovae.data import Data
from pyrovae.weights import WeightSums

module = importlib.import_module("pyrovae.draws")


def wrong_guide(dtype=torch.float32, x_dim=6):
    """Factorized, off in its mean and half as wide again as the prior: wrong, with weights of finite variance."""
    torch.manual_seed(1)
    program = LinearGaussian(x_dim, 2, DiagonalNormal.mlp(x_dim, 2, hidden=()))
    with torch.no_grad():
        program.posterior.net.layers[0].weight.mul_(0.1)
        program.posterior.net.layers[0].bias.copy_(torch.tensor([0.3, -0.3, 0.4, 0.4]))
    return program.to(dtype)


def test_wrong_guide_is_within_5_standard_errors_of_the_exact_value():
    program = wrong_guide()
    x = program.sample(200)
    result = evaluate(program, x, 5000, seed=0, progress=False)
    exact = program.log_prob(x).detach().double()
    z_scores = (result.log_px - exact) / result.standard_error
    assert (z_scores.abs() < 5).all(), "seed 0"
    assert z_scores.square().mean().item() == pytest.approx(1, abs=5 * (2 / 200) ** 0.5), "errors of the right size"
    assert (result.standard_error > 0).all()
    assert (exact - result.elbo > 0.1).all(), "the guide is wrong indeed"


@pytest.mark.usefixtures("float64")
def test_exact_guide_needs_one_particle():
    program = LinearGaussian(6, 2)
    x = program.sample(20)
    result = evaluate(program, x, 1, progress=False)
    assert_close(result.log_px, program.log_prob(x).detach(), rtol=0, atol=1e-10)
    assert_close(
        result.log_px,
        reference.linear_gaussian_log_prob(x, program.weight, program.bias, program.log_sigma).detach(),
        rtol=0,
        atol=1e-10,
    )
    assert result.standard_error.isnan().all(), "one particle cannot tell its error"
    many = evaluate(program, x, 50, progress=False)
    assert_close(many.ess, torch.full((20,), 50.0))


@pytest.fixture
def tabled(monkeypatch):
    """Takes all standard-normal noise of `evaluate` from a table (K, N, D), whatever the chunks."""
    table = torch.randn(1000, 23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cursor = {"k": 0, "n": 0}

    def draw(program, batch, k, survey):
        n = len(batch["x"])
        noise = table[cursor["k"] : cursor["k"] + k, cursor["n"] : cursor["n"] + n]
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributions.normal._standard_normal", lambda shape, **_: noise.reshape(shape))
            drawn = original(program, batch, k, survey)
        cursor["k"] += k
        if cursor["k"] == cursor["total"]:
            cursor.update(k=0, n=cursor["n"] + n)
        return drawn

    original = module.draw
    monkeypatch.setattr(module, "draw", draw)
    return cursor


@pytest.mark.usefixtures("float64")
def test_log_px_is_that_of_the_hand_written_bound(tabled):
    program = wrong_guide(torch.float64)
    x = torch.randn(23, 6, generator=torch.Generator().manual_seed(1))
    tabled["total"] = 1000
    result = evaluate(program, x, 1000, progress=False)
    assert tabled["n"] == 23
    by_hand = program.reference_elbo(x, whole_latents(program, x)).detach()
    assert_close(result.log_px, reference.importance_bound(by_hand), rtol=0, atol=1e-10)
    assert_close(result.elbo, by_hand.mean(0), rtol=0, atol=1e-10)


def whole_latents(program, x):
    table = torch.randn(1000, 23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return reference.diagonal_normal(table, program.posterior.eta(x).expand(1000, -1, -1))[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("chunk_size", "batch_size"), [(1, 23), (7, 7), (1000, 1), (1000, 1000), (7, 1000)])
def test_chunks_of_1_7_and_1000_give_the_same_numbers_under_the_same_noise(tabled, chunk_size, batch_size):
    program = wrong_guide(torch.float64)
    x = torch.randn(23, 6, generator=torch.Generator().manual_seed(1))
    tabled["total"] = 1000
    chunked = evaluate(program, x, 1000, chunk_size=chunk_size, batch_size=batch_size, progress=False)
    tabled.update(k=0, n=0)
    whole = evaluate(program, x, 1000, chunk_size=1000, batch_size=23, progress=False)
    for name in ("log_px", "elbo", "standard_error", "ess", "k_hat"):
        assert_close(getattr(chunked, name), getattr(whole, name), rtol=0, atol=1e-8, msg=name)
    assert chunked.active_units == whole.active_units


@pytest.mark.usefixtures("float64")
def test_compiled_and_not_give_the_same_numbers_from_the_same_seed(monkeypatch):
    monkeypatch.setattr(module, "WORTH_COMPILING", 1)
    x = (torch.rand(13, 6) < 0.5).double()
    program = VAE.mlp(6, 2, (5,), posterior=FullNormal)
    options = {"chunk_size": 50, "batch_size": 7, "seed": 0, "progress": False}
    plain, compiled = (evaluate(program, x, 100, compile=compile, **options) for compile in (False, True))
    for name in ("log_px", "elbo", "standard_error", "ess", "k_hat"):
        assert_close(getattr(compiled, name), getattr(plain, name), rtol=1e-8, atol=1e-9, msg=name)
    assert compiled.active_units == plain.active_units


def test_compiled_evaluation_sees_data_outside_the_support_that_the_model_makes(monkeypatch):
    monkeypatch.setattr(module, "WORTH_COMPILING", 1)

    class Doubling(VAE):
        def model(self, x):
            return super().model(2 * x)

    x = torch.zeros(5, 6)
    program = Doubling.mlp(6, 2, (5,))
    assert torch.isfinite(evaluate(program, x, 3, compile=True, progress=False).log_px).all()
    x[4] = 1
    with pytest.raises(ValueError, match=r"Expected values within the support of site 'x', \{0, 1\}; got 2"):
        evaluate(program, x, 3, compile=True, progress=False)


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_is_for_networks_alone_and_close_to_float32(monkeypatch, compile):
    monkeypatch.setattr(module, "WORTH_COMPILING", 1)
    torch.manual_seed(0)
    program, x = VAE.mlp(64, 5, (50,)), (torch.rand(20, 64) < 0.3).float()
    inner = set()
    program.likelihood.net.layers[0].register_forward_hook(lambda module, x, y: inner.add(y.dtype))
    options = {"seed": 0, "compile": compile, "progress": False}
    whole, half = (evaluate(program, x, 1000, precision=p, **options) for p in ("32-true", "bf16-mixed"))
    assert inner == {torch.float32, torch.bfloat16}
    difference = (half.log_px - whole.log_px).abs()
    assert 1e-4 < difference.max() < 0.2, "seed 0: bfloat16 has 3 digits, and the sum is about -45"


def test_exactly_the_requested_number_of_particles(monkeypatch):
    counted = []
    monkeypatch.setattr(
        WeightSums,
        "add",
        lambda self, log_w, elbo, add=WeightSums.add: (counted.append(len(log_w)), add(self, log_w, elbo))[1],
    )
    result = evaluate(wrong_guide(), torch.randn(3, 6), 103, chunk_size=10, batch_size=3, progress=False)
    assert sum(counted) == 103 == result.num_particles
    assert counted[-1] == 3


@pytest.mark.usefixtures("float64")
def test_any_kind_of_data_gives_the_same():
    program, x = LinearGaussian(6, 2), torch.randn(11, 6)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    results = [evaluate(program, d, 2, progress=False).log_px for d in (x, {"x": x}, (x,), Data(x), loader)]
    for result in results:
        assert_close(result, program.log_prob(x).detach())


class Masked(LatentModel):
    """x_i ~ N(z_i, 1) where it was seen; the guide is exact."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def model(self, x=None, seen=True):
        with data_plate(x), pyro.poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 1.0).mask(seen).to_event(1), obs=x)

    def guide(self, x, seen):
        mu, sigma = torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)
        with data_plate(x), pyro.poutine.scale(scale=self.scale):
            pyro.sample("z", dist.Normal(mu, sigma).to_event(1))


@pytest.mark.parametrize("scale", [1.0, 600.0])
def test_scales_are_stripped_and_masks_kept(scale):
    x = torch.tensor([[1.0, 2.0], [0.5, 77.0], [99.0, -99.0]])
    seen = torch.tensor([[True, True], [True, False], [False, False]])
    exact = (dist.Normal(0.0, 2**0.5).log_prob(x) * seen).sum(-1)
    log_w = log_weights(Masked(scale), {"x": x, "seen": seen}, 2)
    assert_close(log_w, exact.expand(2, -1), rtol=1e-5, atol=1e-5)


def test_plates_inside_the_data_plate_are_summed_for_each_datum():
    class Pixels(LatentModel):
        def model(self, x=None):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("pixels", 3, dim=-2):
                    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
                    return pyro.sample("x", dist.Normal(z + noise, 1.0), obs=None if x is None else x.T)

        def guide(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.sum(-1) / 5, (2 / 5) ** 0.5))
                with pyro.plate("pixels", 3, dim=-2):
                    pyro.sample("noise", dist.Normal((x.T - z) / 2, 0.5**0.5))

    x = torch.randn(4, 3)
    covariance = torch.ones(3, 3) + 2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert_close(log_weights(Pixels(), x, 5), exact.expand(5, -1), rtol=1e-4, atol=1e-4)


def test_active_units_are_those_whose_mean_varies():
    program = LinearGaussian(4, 3, DiagonalNormal.mlp(4, 3, hidden=()))
    layer = program.posterior.net.layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0], layer.weight[1, 1], layer.bias[2] = 0.2, 0.05, 3.0
    x = torch.randn(400, 4)
    assert evaluate(program, x, 1, progress=False).active_units == {"z": 1}, "0.04, 0.0025 and no variance"


def test_summary_means_and_errors():
    program, x = wrong_guide(), torch.randn(50, 6)
    result = evaluate(program, x, 100, seed=0, progress=False)
    s = result.summary()
    assert s["log_px"] == pytest.approx(result.log_px.mean().item())
    assert s["log_px_error"] == pytest.approx(result.log_px.numpy().std(ddof=1) / 50**0.5)
    assert s["elbo_error"] == pytest.approx(result.elbo.numpy().std(ddof=1) / 50**0.5)
    assert s["bits_per_dim"] == pytest.approx(-s["log_px"] / 6 / math.log(2))
    assert s["bits_per_dim_error"] == pytest.approx(s["log_px_error"] / 6 / math.log(2))
    assert s["ess"] == pytest.approx(result.ess.mean().item())
    assert s["log_px_sampling_error"] == pytest.approx((result.standard_error**2).sum().item() ** 0.5 / 50)
    assert s["k_hat_above_0.7"] == (result.k_hat > 0.7).sum().item() / 50
    assert (s["num_data"], s["num_particles"]) == (50, 100)
    assert f"{s['log_px']:.3f}" in str(result)


def test_a_seed_repeats_the_numbers_and_leaves_the_random_state():
    program, x = wrong_guide(), torch.randn(5, 6)
    state = torch.get_rng_state()
    first, second = (evaluate(program, x, 20, seed=4, progress=False).log_px for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, evaluate(program, x, 20, seed=5, progress=False).log_px)


def test_comparison_against_its_parts():
    program = wrong_guide()
    x = program.sample(30)
    comparison = compare(program, x, (1, 10, 1000), seed=0, progress=False)
    value = {bound.name: bound.value for bound in comparison.bounds}
    assert list(value) == [
        "reference ELBO", "Trace_ELBO", "bound, K = 1", "bound, K = 10", "bound, K = 1000", "exact log p(x)",
    ]  # fmt: skip
    assert comparison.difference < 1e-5
    assert value["reference ELBO"] == pytest.approx(value["Trace_ELBO"], abs=1e-5)
    above = 5 * comparison.bounds[4].sampling_error
    assert value["bound, K = 1"] < value["bound, K = 10"] < value["bound, K = 1000"] < value["exact log p(x)"] + above
    assert value["exact log p(x)"] == pytest.approx(program.log_prob(x).mean().item(), abs=1e-5)
    pyros = -Trace_ELBO(num_particles=1000, vectorize_particles=True).loss(program.model, program.guide, x) / 30
    spread = log_weights(program, x, 1000).std(0).square().sum().sqrt().item() / 30
    error = spread * (1 / 100 + 1 / 1000) ** 0.5
    assert value["Trace_ELBO"] == pytest.approx(pyros, abs=5 * error), "seed 0"
    for bound in comparison.bounds[2:5]:
        again = compare(program, x, (1, 10, 1000), seed=1, progress=False).bounds
        other = next(b for b in again if b.name == bound.name)
        error = (bound.sampling_error**2 + other.sampling_error**2) ** 0.5
        assert other.value == pytest.approx(bound.value, abs=5 * error), "seeds 0 and 1"
    first = log_weights(program, x, 20_000)
    spread = first.reshape(20, 1000, 30).mean((1, 2)).std().item()
    ours = next(b for b in comparison.bounds if b.name == "bound, K = 1").sampling_error
    assert ours == pytest.approx(spread, rel=5 / (2 * 19) ** 0.5), "of 1000 draws for each datum"
    of_100 = first.reshape(200, 100, 30).mean((1, 2)).std().item()
    for bound in comparison.bounds[:2]:
        rate = 5 * (1 / 2 / 99 + 1 / 2 / 199) ** 0.5
        assert bound.sampling_error == pytest.approx(of_100, rel=rate), "of 100 draws for each datum"
    lines = str(comparison).splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == list(value)


def test_comparison_without_reference_or_exact_value():
    class Own(VAE):
        reference_elbo = property()

    comparison = compare(Own.mlp(6, 2), torch.zeros(4, 6), (1, 5), progress=False)
    assert [bound.name for bound in comparison.bounds] == ["Trace_ELBO", "bound, K = 1", "bound, K = 5"]
    assert comparison.difference is None


# --- bad input -------------------------------------------------------------------------------------


class Sites(LatentModel):
    """A model and a guide with the latent sites that are named, outside the plate or inside."""

    def __init__(self, model_sites, guide_sites, outside=""):
        super().__init__()
        self.model_sites, self.guide_sites, self.outside = model_sites, guide_sites, outside

    def latents(self, names):
        for name in names:
            pyro.sample(name, dist.Normal(torch.zeros(6), 1.0).to_event(1))

    def model(self, x=None):
        self.latents(set(self.model_sites) & set(self.outside))
        with data_plate(x):
            self.latents(sorted(set(self.model_sites) - set(self.outside)))
            return pyro.sample("x", dist.Normal(torch.zeros(6), 1.0).to_event(1), obs=x)

    def guide(self, x):
        self.latents(set(self.guide_sites) & set(self.outside))
        with data_plate(x):
            self.latents(sorted(set(self.guide_sites) - set(self.outside)))


def grey(**_):
    return VAE.mlp(6, 2), torch.full((5, 6), 0.5)


X = torch.zeros(5, 6)
BAD = {
    "lacking latent": (Sites("ab", "a"), X, {}, r"latent sites of the model, \['a', 'b'\]; got \['a'\].*guide lacks b"),
    "extra latent": (Sites("a", "ab"), X, {}, r"the model lacks b"),
    "outside": (Sites("a", "a", "a"), X, {}, r"Expected site 'a' inside the plate 'data'"),
    "grey values": (VAE.mlp(6, 2), X + 0.5, {}, r"data\['x'\] within the support of site 'x', \{0, 1\}; got 0.5"),
    "NaN": (VAE.mlp(6, 2), X / 0, {}, r"Expected finite values in data\['x'\]; got nan at index \[0, 0\]"),
    "infinity": (VAE.mlp(6, 2), (X + 1) / 0, {}, r"got inf at index \[0, 0\]"),
    "input of the wrong size": (VAE.mlp(7, 2), X, {}, r"shape \(\*, 7\); got \(5, 6\)"),
    "float64 data": (VAE.mlp(6, 2), X.double(), {}, r"weights' dtype, torch.float32; got torch.float64"),
    "output of the wrong size": (VAE(VAE.mlp(7, 2).prior, VAE.mlp(7, 2).likelihood, VAE.mlp(6, 2).posterior), X, {},
                                 r"values of shape \(\*, 7\) at site 'x'; got \(2, 6\)"),
    "empty": (VAE.mlp(6, 2), X[:0], {}, r"Expected data to hold at least one datum"),
    "not data": (VAE.mlp(6, 2), "x", {}, r"Expected data to be a tensor, a pair \(x, y\) or a dict"),
    "no particles": (VAE.mlp(6, 2), X, {"num_particles": 0}, r"num_particles to be a whole number .* got 0"),
    "labels too": (VAE.mlp(6, 2), (X, X[:, 0]), {}, r"Expected a batch for model\(x: .*; got x, y: .*Data.select"),
    "chunk": (VAE.mlp(6, 2), X, {"chunk_size": 0}, r"Expected chunk_size to be a whole number of at least 1; got 0"),
    "batch": (VAE.mlp(6, 2), X, {"batch_size": -1}, r"Expected batch_size to be a whole number of at least 1; got -1"),
    "not a program": (torch.nn.Linear(2, 2), X, {}, r"Expected program to be a LatentModel; got Linear"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "x", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(program, x, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(program, x, **{"num_particles": 3, "progress": False, **options})
    if not options.keys() - {"num_particles"}:
        with pytest.raises(ValueError, match=message.replace(r"data\[", r"\w+\[")):
            compare(program, x, [options.get("num_particles", 3)], progress=False)


@pytest.mark.parametrize(
    ("n", "dim", "message"),
    [(5, 6, r"at site x dim -1, 5 vs 6"), (2, 2, r"batch dimensions of site 'x'.*lack .to_event")],
)
def test_forgotten_to_event_is_named(n, dim, message):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(-1, dim), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    with pytest.raises(ValueError, match=message):
        evaluate(as_program(model, guide), torch.zeros(n, dim), 3, progress=False)


def test_a_plate_of_another_length_is_named():
    def model(x):
        with pyro.plate("data", 600, subsample_size=2):
            z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:2])

    def guide(x):
        with pyro.plate("data", 600, subsample_size=2):
            pyro.sample("z", dist.Normal(x[:2], 1.0).to_event(1))

    x = X[:3]
    with pytest.raises(ValueError, match=r"plate 'data' at site 'z' to be as long as the batch, 3; got 2"):
        log_weights(as_program(model, guide), x, 1)


@pytest.mark.parametrize("compile", [False, True])
def test_nan_weights_name_datum_and_site(monkeypatch, compile):
    monkeypatch.setattr(module, "WORTH_COMPILING", 1)
    program = VAE.mlp(6, 2)
    with torch.no_grad():
        program.likelihood.net.layers[0].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"got NaN: site 'x' of the model: its log-probability is not finite"):
        evaluate(program, X, 3, compile=compile, progress=False)

    class Cracked(VAE):
        """Weights are NaN for one datum alone."""

        def guide(self, x):
            with data_plate(x):
                sigma = torch.where(x[:, :1] == 1, torch.nan, 1.0).expand(-1, 2)
                pyro.sample("z", dist.Normal(torch.zeros(2), sigma).to_event(1))

    x = X.clone()
    x[4, 0] = 1
    with pytest.raises(FloatingPointError, match=r"at datum 4: site 'z' of the guide: its value is not finite"):
        evaluate(Cracked.mlp(6, 2), x, 3, batch_size=2, compile=compile, progress=False)


def test_a_guide_outside_the_support_of_the_model_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - 50, 1.0))

    with pytest.raises(ValueError, match="support"):
        evaluate(as_program(model, guide), torch.zeros(4), 3, progress=False)


def test_impossible_data_have_log_px_minus_infinity():
    class Certain(VAE):
        def model(self, x=None):
            with data_plate(x):
                pyro.sample("z", self.prior())
                return pyro.sample("x", dist.Bernoulli(probs=torch.zeros(6)).to_event(1), obs=x)

    x = torch.stack([torch.zeros(6), torch.ones(6)])
    with pyro.validation_enabled(False):
        result = evaluate(Certain.mlp(6, 2), x, 30, progress=False)
    assert result.log_px[1] < -50
    assert torch.isfinite(result.log_px[0])


@pytest.mark.parametrize("reshape", [lambda x: x.reshape(-1, 6), lambda x: x * 1.0])
def test_grey_values_are_refused_however_they_are_observed(reshape):
    """As in Pyro's own example: reshaped, and with validation switched off at the site."""

    class Careless(VAE):
        def model(self, x=None):
            with data_plate(x):
                z = pyro.sample("z", self.prior())
                logits = self.likelihood.eta(z)
                return pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=reshape(x))

    x = torch.zeros(30, 6)
    x[20] = 0.5
    for verb in (evaluate, fit):
        with pytest.raises(ValueError, match=r"within the support of site 'x', \{0, 1\}; got 0.5"):
            verb(Careless.mlp(6, 2), x, progress=False)


def test_supports_that_depend_on_the_datum_are_left_to_the_density():
    class Counts(VAE):
        def model(self, x=None):
            with data_plate(x):
                z = pyro.sample("z", self.prior())
                return pyro.sample("x", dist.Binomial(10, logits=self.likelihood.eta(z)).to_event(1), obs=x)

    program, x = Counts.mlp(6, 2), torch.randint(11, (50, 6)).float()
    fit(program, x, epochs=1, progress=False)
    assert torch.isfinite(evaluate(program, x, 5, progress=False).log_px).all()


def test_comparing_dynamic_data_repeats_with_the_seed_and_leaves_the_random_state():
    program, data = VAE.mlp(6, 2), Data(torch.rand(20, 6), dynamic=True)
    state = torch.get_rng_state()
    first, second = (compare(program, data, (1, 3), seed=0, progress=False) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scaled_program_is_compared_without_its_scales():
    plain = VAE.mlp(6, 2)

    class Scaled(VAE):
        def model(self, x=None):
            with pyro.poutine.scale(scale=600.0):
                return super().model(x)

        def guide(self, x):
            with pyro.poutine.scale(scale=600.0):
                super().guide(x)

    scaled = Scaled(plain.prior, plain.likelihood, plain.posterior)
    one, other = (compare(program, X, 5, seed=0, progress=False) for program in (plain, scaled))
    assert [bound.value for bound in other.bounds] == pytest.approx([bound.value for bound in one.bounds], rel=1e-5)
    assert other.difference < 1e-5


def test_a_wrong_reference_shows_as_a_difference():
    class Wrong(VAE):
        def reference_elbo(self, x, z):
            return super().reference_elbo(x, z) + 0.25

    assert compare(Wrong.mlp(6, 2), X, 5, seed=0, progress=False).difference == pytest.approx(0.25, abs=1e-4)


def test_exact_log_px_of_an_ill_conditioned_model_in_float32():
    program = LinearGaussian(200, 5)
    with torch.no_grad():
        program.log_sigma.fill_(-4.0)
    x = program.sample(20)
    exact = program.log_prob(x)
    assert exact.dtype == torch.float32
    assert_close(exact.double(), program.double().log_prob(x.double()), rtol=1e-6, atol=1e-3)


@pytest.mark.usefixtures("float64")
def test_auxiliary_latents_leave_p_of_x_as_it_is():
    """In a linear decoder with unit variance log p(x) is known, whatever p(a | x, z), q(a | x) and q(z | a, x) are."""
    torch.manual_seed(0)
    program = AuxiliaryVAE.mlp(3, 2, (), a_dim=2, likelihood=DiagonalNormal)
    for p in program.parameters():  # a guide wider than the posterior, so that the weights are bounded
        p.data *= 0.4
    x, layer = torch.randn(30, 3) / 2, program.likelihood.net.layers[-1]
    exact = reference.linear_gaussian_log_prob(x, layer.weight[:3], layer.bias[:3], torch.zeros(()))
    result = evaluate(program, x, 5000, seed=0, progress=False)
    z_scores = (result.log_px - exact.detach()) / result.standard_error
    assert z_scores.abs().max() < 5, "seed 0"
    assert (result.k_hat < 0.7).all()
    assert (result.log_px - result.elbo > 0.01).all()
