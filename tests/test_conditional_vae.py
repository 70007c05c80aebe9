"""A condition beside the data: never drawn, always given, and looked at."""

import pyro
import pytest
import torch
from torch.testing import assert_close

from pyrovae import (
    MLP,
    VAE,
    ConditionalVAE,
    compare,
    data,
    evaluate,
    fit,
    log_weights,
    one_hot,
    quadrant,
)
from pyrovae.conditionals import Bernoulli, DiagonalNormal, FullNormal, StandardNormal, UnitNormal
from pyrovae.quadrants import pixels_of

QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")


def binary(n, x_dim=6, seed=0):
    return torch.bernoulli(torch.full((n, x_dim), 0.4), generator=torch.Generator().manual_seed(seed))


def small() -> ConditionalVAE:
    return ConditionalVAE.mlp(6, 4, 3, (7,))


def batch(n, seed=0):
    return {"x": binary(n, seed=seed), "c": torch.rand(n, 4, generator=torch.Generator().manual_seed(seed))}


def linear(weight, bias, sigma):
    """N(weight parents + bias, sigma^2 I)."""
    out_dim, in_dim = weight.shape
    net = MLP(in_dim, 2 * out_dim, hidden=())
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
        net.layers[0].bias.copy_(torch.cat([bias, sigma.log()]))
    return DiagonalNormal(net)


@pytest.mark.usefixtures("float64")
def test_with_the_exact_posterior_every_weight_is_p_of_x_given_c():
    """z ~ N(A c, s_z^2), x ~ N(w z + B c, s_x^2) with w diagonal: p(x | c) = N(w A c + B c, w^2 s_z^2 + s_x^2)."""
    a, b, w, s_z, s_x = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2), torch.rand(2) + 0.5, torch.rand(2) + 0.5
    variance = 1 / (1 / s_z**2 + w**2 / s_x**2)
    of_x, zero = variance * w / s_x**2, torch.zeros(2)
    of_c = (variance / s_z**2).diag() @ a - of_x.diag() @ b
    program = ConditionalVAE(
        linear(a, zero, s_z),
        linear(torch.cat([w.diag(), b], 1), zero, s_x),
        linear(torch.cat([of_x.diag(), of_c], 1), zero, variance.sqrt()),
        c_dim=3,
    )
    x, c = torch.randn(5, 2), torch.randn(5, 3)
    exact = torch.distributions.Normal(c @ (a.T * w + b.T), (w**2 * s_z**2 + s_x**2).sqrt()).log_prob(x).sum(1)
    assert_close(log_weights(program, {"x": x, "c": c}, 10), exact.expand(10, -1), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_with_a_constant_condition_it_is_a_vae():
    """Its networks fold the condition into their first bias."""
    program, c = small(), torch.tensor([0.3, -1.0, 2.0, 0.5])
    with torch.no_grad():
        program.prior.net.layers[-1].weight.zero_()

    def folded(part, dim):
        net = MLP(dim, part.net.out_dim, part.net.hidden)
        state = part.net.state_dict()
        weight = state["layers.0.weight"]
        first = {"layers.0.weight": weight[:, :dim], "layers.0.bias": state["layers.0.bias"] + weight[:, dim:] @ c}
        net.load_state_dict(state | first)
        return type(part)(net)

    vae = VAE(StandardNormal(3), folded(program.likelihood, 3), folded(program.posterior, 6))
    x, weights = binary(5).double(), []
    for each, rows in ((vae, {"x": x}), (program, {"x": x, "c": c.expand(5, -1)})):
        torch.manual_seed(1)
        weights.append(log_weights(each, rows, 4))
    assert_close(*weights, rtol=0, atol=1e-12)


def test_samples_are_of_their_own_condition():
    """A likelihood whose mean is c."""
    net = MLP(2 + 3, 3, hidden=())
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.cat([torch.zeros(3, 2), torch.eye(3)], 1))
    program = ConditionalVAE(DiagonalNormal.mlp(3, 2), UnitNormal(net), DiagonalNormal.mlp(6, 2), c_dim=3)
    c = torch.randn(20, 3)
    assert_close(program.sample(20, c=c, mean=True), c)
    assert_close(program.reconstruct({"x": torch.zeros(20, 3), "c": c}), c)
    assert_close(program.sample(4, like={"x": torch.zeros(20, 3), "c": c}, mean=True), c[:1].expand(4, -1))
    prior = program.prior(c).mean
    codes = program.encode({"x": torch.zeros(20, 3), "c": c})
    assert codes.shape == prior.shape
    assert_close(codes, program.posterior(torch.zeros(20, 3), c).mean.detach())


