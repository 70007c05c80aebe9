"""`check` finds planted faults, each by the name of what is wrong, and nothing in a sound program."""

import re
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.distributions import constraints
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import VAE, GaussianMixture, LatentModel, as_program, check, data_plate, fit
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal
from pyrovae.data import Data, load
from pyrovae.symptoms.normalization import total_probability

X = 5


def data(n=20):
    return (torch.rand(n, X, generator=torch.Generator().manual_seed(0)) > 0.5).float()


class Two(LatentModel):
    """A sound program: p(z2) p(z1 | z2) p(x | z1), q(z1 | x) q(z2 | z1)."""

    def __init__(self):
        super().__init__()
        self.p_z2, self.p_z1 = StandardNormal(2), DiagonalNormal.mlp(2, 3, (4,))
        self.p_x = Bernoulli.mlp(3, X, (4,))
        self.q_z1, self.q_z2 = DiagonalNormal.mlp(X, 3, (4,)), DiagonalNormal.mlp(3, 2, (4,))

    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            return pyro.sample("x", self.likelihood(z1), obs=x)

    def likelihood(self, z1):
        return self.p_x(z1)

    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))


class ForgottenPlate(Two):
    def guide(self, x):
        z1 = pyro.sample("z1", self.q_z1(x))
        pyro.sample("z2", self.q_z2(z1))


class PlateOfAnotherLength(Two):
    def guide(self, x):
        with pyro.plate("data", 100):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))


class NoToEvent(Two):
    def likelihood(self, z1):
        return dist.Bernoulli(logits=self.p_x.eta(z1))


class NoToEventInTheGuide(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", dist.Normal(self.q_z2.eta(z1)[..., 0], 1.0))


class Swapped(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z2", self.q_z1(x))
            pyro.sample("z1", self.q_z2(z1))


class BatchNorm(Two):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(X)

    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(self.norm(x)))
            pyro.sample("z2", self.q_z2(z1))


class Centred(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x - x.mean(0)))
            pyro.sample("z2", self.q_z2(z1))


class Detached(Two):
    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", dist.Normal(self.p_z1.eta(z2)[..., :3].detach(), 1.0).to_event(1))
            return pyro.sample("x", self.likelihood(z1), obs=x)


class Unused(Two):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(2, 2)


class Averaged(dist.Bernoulli):
    """The mean over pixels in the place of the sum, as of a loss with reduction="mean"."""

    def log_prob(self, value):
        return super().log_prob(value) / X


class Mean(Two):
    def likelihood(self, z1):
        return Averaged(logits=self.p_x.eta(z1)).to_event(1)


class Scaled(Two):
    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            with poutine.scale(scale=1 / X):
                return pyro.sample("x", self.likelihood(z1), obs=x)


class MeanOfAVector(dist.TorchDistribution):
    """One vector of bits, whose log-probability is a mean."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits):
        self.base = dist.Bernoulli(logits=logits)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def sample(self, sample_shape=()):
        return self.base.sample(sample_shape)

    def expand(self, batch_shape, _instance=None):
        return MeanOfAVector(self.base.logits.expand(*batch_shape, X))

    def log_prob(self, value):
        return self.base.log_prob(value).mean(-1)


class MeanOfVectors(Two):
    def likelihood(self, z1):
        return MeanOfAVector(self.p_x.eta(z1))


class SquaredError(dist.Normal):
    """A squared error without its normalizing constant."""

    def log_prob(self, value):
        return -((value - self.loc) ** 2)


class NoConstant(Two):
    def likelihood(self, z1):
        return SquaredError(self.p_x.eta(z1), 1.0).to_event(1)


class Factor(Two):
    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            pyro.sample("y", dist.Normal(self.p_x.eta(z1), 1.0).to_event(1), obs=x)
            pyro.factor("x", -((x - self.p_x.eta(z1)) ** 2).sum(-1))


class IgnoresData(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(torch.ones_like(x)))
            pyro.sample("z2", self.q_z2(z1 + x[:, :3]))


class IgnoresLatents(Two):
    def likelihood(self, z1):
        return self.p_x(z1.detach())


class Missing(Two):
    def guide(self, x):
        with data_plate(x):
            pyro.sample("z1", self.q_z1(x))


class TooMany(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))
            pyro.sample("z3", self.q_z1(x))


class WrongSupport(Two):
    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", self.p_z1(z2))
            return pyro.sample("x", self.likelihood(z1), obs=x)


class NarrowSupport(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", dist.LogNormal(*self.q_z2.eta(z1).chunk(2, -1)).to_event(1))


class Flat(nn.Module):
    """A network for two dimensions alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, X)

    def forward(self, z):
        n, d = z.shape
        return self.linear(z.reshape(n, d))


