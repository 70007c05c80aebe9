"""Log densities by hand, of a value given eta, and of priors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_2_PI = math.log(2 * math.pi)
Net = Callable[[Tensor], Tensor]
Density = Callable[[Tensor, Tensor], Tensor]  # of a value, given eta
Posterior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # eps and eta to z and log q


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) = sum_i -(z_i^2 + log 2 pi) / 2, `(*)`."""
    return (-(z**2 + LOG_2_PI) / 2).sum(-1)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x | eta) = sum_i x_i l_i - log(1 + exp l_i) = -sum_i x_i log(1 + exp -l_i) + (1 - x_i) log(1 + exp l_i)."""
    return -(x * _log_1_exp(-logits) + (1 - x) * _log_1_exp(logits)).sum(-1)


def _log_1_exp(x: Tensor) -> Tensor:
    """log(1 + exp x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log_unit_normal(x: Tensor, mu: Tensor) -> Tensor:
    """log N(x; mu, I) = sum_i -(x_i - mu_i)^2 / 2 - log(2 pi) / 2, `(*)`."""
    return log_standard_normal(x - mu)


def log_diagonal_normal(x: Tensor, eta: Tensor) -> Tensor:
    """log N(x; mu, diag(sigma^2)) with eta = (mu, log sigma) `(*, 2 X)`, `(*)`."""
    mu, log_sigma = split(eta, eta.shape[-1] // 2)
    return log_standard_normal((x - mu) * torch.exp(-log_sigma)) - log_sigma.sum(-1)


def log_full_normal(x: Tensor, eta: Tensor) -> Tensor:
    """log N(x; mu, L L^T) with eta = (mu, log sigma, L') `(*, 2 X + X (X - 1) / 2)`, `(*)`."""
    _, log_sigma, _ = full_parameters(eta)
    return log_standard_normal(full_normal_noise(x, eta)) - log_sigma.sum(-1)


def log_one_hot(y: Tensor, logits: Tensor) -> Tensor:
    """log p(y | eta) = sum_c y_c (l_c - log sum_d exp l_d) for one-hot y `(*, C)`, `(*)`."""
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    return (y * torch.where(y == 0, torch.zeros_like(log_p), log_p)).sum(-1)


def log_floor_normal(x: Tensor, eta: Tensor, floor: float) -> Tensor:
    """log N(x; mu, diag((floor + s)^2)) with eta = (mu, log s) `(*, 2 X)`, `(*)`."""
    mu, log_s = split(eta, eta.shape[-1] // 2)
    sigma = floor + torch.exp(log_s)
    return log_standard_normal((x - mu) / sigma) - torch.log(sigma).sum(-1)


def log_categorical(x: Tensor, eta: Tensor, num_classes: int) -> Tensor:
    """sum_i l_{x_i, i} - log sum_c exp l_ci for logits eta `(*, C X)` and x_i in 0, ..., C - 1, `(*)`."""
    logits = eta.unflatten(-1, (num_classes, -1))
    classes = torch.arange(num_classes, device=x.device).unsqueeze(-1)
    return (torch.where(x.unsqueeze(-2) == classes, logits, 0).sum(-2) - torch.logsumexp(logits, -2)).sum(-1)


def log_continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """sum_i x_i l_i - log(1 + exp l_i) + log C_i, C = l / tanh(l / 2), at l = 0 equal to 2, `(*)`."""
    near = torch.abs(logits) < 0.05  # where the slope of the other cancels
    far, h = torch.where(near, 1, logits), torch.where(near, logits, 0) ** 2
    series = math.log(2) + h * (1 / 12 - h * (7 / 1440 - h * (31 / 90720 - h * 127 / 4838400)))
    return log_bernoulli(x, logits) + torch.where(near, series, torch.log(far / torch.tanh(far / 2))).sum(-1)


def log_discretized_logistics(x: Tensor, eta: Tensor, num_components: int) -> Tensor:
    """sum_i log sum_k pi_ik (F_ik(c_i + 1/255) - F_ik(c_i - 1/255)), c = 2 x - 1, eta = (mu, log s, log pi), `(*)`.

    F(c) = sigmoid((c - mu) / s), but 1 above c = 1 and 0 below c = -1.

        sigmoid(a) - sigmoid(b) = 2 sinh((a - b) / 2) / (2 cosh(a / 2)) / (2 cosh(b / 2))
    """
    mu, log_s, log_pi = eta.unflatten(-1, (3, num_components, -1)).unbind(-3)
    c, s = (2 * x - 1).unsqueeze(-2), torch.exp(log_s.clamp(min=-7))
    a, b = (c + 1 / 255 - mu) / s, (c - 1 / 255 - mu) / s
    inside = torch.log(2 * torch.sinh(1 / 255 / s)) - torch.logaddexp(a / 2, -a / 2) - torch.logaddexp(b / 2, -b / 2)
    log_p = torch.where(c < -1 + 1 / 255, -_log_1_exp(-a), inside)
    log_p = torch.where(c > 1 - 1 / 255, -_log_1_exp(b), log_p)
    return torch.logsumexp(torch.log_softmax(log_pi, -2) + log_p, -2).sum(-1)


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
    log_pi, mu, log_sigma = split(eta, num_components, num_components * z.shape[-1])
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


# --- eta in parts ----------------------------------------------------------------------------------


def split(eta: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """The first numbers, so many each, and the rest."""
    return eta.split([*sizes, eta.shape[-1] - sum(sizes)], -1)


def full_parameters(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mu, log sigma and L = L_mask * L' + diag(sigma), L' given by its strictly lower entries, row by row."""
    dim = next(d for d in range(1, eta.shape[-1] + 1) if 2 * d + d * (d - 1) // 2 == eta.shape[-1])
    mu, log_sigma, lower = split(eta, dim, dim)
    rows, start = [], 0
    for i in range(dim):
        row = [lower[..., start : start + i], torch.exp(log_sigma[..., i : i + 1])]
        rows.append(torch.cat([*row, eta.new_zeros(*eta.shape[:-1], dim - i - 1)], -1))
        start += i
    return mu, log_sigma, torch.stack(rows, -2)


def full_normal_noise(z: Tensor, eta: Tensor) -> Tensor:
    """The eps with z = mu + L eps, by forward substitution."""
    mu, _, scale = full_parameters(eta)
    return torch.linalg.solve_triangular(scale, (z - mu).unsqueeze(-1), upper=False).squeeze(-1)
