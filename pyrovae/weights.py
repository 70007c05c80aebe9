"""Sums of importance weights, taken as the weights come, and what tells whether to trust them."""

import math

import torch
from torch import Tensor

from pyrovae.arguments import check_whole


class WeightSums:
    """Sums over the particles of log-weights `(K, N)` that come in chunks `(k, N)`; in float64, memory O(N sqrt K).

    Args:
        num_particles: K, the number of particles that will have come in the end.

    Example:
        >>> sums = WeightSums(4)
        >>> for chunk in torch.tensor([[0., 1.], [0., 2.], [0., 3.], [0., 4.]]).split(3):
        ...     sums.add(chunk)
        >>> sums.elbo().tolist()
        [0.0, 2.5]
    """

    def __init__(self, num_particles: int):
        check_whole(num_particles=num_particles)
        self.num_particles = num_particles
        self.seen = 0
        # the largest weights carry the tail, and one more is its lower end
        self.tail = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))

    def add(self, log_w: Tensor, elbo: Tensor | None = None) -> None:
        """Take in the log-weights `(k, N)` of k more particles, and their ELBOs where they are not the same."""
        log_w = log_w.double()
        elbo = log_w if elbo is None else elbo.double()
        if self.seen == 0:
            # sums of w and w^2 as multiples of exp(shift) and its square
            self.shift = log_w.new_full(log_w.shape[1:], -torch.inf)
            self.sum = self.sum_squares = self.sum_of_elbos = log_w.new_zeros(log_w.shape[1:])
            self.largest = log_w[:0]
        self.seen += len(log_w)
        shift = torch.maximum(self.shift, log_w.amax(0))
        old, new = (self.shift - shift).exp().nan_to_num(0), (log_w - shift).exp().nan_to_num(0)  # NaN: -inf - -inf
        self.shift = shift
        self.sum = self.sum * old + new.sum(0)
        self.sum_squares = self.sum_squares * old**2 + (new**2).sum(0)
        self.sum_of_elbos = self.sum_of_elbos + elbo.sum(0)
        candidates = torch.cat([self.largest, log_w])
        self.largest = candidates.topk(min(self.tail + 1, len(candidates)), 0).values

    def log_mean(self) -> Tensor:
        """log (1/K) sum_k w_k, `(N,)`."""
        return self.sum.log() + self.shift - math.log(self.seen)

    def elbo(self) -> Tensor:
        """(1/K) sum_k log w_k, or the mean of the ELBOs that were given, `(N,)`."""
        return self.sum_of_elbos / self.seen

    def ess(self) -> Tensor:
        """(sum w)^2 / sum w^2, `(N,)`."""
        return (self.sum**2 / self.sum_squares).clamp(max=self.seen)

    def standard_error(self) -> Tensor:
        """Of `log_mean` by the delta method: sqrt(1/ESS - 1/K), `(N,)`; NaN for one particle."""
        if self.seen == 1:
            return torch.full_like(self.sum, torch.nan)
        return (1 / self.ess() - 1 / self.seen).clamp(min=0).sqrt()

    def k_hat(self) -> Tensor:
        """Pareto shape of the largest weights, `(N,)`; see `pareto_k_hat`."""
        return pareto_k_hat(self.largest)


def pareto_k_hat(largest: Tensor) -> Tensor:
    """Shape of the generalized Pareto distribution fitted to the tail of the weights.

    Args:
        largest: the M + 1 largest log-weights `(M + 1, N)` in descending order; the last is where the tail begins.

    Returns:
        `(N,)`: 0 where the tail has no width; NaN where M < 5, where a quarter of it is tied with its lower end, or
        where all weights are zero; infinity where it is too wide for float64.

    Source:
        Zhang and Stephens (2009), with the weakly informative prior of Vehtari et al. (2024), appendix C.
    """
    size = len(largest) - 1
    if size < 5:
        return torch.full_like(largest[0], torch.nan)
    weights = (largest - largest[0]).exp()
    excess = (weights[:-1] - weights[-1]).flip(0)  # ascending, (M, N)
    grid_size = 30 + math.isqrt(size)
    steps = torch.arange(1, grid_size + 1, dtype=largest.dtype, device=largest.device) - 0.5
    quartile = excess[int(size / 4 + 0.5) - 1]
    theta = (1 - (grid_size / steps).sqrt()).unsqueeze(-1) / (3 * quartile) + 1 / excess[-1]  # (grid, N)
    shape = torch.log1p(-theta.unsqueeze(1) * excess).mean(1)
    profile = size * ((-theta / shape).log() - shape - 1)
    theta = (theta * profile.softmax(0)).sum(0)
    shape = torch.log1p(-theta * excess).mean(0)
    k_hat = (size * shape + 5) / (size + 10)
    underflown = k_hat.isnan() & (largest[size - int(size / 4 + 0.5)] > largest[-1])
    k_hat = torch.where(underflown, torch.inf, k_hat)
    k_hat = torch.where(largest[0] > largest[-1], k_hat, torch.zeros_like(k_hat))
    return torch.where(largest[0] == -torch.inf, torch.nan, k_hat)


def error_of_mean(values: Tensor) -> float:
    """Standard error of the mean; NaN for a single datum."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
