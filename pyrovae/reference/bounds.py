"""Bounds on log p(x), for each datum."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.reference.densities import (
    Density,
    Net,
    Posterior,
    log_bernoulli,
    log_diagonal_normal,
    log_one_hot,
    log_standard_normal,
)
from pyrovae.reference.gaussians import diagonal_normal


def vae_elbo(
    x: Tensor,
    eps: Tensor,
    *,
    posterior_net: Net,
    likelihood_net: Net,
    posterior: Posterior = diagonal_normal,
    likelihood: Density = log_bernoulli,
    log_prior: Callable[[Tensor], Tensor] = log_standard_normal,
) -> Tensor:
    """log p(x | z) + log p(z) - log q(z | x) at z = g(eps, x): the one-draw ELBO at given noise (Algorithms 1 and 2).

    Args:
        x: data `(N, X)`.
        eps: noise `(*, N, D)`; leading dimensions are particles.
        posterior_net: x to the posterior's eta.
        likelihood_net: z to the likelihood's eta.
        posterior: eps and eta to z and log q(z | x), as `diagonal_normal`.
        likelihood: x and eta to log p(x | z), as `log_bernoulli`.
        log_prior: z to log p(z).

    Returns:
        `(*, N)`.
    """
    eta = posterior_net(x)
    z, log_q = posterior(eps, eta.expand(*eps.shape[:-1], -1))
    log_px_z = likelihood(x.expand(*eps.shape[:-1], -1), likelihood_net(z))
    return log_px_z + log_prior(z) - log_q


def auxiliary_elbo(
    x: Tensor,
    eps_a: Tensor,
    eps_z: Tensor,
    *,
    auxiliary_posterior_net: Net,
    posterior_net: Callable[[Tensor, Tensor], Tensor],
    likelihood_net: Net,
    auxiliary_net: Callable[[Tensor, Tensor], Tensor],
    auxiliary_posterior: Posterior = diagonal_normal,
    posterior: Posterior = diagonal_normal,
    likelihood: Density = log_bernoulli,
    auxiliary: Density = log_diagonal_normal,
    log_prior: Callable[[Tensor], Tensor] = log_standard_normal,
) -> Tensor:
    """log p(x | z) + log p(z) + log p(a | x, z) - log q(a | x) - log q(z | a, x)  (section 3.2.1).

    Args:
        x: data `(N, X)`.
        eps_a, eps_z: noise `(*, N, D)`.
        auxiliary_posterior_net: x to eta of q(a | x).
        posterior_net: a and x to eta of q(z | a, x).
        likelihood_net: z to eta of p(x | z).
        auxiliary_net: x and z to eta of p(a | x, z).
        auxiliary_posterior, posterior: eps and eta to a value and its log q.
        likelihood, auxiliary: a value and eta to its log p.
        log_prior: z to log p(z).

    Returns:
        `(*, N)`.
    """
    a, log_q_a = auxiliary_posterior(eps_a, auxiliary_posterior_net(x).expand(*eps_a.shape[:-1], -1))
    z, log_q_z = posterior(eps_z, posterior_net(a, x))
    log_px_z = likelihood(x.expand(*eps_z.shape[:-1], -1), likelihood_net(z))
    return log_px_z + log_prior(z) + auxiliary(a, auxiliary_net(x, z)) - log_q_a - log_q_z


def labeled_elbo(
    x: Tensor,
    y: Tensor,
    eps: Tensor,
    *,
    label_logits: Tensor,
    posterior_net: Callable[[Tensor, Tensor], Tensor],
    likelihood_net: Callable[[Tensor, Tensor], Tensor],
    posterior: Posterior = diagonal_normal,
    likelihood: Density = log_bernoulli,
    log_prior: Callable[[Tensor], Tensor] = log_standard_normal,
) -> Tensor:
    """-L(x, y) = log p(x | y, z) + log p(y) + log p(z) - log q(z | x, y) at z = g(eps, x, y)  (Kingma et al. 2014, 6).

    Args:
        x: data `(N, X)`.
        y: labels, one-hot, `(*, N, C)`.
        eps: noise `(*, N, D)`.
        label_logits: of p(y), `(C,)`.
        posterior_net: x and y to the posterior's eta; one that ignores y makes the guide q(y | x) q(z | x).
        likelihood_net: y and z to the likelihood's eta.
        posterior: eps and eta to z and log q(z | x, y).
        likelihood: x and eta to log p(x | y, z).
        log_prior: z to log p(z).

    Returns:
        `(*, N)`.
    """
    eta = posterior_net(x, y)
    z, log_q = posterior(eps, eta.expand(*eps.shape[:-1], -1))
    log_px = likelihood(x, likelihood_net(y, z))
    return log_px + log_one_hot(y, label_logits) + log_prior(z) - log_q


def unlabeled_elbo(labeled_elbos: Tensor, class_logits: Tensor) -> Tensor:
    """-U(x) = sum_y q(y | x) (-L(x, y)) + H(q(y | x))  (Kingma et al. 2014, 7).

    With a guide q(y | x) q(z | x) it is E[log p(x | y, z)] - KL(q(z | x) || p(z)) - KL(q(y | x) || p(y)), one z for
    all classes in the place of the expectation.

    Args:
        labeled_elbos: -L(x, y) of every class `(C, N)`.
        class_logits: of q(y | x), `(N, C)`.

    Returns:
        `(N,)`.
    """
    log_q = (class_logits - torch.logsumexp(class_logits, -1, keepdim=True)).T
    q = torch.exp(log_q)
    return (q * torch.where(q == 0, torch.zeros_like(q), labeled_elbos - log_q)).sum(0)  # 0 log 0 = 0


def semi_supervised_objective(
    labeled_elbos: Tensor, unlabeled_elbos: Tensor, y: Tensor, class_logits: Tensor, supervised_weight: float
) -> Tensor:
    """sum L + sum U + alpha mean[-log q(y | x)] over all data, to be minimised  (Kingma et al. 2014, 8, 9).

    Args:
        labeled_elbos: -L(x, y) of the labelled data, `(N_l,)`.
        unlabeled_elbos: -U(x) of the others, `(N_u,)`.
        y: labels, one-hot, `(N_l, C)`.
        class_logits: of q(y | x) for the labelled data, `(N_l, C)`.
        supervised_weight: alpha; the paper has 0.1 (N_l + N_u).
    """
    return -labeled_elbos.sum() - unlabeled_elbos.sum() - supervised_weight * log_one_hot(y, class_logits).mean()


def importance_bound(log_w: Tensor) -> Tensor:
    """log (1 / K) sum_k w_k for each datum, from log-weights `(K, N)`: `(N,)`  (section 2.6)."""
    largest = log_w.amax(0).clamp(min=torch.finfo(log_w.dtype).min)  # finite, also where all weights are zero
    return largest + torch.log(torch.exp(log_w - largest).mean(0))


def dreg_value(log_p: Net, log_q: Net, z: Tensor) -> Tensor:
    """Numbers `(N,)` whose gradient in phi is the doubly reparameterized one (Tucker et al. 2019, eq. 7):

        sum_k (w_k / sum_j w_j)^2  d log w_k / d z_k  d z_k / d phi

    Args:
        log_p: z to log p(x, z), `(K, N)`.
        log_q: z to log q(z | x), `(K, N)`.
        z: g(eps, phi, x), `(K, N, D)`.
    """
    point = z.detach().requires_grad_()
    log_w = log_p(point) - log_q(point)
    (slope,) = torch.autograd.grad(log_w.sum(), point)
    share = torch.exp(log_w - torch.logsumexp(log_w, 0)).detach()
    return (share**2 * (slope * z).sum(-1)).sum(0)


def free_bits_bound(log_px_z: Tensor, kl: Tensor, nats: float) -> Tensor:
    """E_M[log p(x | z)] - sum_j max(lambda, E_M[KL_j]), a number  (Kingma et al. 2016, eq. 15).

    Args:
        log_px_z: `(N,)`.
        kl: of each group of latents, `(N, J)`.
        nats: lambda.
    """
    means = kl.mean(0)
    return log_px_z.mean() - torch.where(means > nats, means, nats).sum()
