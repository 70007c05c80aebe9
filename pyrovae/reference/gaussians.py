"""Gaussian posteriors: z = g(eps, eta), log q(z | x) = log p(eps) - log |det dz / d eps|  (2.33)."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.reference.densities import LOG_2_PI, full_normal_noise, full_parameters, log_standard_normal, split


def diagonal_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + sigma * eps and log q = sum_i [-(eps_i^2 + log 2 pi) / 2 - log sigma_i]  (2.36 to 2.40, Algorithm 1)."""
    mu, log_sigma = split(eta, eta.shape[-1] // 2)
    z = mu + torch.exp(log_sigma) * eps
    log_q = (-(eps**2 + LOG_2_PI) / 2 - log_sigma).sum(-1)
    return z, log_q


def unit_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + eps and log q = log p(eps): the Jacobian is the identity."""
    return eta + eps, log_standard_normal(eps)


def full_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + L eps and log q = sum_i [-(eps_i^2 + log 2 pi) / 2 - log sigma_i]  (Algorithm 2)."""
    mu, log_sigma, scale = full_parameters(eta)
    z = mu + (scale @ eps.unsqueeze(-1)).squeeze(-1)
    log_q = (-(eps**2 + LOG_2_PI) / 2 - log_sigma).sum(-1)
    return z, log_q


def diagonal_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + sigma * eps."""
    mu, log_sigma = split(eta, eta.shape[-1] // 2)
    return (z - mu) * torch.exp(-log_sigma)


def unit_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + eps."""
    return z - eta


# by the names of the families: (eps, eta) to z and log q(z | x); (z, eta) to eps
POSTERIORS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "DiagonalNormal": (diagonal_normal, diagonal_normal_noise),
    "UnitNormal": (unit_normal, unit_normal_noise),
    "FullNormal": (full_normal, full_normal_noise),
}
