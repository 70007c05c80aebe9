"""Grids of Gaussians: against sums over filters and pixels, written out."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyrovae.attention import filters, grid, read, tiles, window, write

sizes = pytest.mark.parametrize("size", [1, 2, 3])


def numbers(*batch):
    """Grids of unlike places, widths, strides and intensities."""
    spread = torch.tensor([0.7, 0.7, 0.8, 0.5, 0.4], dtype=torch.float64)
    return torch.randn(*batch, 5, dtype=torch.float64) * spread


def bank(center: float, delta: float, sigma: float, size: int, pixels: int) -> list[list[float]]:
    """F[i][a] of eq. 19, 25."""
    rows = []
    for i in range(1, size + 1):
        mu = center + (i - size / 2 - 0.5) * delta
        row = [math.exp(-((a - mu) ** 2) / (2 * sigma**2)) for a in range(1, pixels + 1)]
        rows.append([value / sum(row) for value in row])
    return rows


def by_hand(five, height, width, size):
    """F_X, F_Y and gamma of one grid, eq. 21 to 26."""
    g_x, g_y, log_variance, log_delta, log_gamma = five.tolist()
    delta = (max(height, width) - 1) / (size - 1 if size > 1 else 1) * math.exp(log_delta)
    sigma = math.exp(log_variance / 2)
    f_x = bank((width + 1) / 2 * (g_x + 1), delta, sigma, size, width)
    f_y = bank((height + 1) / 2 * (g_y + 1), delta, sigma, size, height)
    return f_x, f_y, math.exp(log_gamma)


@sizes
def test_read_is_the_sum_over_pixels(size):
    five, images = numbers(2, 3), torch.randn(2, 3, 2, 4, 6, dtype=torch.float64)
    seen = read(images, filters(five, 4, 6, size))
    assert seen.shape == (2, 3, 2, size, size)
    for k, n, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        f_x, f_y, gamma = by_hand(five[k, n], 4, 6, size)
        for i in range(size):
            for j in range(size):
                pixels = [f_y[i][b] * images[k, n, c, b, a].item() * f_x[j][a] for b in range(4) for a in range(6)]
                assert seen[k, n, c, i, j].item() == pytest.approx(gamma * sum(pixels), rel=1e-12, abs=1e-14)


@sizes
def test_write_is_the_sum_over_filters(size):
    five, patch = numbers(2, 3), torch.randn(2, 3, 2, size, size, dtype=torch.float64)
    image = write(patch, filters(five, 4, 6, size))
    assert image.shape == (2, 3, 2, 4, 6)
    for k, n, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        f_x, f_y, gamma = by_hand(five[k, n], 4, 6, size)
        for b in range(4):
            for a in range(6):
                parts = [f_y[i][b] * patch[k, n, c, i, j].item() * f_x[j][a] for i in range(size) for j in range(size)]
                assert image[k, n, c, b, a].item() == pytest.approx(sum(parts) / gamma, rel=1e-12, abs=1e-14)


def test_one_grid_serves_many_images():
    five, images = numbers(3), torch.randn(5, 3, 1, 4, 6, dtype=torch.float64)
    by = filters(five, 4, 6, 2)
    assert_close(read(images, by)[4], read(images[4], by), rtol=0, atol=0)
    assert_close(write(images[..., :2, :2], by)[4], write(images[4, ..., :2, :2], by), rtol=0, atol=0)


def test_zeros_are_a_grid_over_the_longer_side():
    """N = 5 on 28 x 20: the first row of filters at pixel 1 and the last at 28, stride 27 / 4, sigma 1."""
    where = grid(torch.zeros(5), 28, 20, 5)
    assert [value.item() for value in where] == [10.5, 14.5, 6.75, 0, 0]
    assert window(torch.zeros(5), 28, 20, 5).tolist() == [10 - 14.5, 14 - 14.5, 10 + 14.5, 14 + 14.5]


@pytest.mark.parametrize(("height", "width"), [(28, 28), (8, 20), (1, 1)])
@sizes
def test_tiles_cover_the_longer_side_once(height, width, size):
    five, side = tiles(height, width, size).double(), max(height, width)
    where = grid(five, height, width, size)
    if side > 1 and size > 1:
        assert where.delta.item() == pytest.approx(side / size)
    assert (where.log_variance / 2).exp().item() == pytest.approx(side / size / 2)
    left, top, right, bottom = window(five, height, width, size).tolist()
    if side > 1:
        assert (right - left, bottom - top) == (pytest.approx(side), pytest.approx(side))
    assert ((left + right) / 2, (top + bottom) / 2) == (pytest.approx(width / 2), pytest.approx(height / 2))


def test_a_sharp_grid_on_the_pixels_themselves_is_the_identity():
    """N = A = B, stride 1, sigma 0.01: gamma times the image is read, and the patch through gamma is written."""
    five = torch.tensor([0.0, 0.0, 2 * math.log(0.01), 0.0, math.log(3.0)], dtype=torch.float64)
    image, by = torch.randn(2, 4, 4, dtype=torch.float64), filters(five, 4, 4, 4)
    assert_close(read(image, by), 3 * image, rtol=1e-12, atol=0)
    assert_close(write(image, by), image / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("log_variance", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("far", [-1e3, -1.0, 0.3, 1e3])
@sizes
def test_rows_sum_to_one_and_gradients_are_finite_however_far_the_grid(far, log_variance, size):
    """In float32, where all that a filter far away would see of the image is below the smallest number."""
    five = torch.tensor([far, -far, log_variance, -1.0, 0.5]).requires_grad_()
    by = filters(five, 9, 7, size)
    assert_close(by.x.sum(-1), torch.ones(size))
    assert_close(by.y.sum(-1), torch.ones(size))
    if abs(far) > 100 and log_variance <= 0:  # the nearest pixel alone
        assert by.x[:, -1 if far > 0 else 0].tolist() == [1] * size
        assert by.y[:, 0 if far > 0 else -1].tolist() == [1] * size
    (read(torch.rand(1, 9, 7), by).sum() + write(torch.rand(1, size, size), by).sum()).backward()
    assert torch.isfinite(five.grad).all()


@sizes
def test_gradients(size):
    images, patch = torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(2, 2, size, size, dtype=torch.float64)

    def function(five, images, patch):
        by = filters(five, 4, 3, size)
        return read(images, by), write(patch, by), window(five, 4, 3, size)

    inputs = [value.requires_grad_() for value in (numbers(2), images, patch)]
    assert torch.autograd.gradcheck(function, inputs)
