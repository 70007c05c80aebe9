"""Pictures, each returned as a matplotlib figure: `figure.savefig(path)` keeps it, a notebook shows it.

`drawing` returns an animation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.arguments import check_whole
from pyrovae.batches import as_batch
from pyrovae.compare import Comparison
from pyrovae.nets import _check_image_shape
from pyrovae.program import LatentModel
from pyrovae.quadrants import Quadrant, pixels_of
from pyrovae.run import score
from pyrovae.sequences import are_sequences

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyrovae.models.draw import Drawing

PAUSE = 6  # frames at an animation's end
COLORS = ("#1f5fa8", "#d1702c", "#3d8b57", "#8a4f9e")


def samples(
    program: LatentModel, n: int = 64, shape: Sequence[int] | None = None, *, like: Any = None, **given: Tensor | int
) -> Figure:
    """E[x | z] of n draws z ~ p(z), as a grid of images.

    Args:
        program: a `LatentModel`.
        n: how many.
        shape: (channels, height, width) of an image; None draws each datum as a row of a matrix.
        like, given: as for `LatentModel.sample`.
    """
    x = program.sample(n, mean=True, like=like, **given)
    columns = math.ceil(math.sqrt(n))
    figure, axes = _figure(4, 4)
    _show(axes, _grid(x, shape, columns) if _is_image(shape) else x)
    axes.set_title(f"{n} samples from {type(program).__name__}")
    return figure


def reconstructions(program: LatentModel, x: Any, shape: Sequence[int] | None = None, *, n: int = 10) -> Figure:
    """The first n data above, E[x | z] at their posterior means below.

    Args:
        program: a `LatentModel`.
        x: data `(N, D)`, a batch or a `Data`.
        shape: (channels, height, width) of an image; None draws each datum as a row of a matrix.
        n: how many.
    """
    check_whole(n=n)
    batch = {key: value[:n] for key, value in as_batch(x, "x").items()}
    originals, means = next(iter(batch.values())), program.reconstruct(batch)
    if not _is_image(shape):
        figure, both = _figure(7, 3, columns=2)
        for axes, values, title in zip(both, (originals, means), ("data", "reconstructions"), strict=True):
            _show(axes, values)
            axes.set_title(title)
        return figure
    figure, axes = _figure(8, 8 * 2 / len(originals) + 0.4)
    _show(axes, _grid(torch.cat([originals, means.to(originals)]), shape, len(originals)))
    axes.set_title("data (above) and reconstructions (below)")
    return figure


def analogies(program: LatentModel, x: Any, shape: Sequence[int] | None = None, *, n: int = 10) -> Figure:
    """The first n data at the left, and in each row its style in every class (Kingma et al. 2014, figure 1).

    Args:
        program: a `LatentModel` with a label.
        x: data `(N, D)`, a batch or a `Data`.
        shape: (channels, height, width) of an image; None draws each datum as a row of a matrix.
        n: how many.
    """
    check_whole(n=n)
    batch = {key: value[:n] for key, value in as_batch(x, "x").items()}
    means = program.analogies(batch)
    originals = batch["x"] if "x" in batch else next(iter(batch.values()))
    rows = torch.cat([originals.to(means).unsqueeze(1), means], 1)
    if not _is_image(shape):
        figure, axes = _figure(7, 3)
        _show(axes, rows.flatten(1))
    else:
        figure, axes = _figure(5, 5 * len(rows) / rows.shape[1] + 0.4)
        _show(axes, _grid(rows.flatten(0, 1), shape, rows.shape[1]))
    axes.set_title("data (left), and their style in every class")
    return figure


def completions(
    program: LatentModel, data: Any, shape: Sequence[int], which: Quadrant, *, n: int = 8, draws: int = 6
) -> Figure:
    """In each row the given quadrant of an image, draws of the whole, z ~ p(z | c), and the truth (Sohn et al. 2015).

    What a draw shows is E[x | z, c] beside the quadrant c that was given.

    Args:
        program: a `LatentModel` of x given c.
        data: as `quadrant` gives them.
        shape: (channels, height, width) of the whole image.
        which: the quadrant.
        n: how many of the data.
        draws: how many completions of each.

    Raises:
        ValueError: for data that are not cut so.
    """
    check_whole(n=n, draws=draws)
    batch = {key: value[:n] for key, value in as_batch(data, "data").items()}
    inside = pixels_of(shape, which)
    sizes = {key: value.shape[-1] for key, value in batch.items()}
    if (sizes.get("c"), sizes.get("x")) != (int(inside.sum()), int((~inside).sum())):
        raise ValueError(f"Expected data that quadrant(data, {tuple(shape)}, {which!r}) cuts; got sizes {sizes}")
    x, c = batch["x"], batch["c"]
    drawn = program.sample(len(x) * draws, c=c.repeat_interleave(draws, 0), mean=True).to(x)
    values = torch.cat([torch.full_like(x, 0.5).unsqueeze(1), drawn.unflatten(0, (len(x), draws)), x.unsqueeze(1)], 1)
    images = x.new_empty(*values.shape[:2], len(inside))
    images[..., inside], images[..., ~inside] = c.unsqueeze(1), values
    figure, axes = _figure(5, 5 * len(x) / (draws + 2) + 0.4)
    _show(axes, _grid(images.flatten(0, 1), shape, draws + 2))
    axes.set_title("given, completions, truth")
    return figure


def drawing(drawing: Drawing, shape: Sequence[int]) -> FuncAnimation:
    """Images as they are drawn, the rectangle that is written to around each in orange, the one that is read in blue.

    A rectangle ends at the image's edge where its grid does not. `drawing(...).save("drawing.gif", writer="pillow")`
    keeps the animation, which ends with the images alone.

    Args:
        drawing: as `DRAW.canvases` and `DRAW.canvases_of` return it.
        shape: (channels, height, width) of an image.
    """
    from matplotlib.animation import FuncAnimation
    from matplotlib.patches import Rectangle

    steps, n = drawing.images.shape[:2]
    columns = math.ceil(math.sqrt(n))
    figure, axes = _figure(5, 5 * math.ceil(n / columns) / columns + 0.4)
    grids = [_grid(images, shape, columns) for images in drawing.images]
    _show(axes, grids[0])
    _, height, width = shape
    rectangles: list[tuple[Rectangle, Tensor]] = []
    for windows, color in ((drawing.reads, COLORS[0]), (drawing.writes, COLORS[1])):
        for i, edges in enumerate([] if windows is None else windows.unbind(1)):
            inside = torch.minimum(edges.cpu().clamp(min=0), torch.tensor([width, height, width, height]))
            corner = torch.tensor([i % columns * (width + 1), i // columns * (height + 1)]) + 0.5
            rectangle = Rectangle((0, 0), 0, 0, fill=False, color=color)
            rectangles.append((axes.add_patch(rectangle), inside + corner.repeat(2)))

    def show(frame: int) -> list[Artist]:
        t = min(frame, steps - 1)
        axes.images[0].set_data(grids[t].squeeze(-1).numpy())
        for rectangle, edges in rectangles:
            left, top, right, bottom = edges[t].tolist()
            rectangle.set(bounds=(left, top, right - left, bottom - top), visible=frame == t)
        axes.set_title(f"glimpse {t + 1} of {steps}")
        return [axes.images[0], *(rectangle for rectangle, _ in rectangles)]

    return FuncAnimation(figure, show, frames=steps + PAUSE, interval=250)


def latent_space(program: LatentModel, x: Any, y: Tensor | None = None, *, site: str | None = None) -> Figure:
    """Posterior means of the data in the plane: as they are for two latents, else their two principal components.

    Args:
        program: a `LatentModel`.
        x: data `(N, D)`, a batch or a `Data`.
        y: labels `(N,)`, shown as colours.
        site: the latent, where the program has several.
    """
    means = program.encode(x, site).double().cpu()
    if y is not None and (not isinstance(y, Tensor) or y.shape != means.shape[:1]):
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"Expected y to be labels ({len(means)},), one for each datum; got {found}")
    names = ("z[0]", "z[1]")
    if means.shape[1] == 1:
        means, names = torch.cat([means, torch.zeros_like(means)], 1), ("z[0]", "")
    elif means.shape[1] > 2:
        from sklearn.decomposition import PCA

        pca = PCA(2).fit(means.numpy())
        means = torch.from_numpy(pca.transform(means.numpy()))
        names = tuple(f"component {i + 1} ({share:.0%})" for i, share in enumerate(pca.explained_variance_ratio_))
    figure, axes = _figure(5, 4.5)
    size = min(12.0, max(1.0, 4000 / len(means)))  # many dots must not become one blot
    dots = axes.scatter(*means.T, s=size, c=COLORS[0] if y is None else y.cpu(), cmap=None if y is None else "tab10")
    if y is not None:
        axes.legend(*dots.legend_elements(num=None), title="label", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel=names[0], ylabel=names[1], title="posterior means of the data")
    axes.set_aspect("equal", "datalim")
    return figure


def sequences(values: dict[str, Tensor], lengths: Tensor, *, n: int = 4) -> Figure:
    """The first n sequences, one below the other: time to the right, the values of a step upwards.

    Args:
        values: sequences `(N, T, D)` by what they are, side by side: `{"data": x, "reconstructions": program.
            reconstruct(batch)}`. Of piano rolls only the keys between the lowest and the highest struck are shown.
        lengths: of all of them, `(N,)`.
        n: how many.

    Raises:
        ValueError: for what are not sequences of these lengths.
    """
    if not isinstance(values, dict) or not values:
        raise ValueError(f"Expected values to be a dict of sequences (N, T, D); got {values!r}")
    check_whole(n=n)
    for name, x in values.items():
        if not are_sequences(as_batch({"x": x, "lengths": lengths}, name)) or x.shape[-1] < 1:
            raise ValueError(f"Expected {name} (N, T, D) of lengths (N,) up to T; got {tuple(x.shape)}, {len(lengths)}")
    from matplotlib import pyplot

    n = min(n, len(lengths))
    every = torch.cat([x[:n].flatten(0, 1).detach().cpu().float() for x in values.values()])
    used = (every > 0.1).any(0).nonzero().flatten()
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, every.shape[1])
    limits = {"vmin": 0, "vmax": 1} if every.min() >= 0 and every.max() <= 1 else {}
    size = (10 if len(values) > 1 else 7, 1.6 * n + 0.4)
    figure, panels = pyplot.subplots(n, len(values), figsize=size, dpi=100, layout="constrained", squeeze=False)
    pyplot.close(figure)
    for column, (name, x) in enumerate(values.items()):
        panels[0, column].set_title(name)
        panels[-1, column].set_xlabel("step")
        for axes, sequence, length in zip(panels[:, column], x, lengths, strict=False):
            shown = sequence[:length, low:high].detach().cpu().float().T
            extent = (0.5, float(length) + 0.5, low - 0.5, high - 0.5)
            axes.imshow(shown.numpy(), cmap="Greys", aspect="auto", origin="lower", extent=extent, **limits)
    return figure


def learning_curves(history: list[dict[str, float]]) -> Figure:
    """ELBO, log p(x | z) and KL after each epoch, on training and validation data, and the error where there is one.

    Args:
        history: as `fit` returns it.

    Raises:
        ValueError: for an empty history.
    """
    if not isinstance(history, list | tuple) or not all(isinstance(row, dict) and "elbo" in row for row in history):
        raise ValueError(
            f"Expected history to be what fit returns, a dict for each epoch; got {type(history).__name__}"
        )
    if not history:
        raise ValueError("Expected a history of at least one epoch; got an empty one")
    epochs = [row["epoch"] for row in history]
    columns = 4 if "val_error" in history[0] else 3
    figure, panels = _figure(3 * columns, 3, columns)
    titles = {"elbo": "ELBO", "log_px_z": "log p(x | z)", "kl": "KL(q(z | x) || p(z))"}
    for axes, (name, title) in zip(panels, titles.items(), strict=False):
        axes.plot(epochs, [row[name] for row in history], color=COLORS[0], label="training")
        if f"val_{name}" in history[0]:
            axes.plot(epochs, [row[f"val_{name}"] for row in history], color=COLORS[1], label="validation")
        axes.set(title=title, xlabel="epoch")
    panels[0].set_ylabel("nats per datum")
    if "val_elbo" in history[0]:
        best = max(history, key=score)
        panels[0].plot(best["epoch"], best["val_elbo"], "o", color=COLORS[1], label="best")
    if "val_error" in history[0]:
        panels[3].plot(epochs, [100 * row["val_error"] for row in history], color=COLORS[1])
        panels[3].plot(best["epoch"], 100 * best["val_error"], "o", color=COLORS[1])
        panels[3].set(title="misclassified, validation", xlabel="epoch", ylabel="%", ylim=(0, None))
    panels[0].legend(loc="lower right")
    return figure


def bounds(comparison: Comparison) -> Figure:
    """The ladder of bounds: rising with the number of particles towards log p(x), beside both ELBOs.

    Args:
        comparison: as `compare` returns it.
    """
    figure, axes = _figure(5.5, 4.4)
    ladder = [bound for bound in comparison.bounds if bound.num_particles is not None]
    axes.plot(
        [bound.num_particles for bound in ladder],
        [bound.value for bound in ladder],
        "o-",
        color=COLORS[0],
        label="importance-sampled bound",
    )
    levels = [bound for bound in comparison.bounds if bound.num_particles is None]
    for bound, color, style in zip(levels, COLORS[1:], ("-", "--", "-."), strict=False):
        axes.axhline(bound.value, linestyle=style, linewidth=2, color=color, label=bound.name)
    axes.set_xscale("log")
    axes.set(xlabel="particles K", ylabel="nats per datum", title="bounds on log p(x)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), dpi=100, layout="constrained")
    pyplot.close(figure)  # it lives on as a value, not in pyplot's list of open figures
    return figure, axes


def _is_image(shape: Sequence[int] | None) -> bool:
    if shape is not None and not isinstance(shape, list | tuple):
        raise ValueError(f"Expected shape to be (channels, height, width), or None; got {shape!r}")
    return shape is not None and len(shape) == 3


def _grid(x: Tensor, shape: Sequence[int] | None, columns: int) -> Tensor:
    """Images `(N, C * H * W)` side by side with grey lines between, `(height, width, C)`."""
    assert shape is not None
    _check_image_shape(shape, "shape")
    channels, height, width = shape
    if x.shape[-1] != math.prod(shape):
        raise ValueError(f"Expected shape to hold {x.shape[-1]} values; got {tuple(shape)}")
    rows = math.ceil(len(x) / columns)
    grid = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.5)
    for i, image in enumerate(x.detach().cpu().float().reshape(-1, *shape)):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = image.movedim(0, -1)
    return grid


def _show(axes: Axes, values: Tensor) -> None:
    rows = values.dim() == 2  # data as the rows of a matrix, no image
    values = values.detach().cpu().float()
    inside = bool((values >= 0).all() and (values <= 1).all())
    low, high = (0, 1) if inside else (None, None)
    if values.dim() == 3 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    elif values.dim() == 3:
        values = values.clamp(0, 1)
    axes.imshow(values.numpy(), cmap="gray", vmin=low, vmax=high, aspect="auto" if rows else "equal")
    axes.set_axis_off()
