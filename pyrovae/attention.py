"""A grid of Gaussians by which a network reads a part of an image, and writes one; plain torch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Filters(NamedTuple):
    """N x N Gaussian filters on an image of B x A pixels, each the product of one of a row and one of a column.

    Attributes:
        x: F_X, `(*, N, A)`; its rows sum to 1.
        y: F_Y, `(*, N, B)`; its rows sum to 1.
        gamma: the intensity, `(*)`.
    """

    x: Tensor
    y: Tensor
    gamma: Tensor


class Grid(NamedTuple):
    """Where the filters lie, in pixels; the first pixel of a row is 1, the last one A.

    Attributes:
        center_x, center_y: g_X and g_Y, the centre of the grid, each `(*)`.
        delta: the stride, from a filter to the next, `(*)`.
        log_variance: log sigma^2, of all filters, `(*)`.
        log_gamma: log gamma, the intensity, `(*)`.
    """

    center_x: Tensor
    center_y: Tensor
    delta: Tensor
    log_variance: Tensor
    log_gamma: Tensor


def grid(numbers: Tensor, height: int, width: int, size: int) -> Grid:
    """The grid that five numbers of a network stand for.

        g_X = (A + 1) / 2 (g~_X + 1),  g_Y = (B + 1) / 2 (g~_Y + 1),  delta = (max(A, B) - 1) / (N - 1) delta~

    A grid of one filter has no stride: N - 1 is then replaced by 1, and delta~ is without effect on the filter.

    Args:
        numbers: g~_X, g~_Y, log sigma^2, log delta~ and log gamma, `(*, 5)`; zeros for a grid in the centre that
            reaches from the first pixel of the longer side to its last.
        height: B.
        width: A.
        size: N, filters of a row and of a column.

    Source:
        Gregor et al. (2015), eq. 21 to 24.
    """
    g_x, g_y, log_variance, log_delta, log_gamma = numbers.unbind(-1)
    delta = (max(width, height) - 1) / max(size - 1, 1) * log_delta.exp()
    return Grid((width + 1) / 2 * (g_x + 1), (height + 1) / 2 * (g_y + 1), delta, log_variance, log_gamma)


def tiles(height: int, width: int, size: int) -> Tensor:
    """The five numbers of a grid that cuts the longer side into N parts, sigma half a part, with gamma = 1; `(5,)`.

    Every pixel is then seen; with a stride over the whole side instead, a grid of two filters sees corners alone.
    """
    side = max(height, width)
    log_delta = math.log(side / size * (size - 1) / (side - 1)) if size > 1 and side > 1 else 0.0
    return torch.tensor([0.0, 0.0, 2 * math.log(side / size / 2), log_delta, 0.0])


def filters(numbers: Tensor, height: int, width: int, size: int) -> Filters:
    """The filters of the grid that five numbers stand for.

        mu_X^i = g_X + (i - N / 2 - 1 / 2) delta,  F_X[i, a] = exp(-(a - mu_X^i)^2 / (2 sigma^2)) / Z_X^i

    with i = 1, ..., N and a = 1, ..., A, Z_X^i being the sum over all a; F_Y alike. It is a softmax over pixels, exact
    however far from the image a filter lies: it then sees the nearest pixel.

    Args:
        numbers: of the grid, `(*, 5)`, as for `grid`.
        height: B.
        width: A.
        size: N.

    Source:
        Gregor et al. (2015), eq. 19, 20, 25 and 26.

    Example:
        >>> filters(torch.zeros(7, 5), 28, 20, 3).x.shape
        torch.Size([7, 3, 20])
    """
    where = grid(numbers, height, width, size)
    steps = torch.arange(1, size + 1, device=numbers.device).to(numbers.dtype) - size / 2 - 0.5
    offsets = steps * where.delta.unsqueeze(-1)
    precision = (-where.log_variance).exp().unsqueeze(-1).unsqueeze(-1)

    def bank(center: Tensor, pixels: int) -> Tensor:
        mu = (center.unsqueeze(-1) + offsets).unsqueeze(-1)
        a = torch.arange(1, pixels + 1, device=numbers.device).to(numbers.dtype)
        return torch.softmax(-((a - mu) ** 2) * precision / 2, -1)

    return Filters(bank(where.center_x, width), bank(where.center_y, height), where.log_gamma.exp())


def read(images: Tensor, by: Filters) -> Tensor:
    """gamma F_Y x F_X^T of each channel.

    Args:
        images: `(*, C, B, A)`.
        by: filters with the same leading dimensions, or such as broadcast.

    Returns:
        `(*, C, N, N)`.

    Source:
        Gregor et al. (2015), eq. 27.
    """
    patch = by.y.unsqueeze(-3) @ images @ by.x.unsqueeze(-3).mT
    return by.gamma[..., None, None, None] * patch


def write(patch: Tensor, by: Filters) -> Tensor:
    """(1 / gamma) F_Y^T w F_X of each channel.

    Args:
        patch: w, `(*, C, N, N)`.
        by: filters with the same leading dimensions, or such as broadcast.

    Returns:
        `(*, C, B, A)`.

    Source:
        Gregor et al. (2015), eq. 28 and 29.
    """
    return by.y.unsqueeze(-3).mT @ patch @ by.x.unsqueeze(-3) / by.gamma[..., None, None, None]


def window(numbers: Tensor, height: int, width: int, size: int) -> Tensor:
    """The rectangle that a grid covers, from one sigma before its first filters' centres to one after its last's.

    Args:
        numbers: of the grid, `(*, 5)`, as for `grid`.
        height: B.
        width: A.
        size: N.

    Returns:
        Left, top, right and bottom, `(*, 4)`, in pixels, the first of which reaches from 0 to 1.
    """
    where = grid(numbers, height, width, size)
    half = where.delta * (size - 1) / 2 + (where.log_variance / 2).exp()
    x, y = where.center_x - 0.5, where.center_y - 0.5
    return torch.stack([x - half, y - half, x + half, y + half], -1)
