"""What is known exactly."""

import torch
from torch import Tensor

from pyrovae.reference.densities import LOG_2_PI, full_parameters, log_standard_normal, split


def kl_diagonal_standard(eta: Tensor) -> Tensor:
    """KL(N(mu, diag(sigma^2)) || N(0, I)) = sum_i (mu_i^2 + sigma_i^2 - 1) / 2 - log sigma_i, `(*)`."""
    mu, log_sigma = split(eta, eta.shape[-1] // 2)
    return ((mu**2 + torch.expm1(2 * log_sigma)) / 2 - log_sigma).sum(-1)


def kl_full_standard(eta: Tensor) -> Tensor:
    """KL(N(mu, L L^T) || N(0, I)) = (|mu|^2 + |L|_F^2 - D) / 2 - sum_i log sigma_i, `(*)`."""
    mu, log_sigma, scale = full_parameters(eta)
    return ((mu**2).sum(-1) + (scale**2).sum((-2, -1)) - mu.shape[-1]) / 2 - log_sigma.sum(-1)


def linear_gaussian_log_prob(x: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor) -> Tensor:
    """log p(x) = log N(x; b, W W^T + s^2 I), the marginal of z ~ N(0, I), x | z ~ N(W z + b, s^2 I).

    Args:
        x: `(*, X)`.
        weight: W `(X, D)`.
        bias: b `(X,)`.
        log_sigma: log s, a scalar.
    """
    if weight.shape[0] > weight.shape[1]:  # the covariance loses a small s: Bayes' rule at the posterior's mean
        z, factor = _ridge(x, weight, bias, log_sigma)
        log_det = 2 * torch.log(torch.abs(factor.diagonal())).sum() + 2 * (len(bias) - len(factor)) * log_sigma
        squares = (((x - z @ weight.T - bias) * torch.exp(-log_sigma)) ** 2).sum(-1) + (z**2).sum(-1)
    else:
        factor = torch.linalg.qr(torch.cat([weight.T, _scaled_eye(len(bias), log_sigma)])).R
        log_det = 2 * torch.log(torch.abs(factor.diagonal())).sum()
        squares = (torch.linalg.solve_triangular(factor.T, (x - bias).unsqueeze(-1), upper=False) ** 2).sum((-2, -1))
    return -(squares + log_det + len(bias) * LOG_2_PI) / 2


def linear_gaussian_posterior(x: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(*, D)` and covariance `(D, D)` of p(z | x) = N(M^-1 W^T (x - b), s^2 M^-1), M = W^T W + s^2 I."""
    mean, factor = _ridge(x, weight, bias, log_sigma)
    root = torch.linalg.solve_triangular(factor, _scaled_eye(len(factor), log_sigma), upper=True)
    return mean, root @ root.T


def _ridge(x: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The z that minimises |x - b - W z|^2 + s^2 |z|^2, and R, upper triangular, with R^T R = M."""
    q, factor = torch.linalg.qr(torch.cat([weight, _scaled_eye(weight.shape[1], log_sigma)]))
    z = torch.linalg.solve_triangular(factor, ((x - bias) @ q[: len(bias)]).unsqueeze(-1), upper=True)
    return z.squeeze(-1), factor


def _scaled_eye(size: int, log_sigma: Tensor) -> Tensor:
    return torch.exp(log_sigma) * torch.eye(size, dtype=log_sigma.dtype, device=log_sigma.device)


def linear_gaussian_elbo(
    x: Tensor, z: Tensor, log_q: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor
) -> Tensor:
    """log N(x; W z + b, s^2 I) + log N(z; 0, I) - log q(z | x), for a z drawn from q: `(*)`."""
    squares = (((x - z @ weight.T - bias) * torch.exp(-log_sigma)) ** 2).sum(-1)
    log_px_z = -(squares + len(bias) * (LOG_2_PI + 2 * log_sigma)) / 2
    return log_px_z + log_standard_normal(z) - log_q