class DoesNotBroadcast(Two):
    def __init__(self):
        super().__init__()
        self.p_x = Flat()

    def likelihood(self, z1):
        return dist.Bernoulli(logits=self.p_x(z1)).to_event(1)


class DataDependentLoop(Two):
    def likelihood(self, z1):
        logits = self.p_x.eta(z1)
        while logits.abs().sum() < 1e-3:
            logits = logits * 2 + 1
        return dist.Bernoulli(logits=logits).to_event(1)


class RescaledByTheBatch(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x / x.sum()))
            pyro.sample("z2", self.q_z2(z1))


class WorseInCompany(Two):
    """A network with another answer for many particles."""

    def likelihood(self, z1):
        logits = self.p_x.eta(z1)
        return dist.Bernoulli(logits=logits - 50 if z1.dim() == 3 and len(z1) > 50 else logits).to_event(1)


class NotFinite(Two):
    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x / 0 * 0))
            pyro.sample("z2", self.q_z2(z1))


class ObservesNothing(Two):
    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            return pyro.sample("z1", self.p_z1(z2))


FAULTS = {
    ForgottenPlate: ("plate", "z1", r"Expected site 'z1' inside the plate 'data'"),
    PlateOfAnotherLength: ("plate", "z1", r"be as long as the batch"),
    NoToEvent: ("plate", "x", r"end in .to_event\(1\)"),
    NoToEventInTheGuide: ("latents", "z2", r"the shape \(\) in the guide and \(2,\) in the model"),
    Swapped: ("latents", "z1", r"Is it swapped with 'z2'\?"),
    BatchNorm: ("independence", "norm", r"batch normalization of norm, in training mode"),
    Centred: ("independence", "z1", r"at site 'z1', by what is computed over the batch"),
    Detached: ("gradients", "p_z1.net.layers.0.weight", r"'p_z1.net.layers.0.weight' receives no gradient"),
    Unused: ("gradients", "forgotten.weight", r"'forgotten.weight' receives no gradient"),
    Mean: ("densities", "x", r"the probabilities of all values of 'x' add to 1\.7"),
    MeanOfVectors: ("densities", "x", r"the probabilities of all values of 'x' add to \d+"),
    NoConstant: ("densities", "x", r"the probabilities of all values of 'x' add to 1.77"),
    Scaled: ("scales", "x", r"site 'x' is multiplied by 0.2"),
    Factor: ("scales", "x", r"'x' is a pyro.factor"),
    IgnoresData: ("guide", "z1", r"the guide draws 'z1' in the same way whatever the data"),
    IgnoresLatents: ("likelihood", "x", r"the density of 'x' does not depend on any latent"),
    Missing: ("latents", "z2", r"latent 'z2' of the model is not drawn by the guide"),
    TooMany: ("latents", "z3", r"the guide draws 'z3', and the model has no such site"),
    WrongSupport: ("latents", "z2", r"what the guide draws at 'z2' lie outside the support of the model"),
    NarrowSupport: ("latents", "z2", r"what the model draws at 'z2' lie outside the support of the guide"),
    DoesNotBroadcast: ("broadcasting", "p_x", r"there is an error in p_x"),
    DataDependentLoop: ("compiling", None, r"the value of a tensor as a number, after site 'z1', at .*while logits"),
    RescaledByTheBatch: ("independence", "z1", r"at site 'z1', by what is computed over the batch"),
    WorseInCompany: ("bounds", None, r"the bound of 100 particles lies \d+ standard errors below the ELBO"),
    NotFinite: ("values", None, r"site 'z1' of the guide: its value is not finite"),
    ObservesNothing: ("plate", None, r"the model observes nothing"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_by_name(fault):
    name, site, message = FAULTS[fault]
    report = check(fault(), data())
    found = [finding for finding in report.findings if (finding.check, finding.site) == (name, site)]
    assert found, f"not found among {[str(f) for f in report.findings]}"
    assert any(re.search(message, finding.message) for finding in found), found[0].message
    assert report.checks[name][1] is False
    assert str(found[0]) in str(report)


def test_a_fault_alone_is_found_alone():
    """What does not follow from the fault is found in order."""
    torch.manual_seed(0)
    for fault in (NoToEvent, BatchNorm, Unused, Mean, Scaled, Missing, DoesNotBroadcast, DataDependentLoop):
        assert {finding.check for finding in check(fault(), data()).findings} == {FAULTS[fault][0]}, fault.__name__


@pytest.mark.parametrize("entry", (zoo.PROGRAMS | zoo.LABELED).values(), ids=zoo.PROGRAMS | zoo.LABELED)
def test_nothing_is_found_in_the_zoo(entry):
    program, batch = entry.make(), entry.batch(20)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    noise = torch.get_rng_state()
    report = check(program, batch, strict=True)
    assert report.findings == []
    assert all(passed for _, passed in report.checks.values())
    assert torch.equal(noise, torch.get_rng_state())
    assert program.training
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_the_sound_program_of_these_tests_is_sound():
    assert check(Two(), data()).findings == []


class Subsampled(Two):
    """Three of the pixels stand for all."""

    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            logits = self.p_x.eta(z1)
            with pyro.plate("pixels", X, subsample=torch.arange(3), dim=-2) as index:
                seen = None if x is None else x[:, index].T
                pyro.sample("x", dist.Bernoulli(logits=logits[..., index].transpose(-1, -2)), obs=seen)


class Masked(Two):
    """Pixels that are missing, in two ways."""

    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            there = torch.arange(X) > 1
            logits = self.p_x.eta(z1)
            return pyro.sample("x", dist.Bernoulli(logits=logits).mask(there).to_event(1), obs=x)


class Dropout(Two):
    def __init__(self):
        super().__init__()
        self.drop, self.lazy, self.steps = nn.Dropout(0.5), nn.LazyLinear(X), nn.Parameter(torch.arange(3), False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def likelihood(self, z1):
        self.count += 1
        return dist.Bernoulli(logits=self.lazy(self.drop(self.p_x.eta(z1)))).to_event(1)


class Experts(Two):
    """A network for each number of black pixels."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(X, 6) for _ in range(X + 1))

    def guide(self, x):
        with data_plate(x):
            each = torch.stack([expert(x + 1) for expert in self.experts], -1)
            eta = (each * nn.functional.one_hot(x.sum(-1).long(), X + 1).unsqueeze(-2)).sum(-1)
            z1 = pyro.sample("z1", self.q_z1.distribution(eta))
            pyro.sample("z2", self.q_z2(z1))
        self.__dict__.setdefault("q_z1_is_unused", self.q_z1.requires_grad_(False))


class Nested(LatentModel):
    """A latent whose support another one bounds, and a steep Beta for a likelihood."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def model(self, x=None):
        with data_plate(x):
            top = pyro.sample("top", dist.Uniform(1.0, 2.0))
            z = pyro.sample("z", dist.Uniform(0.0, top))
            return pyro.sample("x", dist.Beta(self.scale + 0.1 * z, self.scale), obs=x)

    def guide(self, x):
        with data_plate(x):
            top = pyro.sample("top", dist.Uniform(1.0, 1.1 + 0.9 * x))
            pyro.sample("z", dist.Uniform(0.0, top * (0.5 + 0.5 * x)))


@pytest.mark.parametrize("make", [Subsampled, Masked, Dropout, Experts], ids=lambda make: make.__name__)
def test_what_is_legitimate_is_let_pass(make):
    program = make()
    findings = check(program, torch.cat([data(200), torch.zeros(1, X), torch.ones(1, X)])).findings
    others = {"compiling"} | ({"broadcasting"} if make is Subsampled else set())  # which these do not claim
    assert [finding for finding in findings if finding.check not in others] == []
    if make is Dropout:
        assert program.count == 1, "the first run makes what is lazy; after it even what no file holds is put back"


def test_supports_and_steep_densities_that_cannot_be_judged_are_not():
    findings = check(Nested(), torch.rand(50)).findings
    assert not {finding.check for finding in findings} & {"latents", "densities"}, findings


def test_nothing_is_found_in_trained_programs():
    torch.manual_seed(0)
    apart = torch.cat([torch.randn(50, 2) - 5, torch.randn(50, 2) + 5])
    mixture = GaussianMixture(2, 2).start_from(apart, seed=0)
    mixture.em(apart, progress=False)
    assert check(mixture, apart).findings == []
    digits = load("digits", labels=True).train
    assert check(GaussianMixture(64, 10, "diagonal").start_from(digits["x"], 0), digits.select("x")).findings == []
    two = Two()
    fit(two, data(100), epochs=5, lr=1e-2, progress=False)
    assert check(two, data(100)).findings == []


def test_double_precision_and_labels_that_are_shown():
    entry = zoo.PROGRAMS["VAE PixelCNN"]
    assert check(entry.make().double(), entry.data(8).double()).findings == []
    m2 = zoo.LABELED["M2"]
    assert check(m2.make(), {"x": m2.data(20), "y": torch.arange(20) % 3}).findings == []


def test_noise_and_first_weights_are_left_as_they_were():
    def guide(x):
        weight = pyro.param("weight", lambda: torch.randn(X))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, X), 1.0).to_event(1), obs=x)

    weights = []
    for seed, first in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        program = as_program(model, guide)
        before = torch.get_rng_state()
        if first:
            check(program, data())
            assert torch.equal(before, torch.get_rng_state())
        fit(program, data(), epochs=1, lr=1e-9, progress=False)
        weights.append(program.pyro_params["weight"].detach().clone())
    assert torch.allclose(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
    two, noise = Two(), torch.get_rng_state()
    check(two, Data(torch.full((20, X), 0.5), dynamic=True))
    check(two, DataLoader(TensorDataset(data()), batch_size=10, shuffle=True))
    assert torch.equal(noise, torch.get_rng_state())


def test_functions_are_checked():
    networks = Two()
    assert check(as_program(networks.model, networks.guide), {"x": data()}).findings == []

    def guide(x):
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1), scale.detach()))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, X), 1.0).to_event(1), obs=x)

    (finding,) = check(as_program(model, guide), data()).findings
    assert (finding.check, finding.site) == ("gradients", "pyro_params.scale")


