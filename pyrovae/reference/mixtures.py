"""Gaussian mixtures, of data and of latents."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.reference.densities import LOG_2_PI, Density, Net, Posterior


def gaussian_mixture_log_joint(x: Tensor, logits: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log pi_c + log N(x; mu_c, Sigma_c) of every cluster, `(*, C)`.

    Args:
        x: `(*, X)`.
        logits: log pi up to a constant, `(C,)`.
        mean: mu `(C, X)`.
        covariance: Sigma `(C, X, X)`.
    """
    apart = (x.unsqueeze(-2) - mean).unsqueeze(-1)
    squares = (apart * torch.linalg.solve(covariance, apart)).sum((-2, -1))
    log_normal = -(squares + torch.logdet(covariance) + mean.shape[-1] * LOG_2_PI) / 2
    return logits - torch.logsumexp(logits, -1) + log_normal


def gaussian_mixture_log_prob(x: Tensor, logits: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log p(x) = log sum_c pi_c N(x; mu_c, Sigma_c), `(*)`; arguments as above."""
    return torch.logsumexp(gaussian_mixture_log_joint(x, logits, mean, covariance), -1)


def gaussian_mixture_posterior(x: Tensor, logits: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """q(c | x) = pi_c N(x; mu_c, Sigma_c) / p(x), `(*, C)`; arguments as above."""
    joint = gaussian_mixture_log_joint(x, logits, mean, covariance)
    return torch.exp(joint - torch.logsumexp(joint, -1, keepdim=True))


def mixture_vae_elbo(
    x: Tensor,
    c: Tensor | None,
    eps: Tensor,
    *,
    posterior_net: Net,
    likelihood_net: Net,
    posterior: Posterior,
    likelihood: Density,
    log_joint: Callable[[Tensor], Tensor],
) -> Tensor:
    """log p(x | z) + log p(z, c) - log q(c | z) - log q(z | x), z = g(eps, x), q(c | z) = p(z, c) / p(z), `(*)`.

    Whatever c is, it is log p(x | z) + log p(z) - log q(z | x). Where data show c, q(c | z) is not in it.

    Args:
        x: data `(N, X)`.
        c: clusters that data show, one-hot `(N, C)`, or None.
        eps: noise `(*, N, D)`.
        posterior_net: x to the posterior's eta.
        likelihood_net: z to the likelihood's eta.
        posterior: eps and eta to z and log q(z | x).
        likelihood: x and eta to log p(x | z).
        log_joint: z to log p(z, c) of every cluster, `(*, C)`.

    Source:
        Jiang et al. (2017), eq. 11 and 16.
    """
    z, log_q = posterior(eps, posterior_net(x).expand(*eps.shape[:-1], -1))
    joint = log_joint(z)
    log_p_z = torch.logsumexp(joint, -1) if c is None else (c * joint).sum(-1)
    return likelihood(x, likelihood_net(z)) + log_p_z - log_q
