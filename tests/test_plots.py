"""Pictures say what the data say: their lines, points and pixels are the values themselves."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyrovae import DRAW, VAE, ConditionalVAE, LinearGaussian, SemiSupervisedVAE, compare, fit, one_hot, plots, quadrant
from pyrovae.compare import Bound, Comparison
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal, UnitNormal
from pyrovae.models.draw import Drawing

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _seeded_and_no_figure_left_open():
    pyplot.close("all")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    assert pyplot.get_fignums() == []


class Constant(nn.Module):
    """The same eta, whatever z."""

    def __init__(self, eta: Tensor):
        super().__init__()
        self.register_buffer("eta", eta)

    def forward(self, z: Tensor) -> Tensor:
        return self.eta.expand(len(z), -1)


def constant_vae(mean: Tensor, z_dim: int = 2) -> VAE:
    """A VAE that decodes to this mean alone: a Bernoulli where it lies in (0, 1), else a UnitNormal."""
    inside = bool(((mean > 0) & (mean < 1)).all())
    likelihood = Bernoulli(Constant(torch.logit(mean))) if inside else UnitNormal(Constant(mean))
    return VAE(StandardNormal(z_dim), likelihood, DiagonalNormal.mlp(len(mean), z_dim, hidden=(5,)))


def pixels(figure: Figure, panel: int = 0) -> np.ndarray:
    (image,) = figure.axes[panel].images
    return np.asarray(image.get_array())


def by_hand(images: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Images (N, H, W, C) row by row, in a frame of grey lines one pixel wide."""
    _, height, width, channels = images.shape
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.5, np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        for y in range(height):
            for x in range(width):
                grid[1 + row * (height + 1) + y, 1 + column * (width + 1) + x] = image[y, x]
    return grid.squeeze(-1) if channels == 1 else grid


GREY, COLOUR = (1, 2, 3), (3, 2, 2)


def as_image(x: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return x.reshape(-1, *shape).permute(0, 2, 3, 1).numpy()


# --- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (10, 4, 3)])
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_samples_of_a_known_decoder(shape, n, columns, rows):
    mean = torch.linspace(0.05, 0.9, int(np.prod(shape)))
    figure = plots.samples(constant_vae(mean), n, shape)
    assert isinstance(figure, Figure)
    expected = by_hand(as_image(mean.expand(n, -1), shape), columns, rows)
    np.testing.assert_allclose(pixels(figure), expected, atol=1e-6)
    assert figure.axes[0].get_title() == f"{n} samples from VAE"


def test_samples_are_the_programs_own():
    program = LinearGaussian(6, 2)
    with torch.random.fork_rng():
        figure = plots.samples(program, 4, GREY)
    expected = by_hand(as_image(program.sample(4, mean=True), GREY), 2, 2)
    np.testing.assert_allclose(pixels(figure), expected, atol=1e-6)


def test_samples_without_a_shape_are_rows_of_a_matrix():
    mean = torch.linspace(0.05, 0.9, 6)
    figure = plots.samples(constant_vae(mean), 7)
    np.testing.assert_allclose(pixels(figure), mean.expand(7, -1).numpy(), atol=1e-6)


def test_grey_is_between_black_at_0_and_white_at_1():
    """Not stretched over the values that happen to occur."""
    (image,) = plots.samples(constant_vae(torch.full((6,), 0.4)), 4, GREY).axes[0].images
    assert (image.get_clim(), image.get_cmap().name) == ((0, 1), "gray")


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_pixels_of_an_image_are_square(scale):
    """Whatever the range of the values."""
    figure = plots.samples(constant_vae(torch.linspace(0.1, 1.9, 6) * scale), 4, GREY)
    assert figure.axes[0].get_aspect() == 1


@pytest.mark.parametrize("n", [2, 5, 9])
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_reconstructions_are_below_the_data(shape, n):
    mean, x = torch.linspace(0.05, 0.9, int(np.prod(shape))), torch.rand(5, int(np.prod(shape)))
    figure = plots.reconstructions(constant_vae(mean), x, shape, n=n)
    shown = min(n, 5)
    expected = by_hand(as_image(torch.cat([x[:shown], mean.expand(shown, -1)]), shape), shown, 2)
    np.testing.assert_allclose(pixels(figure), expected, atol=1e-6)


def test_completions_keep_the_quadrant_between_nothing_and_the_truth():
    """Of a decoder that knows one mean."""
    shape, x, mean = (1, 2, 4), torch.rand(5, 8), torch.linspace(0.1, 0.9, 6)
    program = ConditionalVAE(
        DiagonalNormal.mlp(2, 3), Bernoulli(Constant(torch.logit(mean))), DiagonalNormal.mlp(8, 3), c_dim=2
    )
    figure = plots.completions(program, quadrant(x, shape, "top-right"), shape, "top-right", n=3, draws=2)
    given, drawn = torch.full((3, 8), 0.5), torch.empty(3, 8)
    given[:, 2:4] = x[:3, 2:4]
    drawn[:, [0, 1, 4, 5, 6, 7]], drawn[:, 2:4] = mean, x[:3, 2:4]
    rows = torch.stack([given, drawn, drawn, x[:3]], 1).flatten(0, 1)
    np.testing.assert_allclose(pixels(figure), by_hand(as_image(rows, shape), 4, 3), atol=1e-6)
    with pytest.raises(ValueError, match=r"Expected data that quadrant\(data, \(1, 2, 4\), 'top-left'\) cuts; got .*8"):
        plots.completions(program, x, shape, "top-left")


def test_reconstructions_without_a_shape_are_two_matrices():
    program, x = LinearGaussian(6, 2), torch.randn(12, 6)
    figure = plots.reconstructions(program, {"x": x})
    assert [axes.get_title() for axes in figure.axes] == ["data", "reconstructions"]
    np.testing.assert_allclose(pixels(figure, 0), x[:10].numpy(), atol=1e-6)
    np.testing.assert_allclose(pixels(figure, 1), program.reconstruct(x[:10]).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 2, 3), (1, 28, 28)])