class Fails(Two):
    def guide(self, x):
        raise ZeroDivisionError("on the very first line")


def test_a_program_that_fails_shows_its_own_error_whole():
    report = check(Fails(), data())
    (finding,) = report.findings
    assert "ZeroDivisionError: on the very first line" in finding.message
    assert 'raise ZeroDivisionError("on the very first line")' in finding.message
    assert [passed for _, passed in report.checks.values()].count(None) == len(report.checks) - 1
    with pytest.raises(ValueError, match=r"Expected a sound program; got 1 findings(.|\n)*ZeroDivisionError"):
        check(Fails(), data(), strict=True)


def test_what_is_checked_must_be_a_program_and_data():
    with pytest.raises(ValueError, match="Expected program to be a LatentModel; got Linear"):
        check(nn.Linear(2, 2), data())
    with pytest.raises(ValueError, match=r"Expected a batch for model.*got y"):
        check(Two(), {"y": data()})
    with pytest.raises(ValueError, match="got an empty DataLoader"):
        check(Two(), DataLoader([], batch_size=2))


def test_one_datum_and_equal_data_are_enough_to_run():
    assert check(Two(), data(1)).findings == []
    assert check(Two(), torch.ones(7, X)).findings == []
    assert check(Two(), torch.zeros(7, X)).findings == []


