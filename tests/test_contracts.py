"""What every program of the zoo must do."""

import pyro
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import SVI, Trace_ELBO
from torch.testing import assert_close

import pyrovae
from pyrovae import checkpoint, configuration, fit, log_weights
from pyrovae.survey import Survey, draw
from pyrovae.traces import sample_sites

everyone = pytest.mark.parametrize("entry", zoo.PROGRAMS.values(), ids=zoo.PROGRAMS)


def equal_states(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@everyone
@pytest.mark.usefixtures("float64")
def test_reference_and_trace_elbo_agree_in_value_and_gradient(entry):
    """Must hold to 1e-10 at the guide's own latents, for every posterior with every likelihood."""
    program, batch = entry.make().eval(), entry.batch(5)  # a normalizer that training estimates anew stands still
    trace = poutine.trace(program.guide).get_trace(**batch)
    loss = Trace_ELBO().differentiable_loss(program.model, poutine.replay(program.guide, trace=trace), **batch)
    latents = {name: site["value"].detach() for name, site in sample_sites(trace).items()}
    by_hand = program.reference_elbo(**batch, **latents).sum()
    assert_close(-loss, by_hand, rtol=0, atol=1e-10)
    parameters = list(program.parameters())
    for ours, hand in zip(
        torch.autograd.grad(-loss, parameters), torch.autograd.grad(by_hand, parameters), strict=True
    ):
        assert_close(ours, hand, rtol=0, atol=1e-10)


@everyone
@pytest.mark.usefixtures("float64")
def test_log_weights_are_those_of_plain_traces(entry):
    """Particles together, through our reader, equal Pyro's own log_prob_sum for one particle and one datum."""
    program, batch = entry.make().eval(), entry.batch(4)
    survey = Survey.of(program, batch)
    drawn = draw(program, batch, 3, survey)
    assert drawn.log_weights.shape == (3, 4)
    for k in range(3):
        for i in range(4):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            latents = {name: site["value"][k, i : i + 1] for name, site in drawn.guide_sites.items()}
            guide = poutine.trace(poutine.condition(program.guide, latents)).get_trace(**one)
            model = poutine.trace(poutine.condition(program.model, latents)).get_trace(**one)
            expected = model.log_prob_sum() - guide.log_prob_sum()
            assert_close(drawn.log_weights[k, i], expected, rtol=0, atol=1e-10)


@everyone
def test_particles_run_together(entry):
    assert Survey.of(entry.make(), entry.batch(3)).vectorized


@everyone
@pytest.mark.usefixtures("float64")
def test_each_datum_has_its_own_weight(entry):
    """d log w_i / d x_j is exactly zero for i != j, under the same noise."""
    program, batch = entry.make(), entry.batch(3)
    survey = Survey.of(program, batch)

    floating = {key: value for key, value in batch.items() if value.is_floating_point()}

    def weights(*values):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            given = batch | dict(zip(floating, values, strict=True))
            return draw(program, given, 2, survey).log_weights.sum(0)

    with pyro.validation_enabled(False):
        jacobians = torch.autograd.functional.jacobian(weights, tuple(floating.values()))
    for jacobian in (each.flatten(2) for each in jacobians):
        across = jacobian.abs().sum(-1)
        assert torch.equal(across, across.diag().diag())
        assert (across.diag() > 0).all()


@everyone
def test_trains_saves_loads_and_evaluates(entry, tmp_path):
    program, data = entry.make(), entry.batch(30)
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    history = fit(program, data, entry.batch(10, seed=1), epochs=3, batch_size=8, seed=0, progress=False)
    unchanged = [name for name, p in program.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    assert [row["epoch"] for row in history] == [1, 2, 3]
    pyrovae.save(program, tmp_path / "a.safetensors")
    loaded = pyrovae.load(tmp_path / "a.safetensors")
    assert equal_states(program, loaded)
    first, second = (pyrovae.evaluate(p, data, 30, seed=3, progress=False) for p in (program, loaded))
    assert torch.equal(first.log_px, second.log_px)
    assert (first.log_px >= first.elbo - 1e-4).all()


@everyone
def test_resumes_to_the_same_weights(entry, tmp_path):
    data, val = entry.batch(30), entry.batch(10, seed=1)
    settings = {"batch_size": 8, "seed": 0, "progress": False}
    torch.manual_seed(5)
    whole = entry.make()
    history = fit(whole, data, val, epochs=4, run_dir=tmp_path / "whole", **settings)
    torch.manual_seed(5)
    fit(entry.make(), data, val, epochs=2, run_dir=tmp_path / "halves", **settings)
    resumed = entry.make()
    again = fit(resumed, data, val, epochs=4, run_dir=tmp_path / "halves", resume=True, **settings)
    assert equal_states(whole, resumed)
    assert [row["val_elbo"] for row in again] == [row["val_elbo"] for row in history]
    files = [(tmp_path / run / checkpoint.WEIGHTS).read_bytes() for run in ("whole", "halves")]
    assert files[0] == files[1]


@everyone
@pytest.mark.usefixtures("float64")
def test_fit_is_plain_svi(entry):
    """The same program, seed and Adam through pyro.infer.SVI and through fit: the same parameters after 100 steps."""
    data = entry.batch(40)
    rows = [{key: value[i] for key, value in data.items()} for i in range(40)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    torch.manual_seed(1)
    ours, plain = entry.make(), entry.make()
    plain.load_state_dict(ours.state_dict())

    def model(**batch):
        pyro.module("program", plain)
        return plain.model(**batch)

    svi = SVI(model, plain.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    pyro.set_rng_seed(2)
    for _ in range(20):
        for batch in loader:
            svi.step(**batch)
    fit(ours, loader, epochs=20, lr=1e-3, seed=2, progress=False)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_close(p, q, rtol=1e-9, atol=1e-10, msg=name)


@everyone
def test_samples_encodes_reconstructs(entry):
    program, batch = entry.make(), entry.batch(5)
    given = {key: value[:1].expand(2000, *value.shape[1:]) for key, value in batch.items() if key != "x"}
    torch.manual_seed(0)
    drawn = program.sample(2000, **given)
    torch.manual_seed(0)
    mean = program.sample(2000, mean=True, **given)
    error = (drawn - mean).std(0) / 2000**0.5
    assert ((drawn - mean).mean(0).abs() <= 5 * error).all(), "seed 0: samples scatter about E[x | z] at the same z"
    first, *others = sample_sites(poutine.trace(program.guide).get_trace(**batch))
    codes = program.encode(batch, first)
    draws = torch.stack([program.encode(batch, first, sample=True) for _ in range(500)])
    assert ((draws.mean(0) - codes).abs() <= 5 * draws.std(0) / 500**0.5).all(), "seed 0"
    latents = {first: codes} | {name: program.encode(batch, name) for name in others}
    trace = poutine.trace(poutine.condition(program.model, latents)).get_trace(**batch)
    torch.manual_seed(1)
    reconstruction = program.reconstruct(batch)
    torch.manual_seed(1)
    assert_close(reconstruction, mean_or_draw(trace.nodes["x"]["fn"]))


def mean_or_draw(likelihood):
    try:
        return likelihood.mean.detach()
    except NotImplementedError:
        return likelihood.sample()


@everyone
def test_configuration_builds_the_same_class(entry):
    program = entry.make()
    config = configuration.describe(program)
    again = configuration.build(config)
    assert configuration.describe(again) == config
    again.load_state_dict(program.state_dict())
    batch = entry.batch(3)
    torch.manual_seed(0)
    first = log_weights(program, batch, 2)
    torch.manual_seed(0)
    assert torch.equal(first, log_weights(again, batch, 2))
