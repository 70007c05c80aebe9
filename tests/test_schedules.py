"""The weight of the KL term and free bits as arguments of `fit`, upon any program."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyrovae import IWAE_ELBO, VAE, Cyclical, FreeBits_ELBO, Linear, as_program, fit, reference
from pyrovae.conditionals import UnitNormal
from pyrovae.schedules import WeightedELBO

EXACT = {"rtol": 0, "atol": 1e-10}
float64 = pytest.mark.usefixtures("float64")


def vae(seed=0):
    torch.manual_seed(seed)
    return VAE.mlp(6, 3, (8,), likelihood=UnitNormal)


def data(n=40, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).to(torch.get_default_dtype())


def quiet(program, *args, **kwargs):
    return fit(program, *args, progress=False, **kwargs)


def test_linear_and_cyclical_weights():
    assert [Linear(4, start=0.2)(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    weights = [Cyclical(4, rising=0.5)(step) for step in range(9)]
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0])


@float64
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_the_weight_multiplies_the_kl_term_alone(beta):
    program, x = vae(), data(5)
    torch.manual_seed(1)
    loss = WeightedELBO(Trace_ELBO()).differentiable_loss(program.model, program.guide, {"x": x}, beta)
    torch.manual_seed(1)
    z = poutine.trace(program.guide).get_trace(x).nodes["z"]["value"]
    log_q = reference.log_diagonal_normal(z, program.posterior.eta(x))
    log_px_z = reference.log_unit_normal(x, program.likelihood.eta(z))
    by_hand = (log_px_z - beta * (log_q - reference.log_standard_normal(z))).sum()
    assert_close(-loss, by_hand, **EXACT)
    ours = torch.autograd.grad(-loss, list(program.parameters()))
    for a, b in zip(ours, torch.autograd.grad(by_hand, list(program.parameters())), strict=True):
        assert_close(a, b, **EXACT)


@float64
def test_the_weight_multiplies_an_analytic_kl():
    program, x = vae(), data(5)
    losses = []
    for beta in (0.0, 1.0, 2.5):
        torch.manual_seed(1)
        elbo = WeightedELBO(TraceMeanField_ELBO())
        losses.append(elbo.differentiable_loss(program.model, program.guide, {"x": x}, beta))
    kl = reference.kl_diagonal_standard(program.posterior.eta(x)).sum()
    assert_close(losses[1] - losses[0], kl, **EXACT)
    assert_close(losses[2] - losses[0], 2.5 * kl, **EXACT)


@float64
def test_the_weight_holds_for_classes_that_are_summed_over():
    entry = zoo.LABELED["M2"]
    program, x = entry.make(), entry.data(4)
    config = lambda site: {"enumerate": "parallel"} if site["name"] == "y" else {}  # noqa: E731
    guide = poutine.infer_config(program.guide, config)
    torch.manual_seed(1)
    elbo = WeightedELBO(TraceEnum_ELBO(max_plate_nesting=1))
    loss = elbo.differentiable_loss(program.model, guide, {"x": x}, 0.3)
    torch.manual_seed(1)
    z = poutine.trace(poutine.enum(guide, first_available_dim=-2)).get_trace(x).nodes["z"]["value"]
    logits = program.classifier.eta(x)
    log_y = torch.log_softmax(logits, -1).T
    y = torch.eye(3).unsqueeze(1).expand(3, 4, 3)
    log_q = reference.log_diagonal_normal(z, program.posterior.eta(x, y))
    log_px = reference.log_bernoulli(x, program.likelihood.eta(y, z))
    kl = log_q - reference.log_standard_normal(z) + log_y + torch.log(torch.tensor(3.0))
    assert_close(-loss, (log_y.exp() * (log_px - 0.3 * kl)).sum(), **EXACT)


@float64
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_a_run_with_a_moving_weight_is_the_loop_by_hand(compile):
    x, weight = data(24), Linear(7)
    loader = DataLoader(TensorDataset(x), batch_size=8)
    ours, by_hand = vae(), vae()
    history = quiet(ours, loader, epochs=3, lr=1e-2, seed=2, kl_weight=weight, compile=compile)
    assert [row["kl_weight"] for row in history] == pytest.approx([weight(2), weight(5), weight(8)])
    adam = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    torch.manual_seed(2)
    step = 0
    for _ in range(3):
        for (batch,) in loader:
            with pyro.plate("data", 8):
                z = pyro.sample("z", by_hand.posterior(batch))
            log_q = reference.log_diagonal_normal(z, by_hand.posterior.eta(batch))
            kl = log_q - reference.log_standard_normal(z)
            log_px_z = reference.log_unit_normal(batch, by_hand.likelihood.eta(z))
            adam.zero_grad()
            (weight(step) * kl - log_px_z).sum().backward()
            adam.step()
            step += 1
    for (name, p), q in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_a_run_with_a_moving_weight_resumes_to_the_same_weights(tmp_path):
    settings = {"kl_weight": Linear(10), "batch_size": 10, "seed": 0}
    whole, resumed = vae(), vae()
    quiet(whole, data(), epochs=4, **settings)
    quiet(vae(), data(), epochs=3, run_dir=tmp_path, **settings)
    quiet(resumed, data(), epochs=4, run_dir=tmp_path, resume=True, **settings)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"kl_weight=Linear\(steps=10, start=0.0\), as the run to resume has"):
        quiet(vae(), data(), epochs=5, run_dir=tmp_path, resume=True, **{**settings, "kl_weight": Linear(11)})


def test_the_history_has_the_true_elbo():
    """With weights that hardly move, it is the same whatever is optimised."""
    rows = [
        quiet(vae(), data(), epochs=1, lr=1e-12, seed=0, **settings)[0]
        for settings in ({}, {"kl_weight": 0.0}, {"kl_weight": 3.0}, {"free_bits": 50.0})
    ]
    for row in rows[1:]:
        assert row["elbo"] == pytest.approx(rows[0]["elbo"], rel=1e-5)
        assert row["loss"] != pytest.approx(rows[0]["loss"], rel=1e-3)
    assert rows[1]["loss"] == pytest.approx(-rows[0]["log_px_z"], abs=1.0)


def test_a_weight_puts_the_kl_down_in_functions_of_anothers():
    mu, scale = torch.zeros(6, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    torch.nn.init.normal_(mu)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pyro.param("w", torch.randn(2, 6)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x @ pyro.param("mu", mu.detach().clone())
            pyro.sample("z", dist.Normal(loc, pyro.param("s", scale.detach().clone()).exp()).to_event(1))

    kl = {}
    for beta in (0.1, 10.0):
        torch.manual_seed(0)
        kl[beta] = quiet(as_program(model, guide), data(), epochs=60, lr=0.02, seed=0, kl_weight=beta)[-1]["kl"]
    assert kl[10.0] < 0.5 * kl[0.1]


@float64
def test_free_bits_are_those_of_their_elbo():
    ours, theirs = vae(), vae()
    settings = {"epochs": 3, "seed": 0, "batch_size": 10}
    quiet(ours, data(), free_bits=(0.5, 3), **settings)
    quiet(theirs, data(), elbo=FreeBits_ELBO(0.5, groups=3), **settings)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(data(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -0.5}, "kl_weight to be a number of at least 0, or a function of the step; got -0.5"),
        ({"kl_weight": "linear"}, "kl_weight to be a number of at least 0"),
        ({"kl_weight": Linear(100)}, "kl_weight to reach 1 within the 8 steps of training, .* got 0.07 at most"),
        ({"kl_weight": lambda step: 0.5}, "kl_weight to reach 1 within the 8 steps"),
        ({"kl_weight": lambda step: -1.0}, "kl_weight to give numbers of at least 0; got -1.0 in step 0"),
        ({"kl_weight": 0.5, "elbo": IWAE_ELBO(2)}, "kl_weight with an ELBO of Pyro's, as Trace_ELBO; got IWAE_ELBO"),
        ({"kl_weight": 0.5, "free_bits": 1.0}, "free_bits without kl_weight; got both"),
        ({"free_bits": 1.0, "elbo": Trace_ELBO()}, "free_bits without elbo; got both"),
        ({"free_bits": -1.0}, "nats to be a number of at least 0; got -1.0"),
        ({"free_bits": (1.0, 0)}, "groups to be a whole number of at least 1; got 0"),
        ({"free_bits": (1.0, 2)}, "groups to divide the 3 latents of site 'z'; got 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        quiet(vae(), data(), epochs=2, batch_size=10, **settings)


def test_a_moving_weight_needs_data_of_known_length(tmp_path):
    with pytest.raises(ValueError, match="train of known length with a kl_weight that moves"):
        quiet(vae(), DataLoader(Endless(), batch_size=2), epochs=2, kl_weight=Linear(2), run_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"elbo": IWAE_ELBO(2)}, {"free_bits": 1.0}])
def test_labels_are_summed_over_under_pyros_elbos_alone(settings):
    entry = zoo.LABELED["M2"]
    labeled = entry.data(6).float(), torch.arange(6) % 3
    with pytest.raises(ValueError, match=r"Expected (an ELBO of Pyro's with labeled|free_bits without labeled)"):
        quiet(entry.make(), entry.data(8).float(), labeled=labeled, epochs=1, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0), "steps to be a whole number of at least 1; got 0"),
        (lambda: Linear(3, -1.0), "start to be a number of at least 0; got -1.0"),
        (lambda: Cyclical(0), "period to be a whole number of at least 1; got 0"),
        (lambda: Cyclical(5, 1.0), "rising to be a number between 0 and 1; got 1.0"),
    ],
)
def test_schedules_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