def test_images_of_the_wrong_shape(shape):
    program = constant_vae(torch.linspace(0.05, 0.9, 6))
    with pytest.raises(ValueError, match=rf"Expected shape to hold 6 values; got \({shape[0]}, {shape[1]}, "):
        plots.samples(program, 4, shape)
    with pytest.raises(ValueError, match="Expected shape to hold 6 values"):
        plots.reconstructions(program, torch.rand(5, 6), shape)


def test_errors_of_the_program_pass_through():
    program = constant_vae(torch.linspace(0.05, 0.9, 6))
    with pytest.raises(ValueError, match="Expected n to be a whole number of at least 1; got 0"):
        plots.samples(program, 0, GREY)
    with pytest.raises(ValueError, match="Expected x to hold at least one datum"):
        plots.reconstructions(program, torch.rand(0, 6), GREY)
    with pytest.raises(ValueError, match="Expected site to be one of z; got 'w'"):
        plots.latent_space(program, torch.rand(5, 6), site="w")


# --- the latent space ------------------------------------------------------------------------------


def points(figure: Figure) -> np.ndarray:
    (dots,) = figure.axes[0].collections
    return np.asarray(dots.get_offsets())


def test_two_latents_are_shown_as_they_are():
    program, x = LinearGaussian(5, 2), torch.randn(40, 5)
    figure = plots.latent_space(program, x)
    np.testing.assert_allclose(points(figure), program.encode(x).numpy(), atol=1e-6)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("z[0]", "z[1]")
    assert figure.axes[0].get_legend() is None


def test_one_latent_lies_on_a_line():
    program, x = LinearGaussian(5, 1), torch.randn(40, 5)
    found = points(plots.latent_space(program, {"x": x}))
    np.testing.assert_allclose(found[:, 0], program.encode(x).flatten().numpy(), atol=1e-6)
    assert not found[:, 1].any()


def test_more_latents_are_shown_by_their_principal_components():
    program, x = LinearGaussian(8, 4), 3 * torch.randn(40, 8)
    figure = plots.latent_space(program, x)
    means = program.encode(x).double().numpy()
    u, s, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
    found, expected = points(figure), u[:, :2] * s[:2]
    signs = np.sign((found * expected).sum(0))  # of a component, which is known up to it
    np.testing.assert_allclose(found * signs, expected, atol=1e-5)
    shares = s**2 / (s**2).sum()
    labels = (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())
    assert labels == tuple(f"component {i + 1} ({shares[i]:.0%})" for i in range(2))


