"""State-space models: a one-draw ELBO step by step, the Kalman filter and smoother, the forward algorithm."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.reference.densities import Density, Net, Posterior, log_bernoulli, log_diagonal_normal, log_standard_normal
from pyrovae.reference.gaussians import diagonal_normal


def deep_markov_elbo(
    x: Tensor,
    lengths: Tensor,
    eps: Tensor,
    *,
    rnn: Callable[[Tensor, Tensor], Tensor],
    posterior_net: Callable[[Tensor, Tensor], Tensor],
    transition_net: Net,
    likelihood_net: Net,
    initial_eta: Tensor,
    z_0: Tensor,
    posterior: Posterior = diagonal_normal,
    transition: Density = log_diagonal_normal,
    likelihood: Density = log_bernoulli,
) -> Tensor:
    """sum_t log p(x_t | z_t) + log p(z_t | z_{t-1}) - log q(z_t | z_{t-1}, x_{t:T})  (Krishnan et al. 2017, eq. 5).

    Each sequence is cut to its own length and taken by itself, one step after the other.

    Args:
        x: sequences `(N, T, X)`.
        lengths: `(N,)`.
        eps: noise `(*, N, T, D)`.
        rnn: one sequence `(1, t, X)` and its length `(1,)` to h `(1, t, H)`.
        posterior_net: z_{t-1} and h_t to the posterior's eta.
        transition_net: z_{t-1} to the transition's eta.
        likelihood_net: z_t to the likelihood's eta.
        initial_eta: the transition's eta for z_1, `(E,)`.
        z_0: the guide's state before the first, `(D,)`.
        posterior: eps and eta to z_t and its log q.
        transition: z_t and eta to log p(z_t | z_{t-1}).
        likelihood: x_t and eta to log p(x_t | z_t).

    Returns:
        `(*, N)`.
    """
    elbos = []
    for i, length in enumerate(lengths.tolist()):
        h = rnn(x[i : i + 1, :length], lengths[i : i + 1])[0]
        noise, elbo, z = eps[..., i, :, :], torch.zeros(()), z_0
        for t in range(length):
            prior_eta = initial_eta.expand(*eps.shape[:-3], -1) if t == 0 else transition_net(z)
            z, log_q = posterior(noise[..., t, :], posterior_net(z, h[t]).expand(*eps.shape[:-3], -1))
            log_z = transition(z, prior_eta)
            log_x = likelihood(x[i, t].expand(*eps.shape[:-3], -1), likelihood_net(z))
            elbo = elbo + log_x + log_z - log_q
        elbos.append(elbo)
    return torch.stack(elbos, -1)


def kalman_filter(
    x: Tensor,
    lengths: Tensor,
    *,
    transition: Tensor,
    emission: Tensor,
    bias: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
    transition_covariance: Tensor,
    emission_covariance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x), and mean and covariance of p(z_t | x_{1:t})  (Kalman 1960).

        z_1 ~ N(m, P_1),  z_t ~ N(A z_{t-1}, Q),  x_t ~ N(C z_t + b, R)

    Args:
        x: sequences `(N, T, X)`.
        lengths: `(N,)`.
        transition: A `(D, D)`.
        emission: C `(X, D)`.
        bias: b `(X,)`.
        initial_mean: m `(D,)`.
        initial_covariance, transition_covariance: P_1 and Q, `(D, D)`.
        emission_covariance: R `(X, X)`.

    Returns:
        `(N,)`, `(N, T, D)` and `(N, T, D, D)`; beyond a sequence's end, predictions.
    """
    log_px, mean, root = _filter(
        x,
        lengths,
        transition,
        emission,
        bias,
        initial_mean,
        initial_covariance,
        transition_covariance,
        emission_covariance,
    )
    return log_px, mean, root.mT @ root