def test_fit_warns_of_what_is_cheap_to_see():
    for fault in (BatchNorm, Unused, Scaled, IgnoresData):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(fault(), data(), epochs=1, progress=False)
        assert any(re.search(FAULTS[fault][2], str(each.message)) for each in caught), fault.__name__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Two(), data(), epochs=1, progress=False)


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace, dist.StudentT])
def test_densities_on_the_line_integrate_to_one(family):
    fn = family(torch.tensor([4.0]), torch.tensor([1.0])) if family is dist.StudentT else family(0.3, 2.0)
    assert total_probability(fn) == pytest.approx(1, abs=1e-2)


def test_what_cannot_be_told_is_not_told():
    fn = dist.Bernoulli(logits=torch.zeros(20)).to_event(1)
    assert total_probability(fn) == pytest.approx(1)
    assert total_probability(dist.Poisson(2.0)) is None
    assert total_probability(dist.Gamma(2.0, 1.0)) is None
    assert total_probability(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))) is None


def test_a_vae_of_convolutions_with_batch_norm_is_named():
    encoder = nn.Sequential(nn.Linear(X, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    program = VAE(StandardNormal(2), Bernoulli.mlp(2, X, (4,)), DiagonalNormal(encoder))
    (finding,) = check(program, data()).findings
    assert finding.site == "posterior.net.1"
