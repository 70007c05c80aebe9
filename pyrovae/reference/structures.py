"""One-draw ELBOs of graphs with several latents, or with a condition."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyrovae.reference.densities import Density, Net, Posterior, log_bernoulli, log_standard_normal, split
from pyrovae.reference.gaussians import diagonal_normal


def hierarchical_elbo(
    x: Tensor,
    eps: Sequence[Tensor],
    *,
    guide_kind: Literal["bottom-up", "top-down", "ladder"],
    posterior_nets: Sequence[Callable[..., Tensor]],
    prior_nets: Sequence[Net],
    likelihood_net: Net,
    posteriors: Sequence[Posterior],
    priors: Sequence[Density],
    likelihood: Density = log_bernoulli,
    log_prior: Callable[[Tensor], Tensor] = log_standard_normal,
) -> Tensor:
    """log p(x | z_1) + sum_l log p(z_l | z_{l+1}) + log p(z_L) - sum_l log q(z_l | .) at given noise.

    Args:
        x: data `(N, X)`.
        eps: noise behind z_1, ..., z_L, each `(*, N, D_l)`.
        guide_kind: bottom-up, q(z_1 | x) q(z_l | z_{l-1}); top-down, q(z_L | x) q(z_l | z_{l+1}, x); ladder,
            q(z_L | x), and q(z_l | z_{l+1}, x) the product of a Gaussian from x with p(z_l | z_{l+1}).
        posterior_nets: for z_1, ..., z_L, to eta, called with the parents in the order above; ladder: with x alone.
        prior_nets: z_{l+1} to eta of p(z_l | z_{l+1}), l = 1, ..., L - 1.
        likelihood_net: z_1 to eta.
        posteriors: for z_1, ..., z_L, eps and eta to a value and its log q.
        priors: z_l and eta to log p(z_l | z_{l+1}), l = 1, ..., L - 1.
        likelihood: x and eta to log p(x | z_1).
        log_prior: z_L to log p(z_L).

    Returns:
        `(*, N)`.
    """
    top = len(eps) - 1
    z: dict[int, Tensor] = {}
    log_q = torch.zeros(())
    for i in range(top + 1) if guide_kind == "bottom-up" else range(top, -1, -1):
        if guide_kind == "bottom-up":
            eta = posterior_nets[i](x if i == 0 else z[i - 1])
        elif i == top or guide_kind == "ladder":
            eta = posterior_nets[i](x)
        else:
            eta = posterior_nets[i](z[i + 1], x)
        if guide_kind == "ladder" and i < top:
            eta = product_of_normals(eta, prior_nets[i](z[i + 1]))
        z[i], log_q_i = posteriors[i](eps[i], eta.expand(*eps[i].shape[:-1], -1))
        log_q = log_q + log_q_i
    log_p = likelihood(x.expand(*eps[0].shape[:-1], -1), likelihood_net(z[0])) + log_prior(z[top])
    for i in range(top):
        log_p = log_p + priors[i](z[i], prior_nets[i](z[i + 1]))
    return log_p - log_q


def product_of_normals(first: Tensor, second: Tensor) -> Tensor:
    """eta of N(z; mu_1, diag(s_1^2)) N(z; mu_2, diag(s_2^2)), normalised  (Sønderby et al. 2016).

        1 / s^2 = 1 / s_1^2 + 1 / s_2^2,  mu = s^2 (mu_1 / s_1^2 + mu_2 / s_2^2)

    Args:
        first, second: eta = (mu, log s) of the factors, `(*, 2 D)`.
    """
    (mu_1, log_s_1), (mu_2, log_s_2) = (split(eta, eta.shape[-1] // 2) for eta in (first, second))
    precision_1, precision_2 = torch.exp(-2 * log_s_1), torch.exp(-2 * log_s_2)
    precision = precision_1 + precision_2
    return torch.cat([(mu_1 * precision_1 + mu_2 * precision_2) / precision, -torch.log(precision) / 2], -1)


def conditional_vae_elbo(
    x: Tensor,
    c: Tensor,
    eps: Tensor,
    *,
    posterior_net: Callable[[Tensor, Tensor], Tensor],
    prior_net: Net,
    likelihood_net: Callable[[Tensor, Tensor], Tensor],
    posterior: Posterior = diagonal_normal,
    prior: Density,
    likelihood: Density = log_bernoulli,
) -> Tensor:
    """log p(x | z, c) + log p(z | c) - log q(z | x, c) at z = g(eps, x, c)  (Sohn et al. 2015).

    Args:
        x: data `(N, X)`.
        c: conditions `(N, C)`.
        eps: noise `(*, N, D)`.
        posterior_net: x and c to the posterior's eta.
        prior_net: c to the prior's eta.
        likelihood_net: z and c to the likelihood's eta.
        posterior: eps and eta to z and log q(z | x, c).
        prior: z and eta to log p(z | c).
        likelihood: x and eta to log p(x | z, c).

    Returns:
        `(*, N)`.
    """
    z, log_q = posterior(eps, posterior_net(x, c).expand(*eps.shape[:-1], -1))
    log_px = likelihood(x.expand(*eps.shape[:-1], -1), likelihood_net(z, c))
    return log_px + prior(z, prior_net(c)) - log_q
