"""What is known exactly."""

import torch
from torch import Tensor

from pyrovae.reference.densities import LOG_2_PI, full_parameters, log_standard_normal, split


def kl_diagonal_standard(eta: Tensor) -> Tensor:
    """KL(N(mu, diag(sigma^2)) || N(0, I)) = sum_i (mu_i^2 + sigma_i^2 - 1) / 2 - log sigma_i, `(*)`."""
    mu, log_sigma = split(eta, eta.shape[-1] // 2)
    return ((mu**2 + torch.exp(2 * log_sigma) - 1) / 2 - log_sigma).sum(-1)


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
    covariance = weight @ weight.T + torch.exp(2 * log_sigma) * torch.eye(len(bias), dtype=x.dtype, device=x.device)
    difference = x - bias
    squares = (difference * torch.linalg.solve(covariance, difference.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return -(squares + torch.logdet(covariance) + len(bias) * LOG_2_PI) / 2


def linear_gaussian_posterior(x: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(*, D)` and covariance `(D, D)` of p(z | x) = N(M^-1 W^T (x - b), s^2 M^-1), M = W^T W + s^2 I."""
    variance = torch.exp(2 * log_sigma)
    inverse = torch.linalg.inv(
        weight.T @ weight + variance * torch.eye(weight.shape[1], dtype=x.dtype, device=x.device)
    )
    return (x - bias) @ weight @ inverse, variance * inverse


def linear_gaussian_elbo(
    x: Tensor, z: Tensor, log_q: Tensor, weight: Tensor, bias: Tensor, log_sigma: Tensor
) -> Tensor:
    """log N(x; W z + b, s^2 I) + log N(z; 0, I) - log q(z | x), for a z drawn from q: `(*)`."""
    squares = ((x - z @ weight.T - bias) ** 2).sum(-1) * torch.exp(-2 * log_sigma)
    log_px_z = -(squares + len(bias) * (LOG_2_PI + 2 * log_sigma)) / 2
    return log_px_z + log_standard_normal(z) - log_q
