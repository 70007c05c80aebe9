"""Images cut into a quadrant and the rest, for a model of the rest given the quadrant."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyrovae.arguments import check_one_of
from pyrovae.batches import Batch, Data
from pyrovae.nets import _check_image_shape

Quadrant = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


def quadrant(data: Any, shape: Sequence[int], which: Quadrant) -> Data:
    """Images as a condition c, one quadrant of their pixels, and data x, the others (Sohn et al. 2015).

    Data that are drawn as they are shown, by dynamic binarization, are cut as they are drawn: what c shows is of the
    same draw as x.

    Args:
        data: a `Data`, or what makes one, with images x `(N, channels * height * width)`.
        shape: (channels, height, width).
        which: top-left, top-right, bottom-left or bottom-right.

    Returns:
        Data that hand out c `(N, C)` and x `(N, D)`, beside all else that they have.

    Raises:
        ValueError: for an unknown quadrant, a shape that is not that of the images, or data without x.

    Example:
        >>> cut = quadrant(torch.arange(16.).reshape(1, 16), (1, 4, 4), "top-right")
        >>> cut["c"].tolist(), cut["x"].shape
        ([[2.0, 3.0, 6.0, 7.0]], torch.Size([1, 12]))
    """
    data = data if isinstance(data, Data) else Data(data)
    inside = pixels_of(shape, which)
    if "x" not in data.tensors or data["x"].shape[1:] != inside.shape:
        found = {key: tuple(value.shape) for key, value in data.tensors.items()}
        raise ValueError(f"Expected data with images x (N, {len(inside)}), of shape {tuple(shape)}; got {found}")

    def cut(batch: Batch) -> Batch:
        batch = batch if data.show is None else data.show(batch)
        return {**batch, "x": batch["x"][:, ~inside], "c": batch["x"][:, inside]}

    if data.fixed:
        return Data(cut(data.tensors), check=False)
    return Data(data.tensors, dynamic=data.dynamic, show=cut, check=False)


def pixels_of(shape: Sequence[int], which: Quadrant) -> Tensor:
    """Which values of an image lie in a quadrant, `(channels * height * width,)`, bool.

    Of an odd height or width the middle belongs to the bottom and the right.

    Raises:
        ValueError: for an unknown quadrant, or a shape that is no image's.
    """
    check_one_of(get_args(Quadrant), which=which)
    _check_image_shape(shape, "shape")
    if min(shape[1:]) < 2:
        raise ValueError(f"Expected shape to be (channels, height, width), both at least 2; got {tuple(shape)}")
    vertical, horizontal = which.split("-")
    _, height, width = shape
    row = (torch.arange(height) < height // 2) == (vertical == "top")
    column = (torch.arange(width) < width // 2) == (horizontal == "left")
    return (row.unsqueeze(1) & column).expand(*shape).flatten()