def test_labels_are_colours_with_a_legend():
    program, x, y = LinearGaussian(5, 2), torch.randn(40, 5), torch.arange(40) % 3
    figure = plots.latent_space(program, x, y)
    (dots,) = figure.axes[0].collections
    assert np.asarray(dots.get_array()).tolist() == y.tolist()
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ["".join(filter(str.isdigit, name)) for name in names] == ["0", "1", "2"]
    np.testing.assert_allclose(points(figure), program.encode(x).numpy(), atol=1e-6)


# --- curves ----------------------------------------------------------------------------------------


def history(validation: bool) -> list[dict[str, float]]:
    names = ["elbo", "log_px_z", "kl"]
    names += [f"val_{name}" for name in names] if validation else []
    values = np.random.default_rng(0).normal(size=(6, len(names)))
    return [{"epoch": 3 + i} | dict(zip(names, row.tolist(), strict=True)) for i, row in enumerate(values)]


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


@pytest.mark.parametrize("validation", [False, True])
def test_learning_curves_carry_the_history(validation):
    rows = history(validation)
    figure = plots.learning_curves(rows)
    assert isinstance(figure, Figure)
    epochs = [3, 4, 5, 6, 7, 8]
    for axes, name in zip(figure.axes, ("elbo", "log_px_z", "kl"), strict=True):
        expected = {"training": (epochs, [row[name] for row in rows])}
        if validation:
            expected["validation"] = (epochs, [row[f"val_{name}"] for row in rows])
        if validation and name == "elbo":
            best = int(np.argmax([row["val_elbo"] for row in rows]))
            expected["best"] = ([epochs[best]], [rows[best]["val_elbo"]])
        assert lines(axes) == expected
    assert [axes.get_title() for axes in figure.axes] == ["ELBO", "log p(x | z)", "KL(q(z | x) || p(z))"]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == list(lines(figure.axes[0]))


def test_learning_curves_of_a_run():
    x = torch.randn(32, 5)
    rows = fit(LinearGaussian(5, 2), x, x[:8], epochs=2, batch_size=16, device="cpu", progress=False)
    drawn = lines(plots.learning_curves(rows).axes[2])
    assert drawn["validation"] == ([1, 2], [row["val_kl"] for row in rows])


def test_learning_curves_of_nothing():
    with pytest.raises(ValueError, match="Expected a history of at least one epoch; got an empty one"):
        plots.learning_curves([])


def assert_shows(figure: Figure, comparison: Comparison) -> None:
    (axes,) = figure.axes
    drawn, ladder = lines(axes), [bound for bound in comparison.bounds if bound.num_particles is not None]
    levels = {bound.name: bound.value for bound in comparison.bounds if bound.num_particles is None}
    rungs = ([bound.num_particles for bound in ladder], [bound.value for bound in ladder])
    assert drawn.pop("importance-sampled bound") == rungs
    assert {name: set(y) for name, (_, y) in drawn.items()} == {name: {value} for name, value in levels.items()}
    assert axes.get_xscale() == "log"


def bound(name: str, num_particles: int | None, value: float) -> Bound:
    return Bound(name=name, num_particles=num_particles, value=value, sampling_error=0.01, error=0.1)


def test_bounds_carry_the_comparison():
    ladder = [bound(f"bound, K = {k}", k, value) for k, value in ((1, -9.5), (10, -8.0), (100, -7.5))]
    whole = [bound("reference ELBO", None, -9.25), bound("Trace_ELBO", None, -9.0), *ladder]
    for bounds in (ladder, whole, [*whole, bound("exact log p(x)", None, -7.25)]):
        comparison = Comparison(bounds, 10, None)
        assert_shows(plots.bounds(comparison), comparison)


def test_bounds_of_a_program():
    program = LinearGaussian(5, 2, posterior=DiagonalNormal.mlp(5, 2, hidden=(4,)))
    comparison = compare(program, torch.randn(6, 5), (1, 10), elbo_draws=5, progress=False)
    assert [bound.name for bound in comparison.bounds if bound.num_particles is None] == [
        "reference ELBO",
        "Trace_ELBO",
        "exact log p(x)",
    ]
    assert_shows(plots.bounds(comparison), comparison)


