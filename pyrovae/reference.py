"""The ELBOs by hand: plain torch, no Pyro, nothing of pyrovae. What the programs are held against.

Notation: data x `(*, X)`, latents z `(*, D)`, noise eps `(*, D)`; a result has shape `*`, in nats, for each datum.
Equation numbers are those of Kingma and Welling, An Introduction to Variational Autoencoders (2019).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_2_PI = math.log(2 * math.pi)
Net = Callable[[Tensor], Tensor]
Density = Callable[[Tensor, Tensor], Tensor]  # of a value, given eta
Posterior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # eps and eta to z and log q


# --- log densities ---------------------------------------------------------------------------------


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) = sum_i -(z_i^2 + log 2 pi) / 2, `(*)`."""
    return (-(z**2 + LOG_2_PI) / 2).sum(-1)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x | eta) = sum_i x_i l_i - log(1 + exp l_i), `(*)`."""
    return (x * logits - torch.logaddexp(logits, torch.zeros_like(logits))).sum(-1)


def log_unit_normal(x: Tensor, mu: Tensor) -> Tensor:
    """log N(x; mu, I) = sum_i -(x_i - mu_i)^2 / 2 - log(2 pi) / 2, `(*)`."""
    return log_standard_normal(x - mu)


def log_diagonal_normal(x: Tensor, eta: Tensor) -> Tensor:
    """log N(x; mu, diag(sigma^2)) with eta = (mu, log sigma) `(*, 2 X)`, `(*)`."""
    mu, log_sigma = _split(eta, eta.shape[-1] // 2)
    return log_standard_normal((x - mu) * torch.exp(-log_sigma)) - log_sigma.sum(-1)


def log_full_normal(x: Tensor, eta: Tensor) -> Tensor:
    """log N(x; mu, L L^T) with eta = (mu, log sigma, L') `(*, 2 X + X (X - 1) / 2)`, `(*)`."""
    _, log_sigma, _ = _full_parameters(eta)
    return log_standard_normal(full_normal_noise(x, eta)) - log_sigma.sum(-1)


def log_one_hot(y: Tensor, logits: Tensor) -> Tensor:
    """log p(y | eta) = sum_c y_c (l_c - log sum_d exp l_d) for one-hot y `(*, C)`, `(*)`."""
    return (y * (logits - torch.logsumexp(logits, -1, keepdim=True))).sum(-1)


def log_floor_normal(x: Tensor, eta: Tensor, floor: float) -> Tensor:
    """log N(x; mu, diag((floor + s)^2)) with eta = (mu, log s) `(*, 2 X)`, `(*)`."""
    mu, log_s = _split(eta, eta.shape[-1] // 2)
    sigma = floor + torch.exp(log_s)
    return log_standard_normal((x - mu) / sigma) - torch.log(sigma).sum(-1)


def log_categorical(x: Tensor, eta: Tensor, num_classes: int) -> Tensor:
    """sum_i l_{x_i, i} - log sum_c exp l_ci for logits eta `(*, C X)` and x_i in 0, ..., C - 1, `(*)`."""
    logits = eta.unflatten(-1, (num_classes, -1))
    classes = torch.arange(num_classes, device=x.device).unsqueeze(-1)
    return (torch.where(x.unsqueeze(-2) == classes, logits, 0).sum(-2) - torch.logsumexp(logits, -2)).sum(-1)


def log_continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """sum_i x_i l_i - log(1 + exp l_i) + log C_i, C = l / tanh(l / 2), at l = 0 equal to 2, `(*)`."""
    far = torch.where(logits == 0, 1, logits)
    log_c = torch.where(logits == 0, math.log(2), torch.log(far / torch.tanh(far / 2)))
    return log_bernoulli(x, logits) + log_c.sum(-1)


def log_discretized_logistics(x: Tensor, eta: Tensor, num_components: int) -> Tensor:
    """sum_i log sum_k pi_ik (F_ik(c_i + 1/255) - F_ik(c_i - 1/255)), c = 2 x - 1, eta = (mu, log s, log pi), `(*)`.

    F(c) = sigmoid((c - mu) / s), but 1 above c = 1 and 0 below c = -1.
    """
    mu, log_s, log_pi = eta.unflatten(-1, (3, num_components, -1)).unbind(-3)
    c, s = (2 * x - 1).unsqueeze(-2), torch.exp(log_s.clamp(min=-7))
    above = torch.where(c > 1 - 1 / 255, 1, torch.sigmoid((c + 1 / 255 - mu) / s))
    below = torch.where(c < -1 + 1 / 255, 0, torch.sigmoid((c - 1 / 255 - mu) / s))
    return torch.log((torch.softmax(log_pi, -2) * (above - below)).sum(-2)).sum(-1)


def log_pixels(x: Tensor, eta: Tensor, net: Density) -> Tensor:
    """sum_i log Bernoulli(x_i; l_i), l = net(x, eta) with l_i a function of x_<i and eta alone, `(*)`."""
    return log_bernoulli(x, net(x, eta))


# By the names of the families. A family that needs more than eta has it as keyword arguments (`Conditional.parts`).
LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "Bernoulli": log_bernoulli,
    "UnitNormal": log_unit_normal,
    "DiagonalNormal": log_diagonal_normal,
    "FullNormal": log_full_normal,
    "FloorNormal": log_floor_normal,
    "Categorical": log_categorical,
    "ContinuousBernoulli": log_continuous_bernoulli,
    "DiscretizedLogisticMixture": log_discretized_logistics,
    "PixelCNN": log_pixels,
}


# --- priors ----------------------------------------------------------------------------------------


def log_mixture_of_normals(z: Tensor, eta: Tensor, num_components: int) -> Tensor:
    """log sum_k pi_k N(z; mu_k, diag(sigma_k^2)) with eta = (log pi, mu, log sigma), log pi up to a constant, `(*)`."""
    log_pi, mu, log_sigma = _split(eta, num_components, num_components * z.shape[-1])
    eta_k = torch.cat([mu.unflatten(-1, (num_components, -1)), log_sigma.unflatten(-1, (num_components, -1))], -1)
    return torch.logsumexp(torch.log_softmax(log_pi, -1) + log_diagonal_normal(z.unsqueeze(-2), eta_k), -1)


def log_vamp(z: Tensor, eta: Tensor, posterior: tuple[Posterior, Density]) -> Tensor:
    """log (1 / K) sum_k q(z | u_k), eta `(K, E)` the posterior's at u_k  (Tomczak and Welling 2018), `(*)`."""
    transform, noise = posterior
    z_k = z.unsqueeze(-2).expand(*z.shape[:-1], len(eta), -1)
    eta_k = eta.expand(*z_k.shape[:-1], -1)
    return torch.logsumexp(transform(noise(z_k, eta_k), eta_k)[1], -1) - math.log(len(eta))


def log_autoregressive_normal(z: Tensor, eta: Tensor, net: Net) -> Tensor:
    """log prod_i N(z_i; mu_i, sigma_i^2), (mu, log sigma) = net(z), mu_i and sigma_i functions of z_<i alone, `(*)`."""
    return log_diagonal_normal(z, net(z))


def log_energy(z: Tensor, eta: Tensor, energy: Net, log_z: Tensor) -> Tensor:
    """-E(z) + log N(z; 0, I) - log Z, `(*)`."""
    return log_standard_normal(z) - energy(z) - log_z


PRIORS: dict[str, Callable[..., Tensor]] = {
    "StandardNormal": lambda z, eta: log_standard_normal(z),
    "MixtureOfNormals": log_mixture_of_normals,
    "VampPrior": log_vamp,
    "AutoregressivePrior": log_autoregressive_normal,
    "EnergyPrior": log_energy,
}


# --- posteriors: z = g(eps, eta), log q(z | x) = log p(eps) - log |det dz / d eps|  (2.33) ---------


def diagonal_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + sigma * eps and log q = sum_i [-(eps_i^2 + log 2 pi) / 2 - log sigma_i]  (2.36 to 2.40, Algorithm 1)."""
    mu, log_sigma = _split(eta, eta.shape[-1] // 2)
    z = mu + torch.exp(log_sigma) * eps
    log_q = (-(eps**2 + LOG_2_PI) / 2 - log_sigma).sum(-1)
    return z, log_q


def unit_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + eps and log q = log p(eps): the Jacobian is the identity."""
    return eta + eps, log_standard_normal(eps)


def full_normal(eps: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + L eps and log q = sum_i [-(eps_i^2 + log 2 pi) / 2 - log sigma_i]  (Algorithm 2)."""
    mu, log_sigma, scale = _full_parameters(eta)
    z = mu + (scale @ eps.unsqueeze(-1)).squeeze(-1)
    log_q = (-(eps**2 + LOG_2_PI) / 2 - log_sigma).sum(-1)
    return z, log_q


def diagonal_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + sigma * eps."""
    mu, log_sigma = _split(eta, eta.shape[-1] // 2)
    return (z - mu) * torch.exp(-log_sigma)


def unit_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + eps."""
    return z - eta


def full_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + L eps, by forward substitution."""
    mu, _, scale = _full_parameters(eta)
    return torch.linalg.solve_triangular(scale, (z - mu).unsqueeze(-1), upper=False).squeeze(-1)


# by the names of the families: (eps, eta) to z and log q(z | x); (z, eta) to eps
POSTERIORS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "DiagonalNormal": (diagonal_normal, diagonal_normal_noise),
    "UnitNormal": (unit_normal, unit_normal_noise),
    "FullNormal": (full_normal, full_normal_noise),
}


def _split(eta: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return eta.split([*sizes, eta.shape[-1] - sum(sizes)], -1)


def _full_parameters(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mu, log sigma and L = L_mask * L' + diag(sigma), L' given by its strictly lower entries, row by row."""
    dim = next(d for d in range(1, eta.shape[-1] + 1) if 2 * d + d * (d - 1) // 2 == eta.shape[-1])
    mu, log_sigma, lower = _split(eta, dim, dim)
    rows, start = [], 0
    for i in range(dim):
        row = [lower[..., start : start + i], torch.exp(log_sigma[..., i : i + 1])]
        rows.append(torch.cat([*row, eta.new_zeros(*eta.shape[:-1], dim - i - 1)], -1))
        start += i
    return mu, log_sigma, torch.stack(rows, -2)


# --- bounds ----------------------------------------------------------------------------------------


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
    return (torch.exp(log_q) * (labeled_elbos - log_q)).sum(0)


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


# --- closed forms ----------------------------------------------------------------------------------


def kl_diagonal_standard(eta: Tensor) -> Tensor:
    """KL(N(mu, diag(sigma^2)) || N(0, I)) = sum_i (mu_i^2 + sigma_i^2 - 1) / 2 - log sigma_i, `(*)`."""
    mu, log_sigma = _split(eta, eta.shape[-1] // 2)
    return ((mu**2 + torch.exp(2 * log_sigma) - 1) / 2 - log_sigma).sum(-1)


def kl_full_standard(eta: Tensor) -> Tensor:
    """KL(N(mu, L L^T) || N(0, I)) = (|mu|^2 + |L|_F^2 - D) / 2 - sum_i log sigma_i, `(*)`."""
    mu, log_sigma, scale = _full_parameters(eta)
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