def _filter(
    x: Tensor,
    lengths: Tensor,
    transition: Tensor,
    emission: Tensor,
    bias: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
    transition_covariance: Tensor,
    emission_covariance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The filter, with a root U in the place of each covariance U^T U: none is formed, let alone taken from another."""
    mean, root = initial_mean.expand(len(x), -1), _root(initial_covariance).expand(len(x), -1, -1)
    step, noise = _root(transition_covariance), _root(emission_covariance).expand(len(x), -1, -1)
    log_px, means, roots = x.new_zeros(len(x)), [], []
    for t in range(x.shape[1]):
        if t > 0:
            mean = mean @ transition.T
            root = torch.linalg.qr(torch.cat([root @ transition.T, step.expand_as(root)], 1)).R
        seen = (t < lengths).unsqueeze(-1)
        innovation, rest, updated = _joint(noise, root, emission)
        error = torch.where(seen, x[:, t] - mean @ emission.T - bias, 0)
        eps = torch.linalg.solve_triangular(innovation.mT, error.unsqueeze(-1), upper=False)
        log_det = torch.log(torch.abs(innovation.diagonal(dim1=-2, dim2=-1))).sum(-1)
        log_px = log_px + torch.where(seen[:, 0], log_standard_normal(eps.squeeze(-1)) - log_det, 0)
        mean = mean + (rest.mT @ eps).squeeze(-1)
        root = torch.where(seen.unsqueeze(-1), updated, root)
        means.append(mean)
        roots.append(root)
    return log_px, torch.stack(means, 1), torch.stack(roots, 1)


def _root(covariance: Tensor) -> Tensor:
    """U, upper triangular, with U^T U the covariance."""
    return torch.linalg.cholesky(covariance).mT


def _joint(noise: Tensor, root: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of z ~ N(0, U^T U) and x = A z + e, e ~ N(0, V^T V), what the root of their covariance is made of.

    By a QR decomposition (Kaminski, Bryson and Schmidt 1971): S with S^T S = A P A^T + R, G with S^T G = A P, and W
    with W^T W = P - G^T G, the covariance of z given x.

    Args:
        noise: V `(*, X, X)`.
        root: U `(*, D, D)`.
        matrix: A `(X, D)`.
    """
    x_dim, z_dim = matrix.shape
    noise = torch.cat([noise, noise.new_zeros(*noise.shape[:-1], z_dim)], -1)
    both = torch.linalg.qr(torch.cat([torch.cat([root @ matrix.T, root], -1), noise], -2)).R
    return both[..., :x_dim, :x_dim], both[..., :x_dim, x_dim:], both[..., x_dim:, x_dim:]


def kalman_smoother(x: Tensor, lengths: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of p(z_t | x_{1:T})  (Rauch, Tung and Striebel 1965).

    Args:
        x, lengths, parameters: as for `kalman_filter`.

    Returns:
        `(N, T, D)` and `(N, T, D, D)`; beyond a sequence's end, predictions.
    """
    a, step = parameters["transition"], _root(parameters["transition_covariance"])
    _, means, roots = _filter(x, lengths, **parameters)
    mean, covariance = means[:, -1], roots[:, -1].mT @ roots[:, -1]
    smoothed = [(mean, covariance)]
    for t in reversed(range(x.shape[1] - 1)):
        root, rest, given = _joint(step.expand_as(covariance), roots[:, t], a)  # of z_{t+1} and z_t given it
        gain = torch.linalg.solve_triangular(root, rest, upper=True).mT
        error = mean - means[:, t] @ a.T
        mean = means[:, t] + (gain @ error.unsqueeze(-1)).squeeze(-1)
        covariance = given.mT @ given + gain @ covariance @ gain.mT
        smoothed.insert(0, (mean, covariance))
    return torch.stack([mean for mean, _ in smoothed], 1), torch.stack([covariance for _, covariance in smoothed], 1)


def forward_algorithm(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """log p(x) of a hidden Markov model, and log p(x_{1:t}, z_t)  (Rabiner 1989, eq. 19 to 21).

    Args:
        log_initial: log p(z_1), `(S,)`.
        log_transition: log p(z_t = j | z_{t-1} = i), `(S, S)`.
        log_likelihood: log p(x_t | z_t), `(N, T, S)`.
        lengths: `(N,)`.

    Returns:
        `(N,)` and `(N, T, S)`, the latter constant beyond a sequence's end.
    """
    alpha = log_initial + log_likelihood[:, 0]
    alphas = [alpha]
    for t in range(1, log_likelihood.shape[1]):
        step = torch.logsumexp(alpha.unsqueeze(-1) + log_transition, 1) + log_likelihood[:, t]
        alpha = torch.where((t < lengths).unsqueeze(-1), step, alpha)
        alphas.append(alpha)
    return torch.logsumexp(alpha, -1), torch.stack(alphas, 1)


def backward_algorithm(log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor) -> Tensor:
    """log p(x_{t+1:T} | z_t) of a hidden Markov model  (Rabiner 1989, eq. 24, 25).

    Args:
        log_transition, log_likelihood, lengths: as for `forward_algorithm`.

    Returns:
        `(N, T, S)`, 0 from a sequence's last step on.
    """
    beta = torch.zeros_like(log_likelihood[:, 0])
    betas = [beta]
    for t in reversed(range(1, log_likelihood.shape[1])):
        step = torch.logsumexp(log_transition + (log_likelihood[:, t] + beta).unsqueeze(1), -1)
        beta = torch.where((t < lengths).unsqueeze(-1), step, torch.zeros_like(step))
        betas.insert(0, beta)
    return torch.stack(betas, 1)


def hidden_markov_log_joint(
    z: Tensor, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor
) -> Tensor:
    """log p(x, z) of a hidden Markov model at states z `(*, N, T, S)`, one-hot: `(*, N)`.

    Args:
        z: the states.
        log_initial, log_transition, log_likelihood, lengths: as for `forward_algorithm`.
    """
    log_joint = _at(z[..., 0, :], log_initial)
    for t in range(z.shape[-2]):
        step = _at(z[..., t, :], log_likelihood[:, t])
        if t > 0:
            moves = z[..., t - 1, :, None] * z[..., t, None, :]
            step = step + _at(moves.flatten(-2), log_transition.flatten())
        log_joint = log_joint + torch.where(t < lengths, step, 0)
    return log_joint


def _at(z: Tensor, log_p: Tensor) -> Tensor:
    """sum_s z_s log p_s, where z_s is 0 without it, be it minus infinity."""
    return (z * torch.where(z == 0, torch.zeros_like(log_p), log_p)).sum(-1)