def test_a_figure_can_be_kept(tmp_path):
    figure = plots.learning_curves(history(True))
    figure.savefig(tmp_path / "curves.png")
    height, width, _ = pyplot.imread(tmp_path / "curves.png").shape
    assert (width, height) == tuple(round(inches * figure.dpi) for inches in figure.get_size_inches()) == (900, 300)


# --- labels ----------------------------------------------------------------------------------------


def test_analogies_are_each_datum_and_its_style_in_every_class():
    program = SemiSupervisedVAE.mlp(6, 3, 2, (4,))
    x, y = (torch.rand(5, 6) < 0.5).float(), torch.tensor([2, 0, 1, 1, 0])
    z = program.posterior(x, one_hot(y, 3)).mean
    styles = [program.likelihood(one_hot(torch.full((5,), c), 3), z).mean for c in range(3)]
    expected = torch.stack([x, *styles], 1).detach()
    torch.testing.assert_close(program.analogies({"x": x, "y": y}), expected[:, 1:])
    shown = pixels(plots.analogies(program, {"x": x, "y": y}, GREY, n=2))
    assert np.allclose(shown, by_hand(as_image(expected[:2].flatten(0, 1), GREY), 4, 2), atol=1e-6)
    rows = pixels(plots.analogies(program, {"x": x, "y": y}))
    assert np.allclose(rows, expected.flatten(1).numpy(), atol=1e-6)
    likeliest = program.predict(x).argmax(1)
    torch.testing.assert_close(program.analogies(x), program.analogies({"x": x, "y": likeliest}))


def test_the_error_has_a_panel_and_chooses_the_best_epoch():
    history = [
        {"epoch": i + 1, "elbo": -3.0, "log_px_z": -2.0, "kl": 1.0, "val_elbo": elbo, "val_log_px_z": -2.0,
         "val_kl": 1.0, "val_error": error}
        for i, (elbo, error) in enumerate([(-5.0, 0.2), (-4.0, 0.1), (-3.0, 0.3), (-4.5, 0.1)])
    ]  # fmt: skip
    figure = plots.learning_curves(history)
    curve, dot = figure.axes[3].lines
    assert curve.get_ydata() == pytest.approx([20, 10, 30, 10])
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (2, pytest.approx(10))


def test_a_drawing_shows_each_canvas_and_the_rectangles_within_it():
    images = torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(0))
    writes = torch.tensor([0.5, 1.0, 2.5, 3.0]).expand(3, 2, 4) + torch.arange(3).view(3, 1, 1) / 4
    reads = torch.tensor([-1.0, -2.0, 8.0, 9.0]).expand(3, 2, 4)
    animation = plots.drawing(Drawing(images, writes, reads), (1, 3, 4))
    animation._init_draw()
    figure = animation._fig
    assert list(animation.new_frame_seq()) == list(range(3 + plots.PAUSE))
    for frame in range(3 + plots.PAUSE):
        animation._draw_frame(frame)
        t = min(frame, 2)
        np.testing.assert_array_equal(pixels(figure), by_hand(images[t].view(2, 3, 4, 1).numpy(), 2, 1))
        assert figure.axes[0].get_title() == f"glimpse {t + 1} of 3"
        read, written = figure.axes[0].patches[:2], figure.axes[0].patches[2:]
        assert all(patch.get_visible() == (frame < 3) for patch in (*read, *written))
        for i, corner in enumerate((0.5, 5.5)):  # the first image's edge lies between two pixels, so at a half
            assert read[i].get_bbox().extents.tolist() == [corner, 0.5, corner + 4, 3.5]
            expected = [corner + 0.5 + t / 4, 1.5 + t / 4, corner + 2.5 + t / 4, min(3.5, 3.5 + t / 4)]
            assert written[i].get_bbox().extents.tolist() == pytest.approx(expected)


def test_a_drawing_of_coloured_images_is_kept_as_gif(tmp_path):
    from PIL import Image

    program = DRAW((3, 4, 5), 2, 2, 6)
    plots.drawing(program.canvases(3), (3, 4, 5)).save(tmp_path / "a.gif", writer="pillow")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3  # two glimpses, and the images alone for as long as the pause