def test_it_learns_what_the_condition_tells():
    """x is one of three patterns, c says which: log p(x | c) rises towards that of pixels flipped at 5%."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.bernoulli(torch.full((3, 12), 0.5), generator=generator)
    y = torch.randint(3, (600,), generator=generator)
    x = torch.bernoulli((patterns[y] - 0.05).abs(), generator=generator)
    program = ConditionalVAE.mlp(12, 3, 2, (20,))
    rows = {"x": x, "c": one_hot(y, 3)}
    fit(program, rows, epochs=30, batch_size=50, lr=1e-2, seed=0, progress=False)
    entropy = -12 * (0.05 * torch.tensor(0.05).log() + 0.95 * torch.tensor(0.95).log())
    assert -evaluate(program, rows, 200, seed=0, progress=False).log_px.mean() < entropy + 0.4
    drawn = program.sample(3, c=torch.eye(3), mean=True)
    assert torch.equal(drawn.round(), patterns)
    wrong = {"x": x, "c": one_hot((y + 1) % 3, 3)}
    assert -evaluate(program, wrong, 200, seed=0, progress=False).log_px.mean() > entropy + 3


def test_a_compiled_evaluation_sees_the_condition_of_every_chunk():
    program, rows = small(), batch(40)
    plain, compiled = (
        evaluate(program, rows, 5000, batch_size=20, seed=0, compile=compile, progress=False).log_px
        for compile in (False, True)
    )
    assert_close(compiled, plain, rtol=0, atol=1e-4)


def test_only_x_is_binarized():
    rows = {"x": torch.rand(50, 6), "c": torch.rand(50, 4)}
    shown = next(data.Data(rows, dynamic=True).batches(50))
    assert shown["x"].unique().tolist() == [0, 1]
    assert torch.equal(shown["c"], rows["c"])
    fit(small(), data.Data(rows, dynamic=True), batch(10), epochs=1, progress=False)


@pytest.mark.usefixtures("float64")
def test_reference_of_other_families_and_none():
    program = ConditionalVAE(FullNormal.mlp(4, 3), UnitNormal.mlp(7, 6), FullNormal.mlp(10, 3), c_dim=4)
    rows = {"x": torch.randn(5, 6), "c": torch.randn(5, 4)}
    assert compare(program, rows, (1, 10), seed=0, progress=False).difference < 1e-12

    class Mine(Bernoulli):
        pass

    mine = ConditionalVAE(program.prior, Mine.mlp(7, 6), program.posterior, c_dim=4)
    assert mine.reference_elbo(rows["x"], torch.zeros(5, 3), rows["c"]) is None


def quietly(function, *args, **kwargs):
    return function(small(), *args, progress=False, **kwargs)


def parts():
    return DiagonalNormal.mlp(4, 3), Bernoulli.mlp(7, 6), DiagonalNormal.mlp(10, 3)


NO_C = "missing a required argument: 'c'"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConditionalVAE.mlp(6, 0, 3), "c_dim"),
        (lambda: ConditionalVAE(*parts(), c_dim=-1), "Expected c_dim to be a positive whole number; got -1"),
        (lambda: small().sample(3), r"Expected like=a batch, or as conditions c=\.\.\., for the model needs c; got no"),
        (lambda: small().sample(3, c=torch.rand(2, 4)), r"Expected c to have n=3 rows.*; got \(2, 4\)"),
        (lambda: small().sample(3, c=torch.rand(3, 5)), r"Expected c to be .* \(N, 4\).*; got \(3, 5\)"),
        (lambda: small().sample(3, c=torch.rand(3)), r"Expected c to be .* \(N, 4\).*; got \(3,\)"),
        (lambda: small().sample(3, c=2), r"Expected c to be .* \(N, 4\), classes one-hot; got \(3,\) of torch.int64"),
        (lambda: quietly(fit, binary(5), epochs=1), NO_C),
        (lambda: quietly(fit, batch(5), binary(5), epochs=1), NO_C),
        (lambda: quietly(evaluate, binary(5), 2), NO_C),
        (lambda: quietly(compare, binary(5), 2), NO_C),
        (lambda: log_weights(small(), binary(5), 2), NO_C),
        (lambda: small().encode(binary(5)), NO_C),
        (lambda: small().reconstruct(binary(5)), NO_C),
        (lambda: quietly(evaluate, {"x": binary(5), "c": torch.rand(4, 4)}, 2), "got {'x': 5, 'c': 4}"),
        (lambda: quietly(evaluate, {"x": binary(5), "c": torch.rand(5, 3)}, 2), r"Expected c to be .*got \(5, 3\)"),
        (lambda: quietly(fit, {"x": binary(5), "c": torch.zeros(5).long()}, epochs=1), r"classes one-hot; got \(5,\)"),
        (lambda: small().model(torch.rand(5, 4), binary(3)), "Expected c to have a row for each of the 3 data in x; "),
        (lambda: small().guide(binary(3), torch.rand(5, 4)), "Expected c to have a row for each of the 3 data in x; "),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- quadrants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 5, 3)])
def test_quadrants_part_the_image(shape):
    masks = torch.stack([pixels_of(shape, which) for which in QUADRANTS])
    assert (masks.sum(0) == 1).all()
    _, height, width = shape
    rows, columns = slice(height // 2), slice(width // 2, None)
    image = torch.zeros(shape, dtype=torch.bool)
    image[:, rows, columns] = True
    assert torch.equal(masks[1], image.flatten())


def test_a_cut_keeps_every_pixel_and_all_else():
    x, y = torch.rand(5, 24), torch.arange(5)
    cut = quadrant((x, y), (1, 4, 6), "bottom-left")
    assert cut.fixed
    inside = pixels_of((1, 4, 6), "bottom-left")
    assert torch.equal(cut["c"], x[:, inside])
    assert torch.equal(cut["x"], x[:, ~inside])
    assert torch.equal(cut["y"], y)


def test_dynamic_data_are_cut_as_they_are_drawn():
    whole = data.Data(torch.rand(200, 24), dynamic=True)
    cut = quadrant(whole, (1, 4, 6), "top-left")
    drawn, parts = (
        next(each.batches(200, shuffle=torch.Generator().manual_seed(1))) for each in (whole, cut.rows(slice(None)))
    )
    inside = pixels_of((1, 4, 6), "top-left")
    assert torch.equal(parts["c"], drawn["x"][:, inside])
    assert torch.equal(parts["x"], drawn["x"][:, ~inside])
    program = ConditionalVAE.mlp(18, 6, 2, (5,))
    history = fit(program, cut, quadrant(drawn, (1, 4, 6), "top-left"), epochs=2, progress=False)
    assert len(history) == 2


def test_what_was_shown_before_is_cut():
    flipped = data.Data(torch.rand(5, 24), show=lambda batch: {"x": 1 - batch["x"]})
    shown = next(quadrant(flipped, (1, 4, 6), "top-left").batches(5))
    assert torch.equal(shown["c"], 1 - flipped["x"][:, pixels_of((1, 4, 6), "top-left")])


@pytest.mark.parametrize(
    ("rows", "shape", "which", "message"),
    [
        (torch.rand(5, 24), (1, 4, 6), "left", "Expected which to be one of top-left, .*; got 'left'"),
        (torch.rand(5, 24), (4, 6), "top-left", r"Expected shape to be \(channels, height, width\).*; got \(4, 6\)"),
        (torch.rand(5, 24), (1, 24, 1), "top-left", r"both at least 2; got \(1, 24, 1\)"),
        (torch.rand(5, 24), (1, 5, 5), "top-left", r"Expected data with images x \(N, 25\).*got {'x': \(5, 24\)}"),
        ({"z": torch.rand(5, 24)}, (1, 4, 6), "top-left", "Expected data with images x"),
    ],
)
def test_images_that_cannot_be_cut(rows, shape, which, message):
    with pytest.raises(ValueError, match=message):
        quadrant(rows, shape, which)


def test_the_condition_is_no_site():

    trace = pyro.poutine.trace(small().model).get_trace(**batch(3))
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == {"data", "z", "x"}
