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
    mean, covariance = initial_mean.expand(len(x), -1), initial_covariance.expand(len(x), -1, -1)
    log_px, means, covariances = x.new_zeros(len(x)), [], []
    for t in range(x.shape[1]):
        if t > 0:
            mean = mean @ transition.T
            covariance = transition @ covariance @ transition.T + transition_covariance
        seen = (t < lengths).unsqueeze(-1)
        innovation = emission @ covariance @ emission.T + emission_covariance
        error = torch.where(seen, x[:, t] - mean @ emission.T - bias, 0)
        log_px = log_px + torch.where(seen[:, 0], _log_centered_normal(error, innovation), 0)
        gain = torch.linalg.solve(innovation, emission @ covariance).mT
        mean = mean + (gain @ error.unsqueeze(-1)).squeeze(-1)
        covariance = torch.where(seen.unsqueeze(-1), covariance - gain @ emission @ covariance, covariance)
        means.append(mean)
        covariances.append(covariance)
    return log_px, torch.stack(means, 1), torch.stack(covariances, 1)


def _log_centered_normal(error: Tensor, covariance: Tensor) -> Tensor:
    """log N(error; 0, covariance), by the Cholesky factor."""
    scale = torch.linalg.cholesky(covariance)
    eps = torch.linalg.solve_triangular(scale, error.unsqueeze(-1), upper=False).squeeze(-1)
    return log_standard_normal(eps) - scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def kalman_smoother(x: Tensor, lengths: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of p(z_t | x_{1:T})  (Rauch, Tung and Striebel 1965).

    Args:
        x, lengths, parameters: as for `kalman_filter`.

    Returns:
        `(N, T, D)` and `(N, T, D, D)`; beyond a sequence's end, predictions.
    """
    a, q = parameters["transition"], parameters["transition_covariance"]
    _, means, covariances = kalman_filter(x, lengths, **parameters)
    mean, covariance = means[:, -1], covariances[:, -1]
    smoothed = [(mean, covariance)]
    for t in reversed(range(x.shape[1] - 1)):
        predicted = a @ covariances[:, t] @ a.T + q
        gain = torch.linalg.solve(predicted, a @ covariances[:, t]).mT
        error = mean - means[:, t] @ a.T
        mean = means[:, t] + (gain @ error.unsqueeze(-1)).squeeze(-1)
        covariance = covariances[:, t] + gain @ (covariance - predicted) @ gain.mT
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
    log_joint = (z[..., 0, :] * log_initial).sum(-1)
    for t in range(z.shape[-2]):
        step = (z[..., t, :] * log_likelihood[:, t]).sum(-1)
        if t > 0:
            step = step + ((z[..., t - 1, :] @ log_transition) * z[..., t, :]).sum(-1)
        log_joint = log_joint + torch.where(t < lengths, step, 0)
    return log_joint
