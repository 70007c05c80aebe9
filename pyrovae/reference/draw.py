"""The one-draw ELBO of DRAW, its LSTMs and its attention written out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae.reference.densities import Net, Posterior, log_bernoulli, log_standard_normal
from pyrovae.reference.gaussians import diagonal_normal


def draw_elbo(
    x: Tensor,
    eps: Sequence[Tensor],
    *,
    image_shape: Sequence[int],
    read_size: int,
    write_size: int,
    encoder: Net,
    decoder: Net,
    read_grid: Net,
    write_grid: Net,
    patch: Net,
    posterior_net: Net,
    canvas: Tensor,
    encoder_start: tuple[Tensor, Tensor],
    decoder_start: tuple[Tensor, Tensor],
    posterior: Posterior = diagonal_normal,
) -> Tensor:
    """log p(x | z_1, ..., z_T) + sum_t log p(z_t) - log q(z_t | z_1, ..., z_{t-1}, x)  (Gregor et al. 2015, eq. 9, 10).

    Args:
        x: images `(N, C * H * W)`.
        eps: noise behind z_1, ..., z_T, each `(*, N, D)`.
        image_shape: (C, H, W).
        read_size, write_size: N of the grids.
        encoder: [r_t, h_dec, h_enc] to the gates of the LSTM.
        decoder: [z_t, h_dec] to the gates of the LSTM.
        read_grid, write_grid: h_dec to the five numbers of a grid.
        patch: h_dec to what is written, `C * N * N`.
        posterior_net: h_enc to eta of q.
        canvas: c_0.
        encoder_start, decoder_start: first outputs and cells of the LSTMs.
        posterior: eps and eta to z_t and its log q.

    Returns:
        `(*, N)`.
    """
    batch = eps[0].shape[:-1]
    x = x.expand(*batch, -1)
    canvas = canvas.expand_as(x)
    g, g_cell = (value.expand(*batch, -1) for value in encoder_start)
    h, h_cell = (value.expand(*batch, -1) for value in decoder_start)
    log_p_minus_log_q = torch.zeros(())
    for noise in eps:
        error = x - torch.sigmoid(canvas)
        glimpse = torch.cat([attended(image, read_grid(h), image_shape, read_size) for image in (x, error)], -1)
        g, g_cell = lstm(encoder(torch.cat([glimpse, h, g], -1)), g_cell)
        z, log_q = posterior(noise, posterior_net(g))
        log_p_minus_log_q = log_p_minus_log_q + log_standard_normal(z) - log_q
        h, h_cell = lstm(decoder(torch.cat([z, h], -1)), h_cell)
        canvas = canvas + written(patch(h), write_grid(h), image_shape, write_size)
    return log_bernoulli(x, canvas) + log_p_minus_log_q


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """h' = o tanh(c'), c' = f c + i g; gates = (i, f, g, o) before their sigmoids, and tanh for g, `(*, 4 H)`."""
    i, f, g, o = gates.unflatten(-1, (4, -1)).unbind(-2)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def attended(image: Tensor, numbers: Tensor, image_shape: Sequence[int], size: int) -> Tensor:
    """gamma sum_ba F_Y[i, b] image[c, b, a] F_X[j, a], `(*, C * N * N)`  (eq. 27)."""
    f_y, f_x = _filters(numbers, image_shape, size)
    seen = torch.einsum("...ib,...cba,...ja->...cij", f_y, image.unflatten(-1, tuple(image_shape)), f_x)
    return (torch.exp(numbers[..., 4, None, None, None]) * seen).flatten(-3)


def written(patch: Tensor, numbers: Tensor, image_shape: Sequence[int], size: int) -> Tensor:
    """(1 / gamma) sum_ij F_Y[i, b] w[c, i, j] F_X[j, a], `(*, C * H * W)`  (eq. 29)."""
    f_y, f_x = _filters(numbers, image_shape, size)
    image = torch.einsum("...ib,...cij,...ja->...cba", f_y, patch.unflatten(-1, (image_shape[0], size, size)), f_x)
    return (image / torch.exp(numbers[..., 4, None, None, None])).flatten(-3)


def _filters(numbers: Tensor, image_shape: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """F_Y[i, b] and F_X[j, a], i and j from 1 to N  (eq. 19 to 26)."""
    _, height, width = image_shape
    g_x, g_y, log_variance, log_delta, _ = numbers.unbind(-1)
    delta = (max(width, height) - 1) / max(size - 1, 1) * torch.exp(log_delta)
    columns = [_filter((width + 1) / 2 * (g_x + 1), delta, log_variance, j, size, width) for j in range(1, size + 1)]
    rows = [_filter((height + 1) / 2 * (g_y + 1), delta, log_variance, i, size, height) for i in range(1, size + 1)]
    return torch.stack(rows, -2), torch.stack(columns, -2)


def _filter(center: Tensor, delta: Tensor, log_variance: Tensor, i: int, size: int, pixels: int) -> Tensor:
    mu = (center + (i - size / 2 - 0.5) * delta).unsqueeze(-1)
    a = torch.arange(1, pixels + 1, dtype=mu.dtype, device=mu.device)
    return torch.softmax(-((a - mu) ** 2) * torch.exp(-log_variance).unsqueeze(-1) / 2, -1)
