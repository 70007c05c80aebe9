"""DRAW: against hand-written sums, an exact likelihood, and torch's own LSTM."""

import itertools

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyrovae import DRAW, CompiledTrace_ELBO, compiled, evaluate, fit, log_weights, reference
from pyrovae.conditionals.conditional import networks_in
from pyrovae.models.draw import _lstm
from pyrovae.traces import sample_sites


def scattered(*args, scale=0.3, **options) -> DRAW:
    """A DRAW whose grids, starts and patches differ from datum to datum."""
    program = DRAW(*args, **options)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return program


def binary(n, dim):
    return (torch.rand(n, dim) < 0.5).to(torch.get_default_dtype())


@pytest.mark.parametrize(
    ("shape", "read_size", "write_size"), [((1, 4, 3), 2, 3), ((3, 2, 5), 1, 2), ((2, 1, 1), 3, 1)], ids=str
)
@pytest.mark.usefixtures("float64")
def test_the_reference_holds_for_channels_sizes_and_particles(shape, read_size, write_size):
    """Five particles at once, in value and gradient; the reference has an attention of its own."""
    program = scattered(shape, 3, 3, 6, read_size, write_size)
    x = binary(4, program.canvas.numel())
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(program.guide).get_trace(x)
    latents = {name: site["value"].detach() for name, site in sample_sites(trace).items()}
    assert [tuple(z.shape) for z in latents.values()] == [(5, 4, 3)] * 3
    by_hand = program.reference_elbo(x, **latents)
    model, guide = (pyro.plate("particles", 5, dim=-2)(f) for f in (program.model, program.guide))
    loss = Trace_ELBO().differentiable_loss(model, poutine.replay(guide, trace=trace), x)
    assert by_hand.shape == (5, 4)
    assert_close(-loss, by_hand.sum(), rtol=0, atol=1e-10)
    parameters = list(program.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (-loss, by_hand.sum()))
    for ours, hand in zip(*gradients, strict=True):
        assert_close(ours, hand, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_the_lstm_is_torchs():
    gates, cell = nn.Linear(3 + 2 + 4, 16), nn.LSTMCell(5, 4)
    with torch.no_grad():
        cell.weight_ih.copy_(gates.weight[:, :5])
        cell.weight_hh.copy_(gates.weight[:, 5:])
        cell.bias_ih.copy_(gates.bias)
        cell.bias_hh.zero_()
    a, b, h, c = torch.randn(7, 3), torch.randn(7, 2), torch.randn(7, 4), torch.randn(7, 4)
    for ours, theirs in zip(_lstm(gates, (h, c), a, b), cell(torch.cat([a, b], -1), (h, c)), strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_canvas_is_the_sum_of_what_is_written():
    """Whatever T: c_0 and one write for each glimpse, the reference's filters giving each."""
    program = scattered((1, 5, 4), 2, 4, 6)
    trace = poutine.trace(program.model).get_trace(binary(3, 20))
    state = tuple(start.expand(3, -1) for start in program.decoder_start)
    canvas = program.canvas.expand(3, -1)
    for t in range(4):
        gates = program.decoder(torch.cat([trace.nodes[f"z_{t + 1}"]["value"], state[0]], -1))
        state = reference.draw.lstm(gates, state[1])
        canvas = canvas + reference.draw.written(program.patch(state[0]), program.write_grid(state[0]), (1, 5, 4), 5)
    assert_close(trace.nodes["x"]["fn"].base_dist.logits, canvas, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_drawing_that_writes_nothing_has_an_exact_likelihood():
    """Patches of 0, and q = N(0, I): every log-weight is log Bernoulli(x; sigmoid(c_0))."""
    mean, x = torch.linspace(0.1, 0.9, 6), binary(4, 6)
    program = DRAW((1, 3, 2), 2, 3, 5).start_at(mean)
    with torch.no_grad():
        for layer in (program.patch, program.posterior.net.layers[-1]):
            layer.weight.zero_()
            layer.bias.zero_()
    exact = (x * mean.log() + (1 - x) * (1 - mean).log()).sum(-1)
    assert_close(log_weights(program, x, 3), exact.expand(3, -1), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_probabilities_of_all_images_sum_to_one():
    program = scattered((1, 2, 2), 2, 2, 6, write_size=2)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    fit(program, program.sample(400), epochs=8, lr=0.01, seed=0, progress=False)
    result = evaluate(program, x, 4000, seed=0, progress=False)
    p = result.log_px.exp()
    error = (p * result.standard_error).square().sum().sqrt()
    assert abs(p.sum() - 1) < 5 * error, "seed 0"
    assert error < 0.01


def test_canvases_end_in_the_mean_and_begin_with_one_write():
    program = scattered((2, 5, 4), 2, 3, 6, scale=0.1)
    torch.manual_seed(3)
    drawing = program.canvases(6)
    torch.manual_seed(3)
    assert_close(drawing.images[-1], program.sample(6, mean=True))
    assert drawing.images.shape == (3, 6, 40)
    assert drawing.writes.shape == (3, 6, 4)
    assert drawing.reads is None
    one = DRAW((2, 5, 4), 2, 1, 6)
    one.load_state_dict(program.state_dict())
    torch.manual_seed(3)
    first = one.canvases(6).images
    torch.manual_seed(3)
    assert_close(first[0], program.canvases(6).images[0])


def test_canvases_of_images_end_in_the_mean_at_the_guides_draw():
    program, x = scattered((1, 5, 4), 2, 3, 6, scale=0.1), binary(6, 20)
    torch.manual_seed(3)
    drawing = program.canvases_of(x)
    torch.manual_seed(3)
    trace = poutine.trace(program.guide).get_trace(x)
    mean = poutine.trace(poutine.replay(program.model, trace=trace)).get_trace(x).nodes["x"]["fn"].mean
    assert_close(drawing.images[-1], mean)
    assert drawing.reads.shape == drawing.writes.shape == (3, 6, 4)
    assert_close(drawing.reads[0], drawing.reads[0, :1].expand(6, -1))  # nothing is known before the first glimpse
    assert (drawing.reads[1:].std(1) > 0).all()


@pytest.mark.parametrize("name", ["read_grid", "write_grid"])
def test_first_grids_see_the_whole_image(name):
    program = DRAW((1, 28, 28))
    with torch.no_grad():
        getattr(program, name).weight.zero_()
    drawing = program.canvases_of(binary(2, 784))
    windows = drawing.reads if name == "read_grid" else drawing.writes
    assert_close(windows, torch.tensor([0.0, 0.0, 28.0, 28.0]).expand(10, 2, 4), rtol=0, atol=1e-4)


def test_a_constant_patch_first_writes_about_itself():
    """In the middle of the image, where filters overlap as tiles do."""
    program = DRAW((1, 28, 28))
    with torch.no_grad():
        program.write_grid.weight.zero_()
        program.patch.weight.zero_()
        program.patch.bias.fill_(2.0)
    middle = program.write(torch.zeros(256)).view(28, 28)[9:19, 9:19]
    assert_close(middle, torch.full((10, 10), 2.0), rtol=0.05, atol=0)


def test_training_starts_at_the_mean_of_the_data():
    mean = torch.tensor([0.0, 0.2, 0.9, 1.0])
    program = DRAW((1, 2, 2)).start_at(mean)
    assert_close(program.canvas.sigmoid(), mean.clamp(0.001, 0.999))
    with pytest.raises(ValueError, match=r"Expected mean of shape \(4,\); got \(3,\)"):
        program.start_at(mean[:3])


def test_linear_maps_run_in_bfloat16_and_nothing_else():
    program, x = scattered((1, 5, 4), 3, 3, 8, scale=0.1), binary(6, 20)
    latents = {f"z_{t + 1}": torch.randn(6, 3) for t in range(3)}
    model = poutine.condition(program.model, latents)
    logits = []
    for precision in ("32-true", "bf16-mixed"):
        with networks_in(precision):
            logits.append(poutine.trace(model).get_trace(x).nodes["x"]["fn"].base_dist.logits)
    assert logits[1].dtype == torch.float32
    assert not torch.equal(*logits)
    assert_close(*logits, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("float64")
def test_its_graph_has_the_loss_gradients_and_noise_of_the_program(monkeypatch):
    """The graph as it is traced, run without the C++ compiler, which takes minutes for so many small kernels."""
    monkeypatch.setattr(compiled, "compile_graph", lambda graph, tensors: graph)
    program = scattered((1, 4, 3), 2, 2, 5)
    parameters, elbo = list(program.parameters()), CompiledTrace_ELBO()
    elbo(program.model, program.guide)(binary(4, 12))  # makes all parameters
    for x in (binary(4, 12), binary(4, 12)):
        found = []
        for each in (elbo, Trace_ELBO()):
            torch.manual_seed(1)
            loss = each(program.model, program.guide)(x)
            found += [[loss, torch.get_rng_state(), *torch.autograd.grad(loss, parameters)]]
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert elbo.num_traces == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (28, 28)}, r"Expected image_shape to be \(channels, height, width\); got \(28, 28\)"),
        ({"image_shape": (1, 0, 2)}, r"Expected image_shape\[1\] to be a positive whole number; got 0"),
        *(
            ({name: 0}, f"Expected {name} to be a positive whole number; got 0")
            for name in ("z_dim", "num_glimpses", "hidden", "read_size", "write_size")
        ),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        DRAW(**{"image_shape": (1, 3, 2)} | arguments)


def test_bad_data():
    program = DRAW((1, 3, 2), 2, 1, 5)
    for run in (program.model, program.guide, program.canvases_of):
        with pytest.raises(ValueError, match=r"Expected x to be images of shape \(N, 6\), flattened .*; got \(4, 5\)"):
            run(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="Expected n to be a positive whole number; got 0"):
        program.canvases(0)
