"""A prior by an energy, whose normalizer is estimated."""

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.conditionals.density import Density
from pyrovae.conditionals.priors import check_root, no_mean
from pyrovae.nets import MLP, Activation, _check_sizes


class EnergyPrior(Conditional):
    """p(z) = exp(-E(z)) N(z; 0, I) / Z,  Z = E_N(0, I)[exp(-E(z))], E a network, a root.

    log Z is estimated by the log mean of exp(-E) over S draws from N(0, I). In training mode each call of `log_prob`
    draws anew, so that gradients carry the learning of log Z. In eval mode the S draws are always the same, made once
    by a generator of their own: all data and particles share one log Z, which is the one that `log_normalizer()`
    gives with its standard error. Its error shifts log p(x) of all data by as much, and is not in the standard error
    of an evaluation: report both. The estimate is consistent and biased: log Z is too small, and so log p(x) too
    large, by about half the squared standard error.

    Draws are approximate, by sampling-importance-resampling: one of C candidates from N(0, I), chosen with probability
    proportional to exp(-E). Their error falls as 1 / C.

    Args:
        net: E, from `(B, dim)` to `(B, 1)`; a constant in it has no effect.
        dim: size of z.
        num_samples: S.
        num_candidates: C.

    Raises:
        ValueError: for a size below 1.

    Source:
        Pang et al. (2020); there draws and gradients are by short chains of Langevin dynamics. Rubin (1988) for
        sampling-importance-resampling.

    Example:
        >>> EnergyPrior.mlp(0, 2, hidden=(10,))().sample((3,)).shape
        torch.Size([3, 2])
    """

    noise: Tensor
    eta_at = no_mean

    def __init__(self, net: nn.Module, dim: int, num_samples: int = 1000, num_candidates: int = 100):
        super().__init__(net)
        _check_sizes(dim=dim, num_samples=num_samples, num_candidates=num_candidates)
        self.dim, self.num_samples, self.num_candidates = dim, num_samples, num_candidates
        # drawn where a seed gives the same for every device; not at all for a program that is built without memory
        device = "meta" if torch.get_default_device().type == "meta" else "cpu"
        noise = torch.empty(num_samples, dim, device=device).normal_(generator=torch.Generator("cpu").manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)

    @classmethod
    def mlp(
        cls,
        parents_dim: int,
        dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        **family: Any,
    ) -> Self:
        """An energy by a perceptron without a constant, which has no effect; parents_dim is 0.

        Raises:
            ValueError: for another parents_dim.
        """
        if not isinstance(parents_dim, int) or parents_dim != 0:
            raise ValueError(f"Expected parents_dim to be 0, for EnergyPrior has no parents; got {parents_dim!r}")
        return cls(MLP(dim, 1, hidden, activation, out_bias=False), dim, **family)

    @staticmethod
    def eta_dim(dim: int) -> int:
        """Nothing: the energy depends on z."""
        return 0

    @property
    def parts(self) -> dict[str, Any]:
        """E and log Z."""
        return {"energy": self.energy, "log_z": self.log_z()}

    def energy(self, z: Tensor) -> Tensor:
        """E(z) `(*)` for z `(*, dim)`."""
        energy = super().eta(z)
        if energy.shape[-1] != 1:
            raise ValueError(f"Expected EnergyPrior's network to give 1 number; got {energy.shape[-1]}")
        return energy.squeeze(-1)

    def log_z(self) -> Tensor:
        """log Z as `log_prob` has it: from S new draws in training mode, from the S fixed ones in eval mode."""
        noise = torch.randn_like(self.noise) if self.training else self.noise
        return torch.logsumexp(-self.energy(noise), 0) - math.log(self.num_samples)

    @torch.no_grad()
    def log_normalizer(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """log Z and its standard error by the delta method, sqrt(1/ESS - 1/S), nats.

        Where the effective sample size is small the error is itself too small: let S grow until both stand still.

        Args:
            num_samples: S new draws from N(0, I); None for the fixed ones, whose log Z is that of eval mode.
            generator: of the new draws; None for torch's own.

        Raises:
            ValueError: for num_samples below 1.
        """
        noise = self.noise
        if num_samples is not None:
            _check_sizes(num_samples=num_samples)
            noise = torch.randn(num_samples, self.dim, generator=generator, dtype=noise.dtype, device=noise.device)
        log_w = torch.cat([-self.energy(part) for part in noise.split(2**14)])
        log_z = log_w.logsumexp(0) - math.log(len(log_w))
        return log_z, ((((log_w - log_z).exp() - 1) ** 2).mean() / len(log_w)).sqrt()

    def eta(self, *parents: Tensor) -> Tensor:
        """Nothing, `(0,)`: the energy depends on z."""
        check_root(self, parents)
        return self.noise.new_zeros(0)

    def distribution(self, eta: Tensor) -> Distribution:
        """p(z), whatever eta."""
        return _Energy(self)


class _Energy(Density):
    """The density of an `EnergyPrior`."""

    values = constraints.real_vector

    def __init__(self, prior: EnergyPrior, batch_shape: torch.Size = torch.Size()):  # noqa: B008
        self.prior = prior
        super().__init__(batch_shape, torch.Size([prior.dim]))

    def expanded(self, batch_shape: torch.Size) -> "_Energy":
        return _Energy(self.prior, batch_shape)

    def log_density(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        log_p = dist.Normal(torch.zeros_like(value), 1.0).log_prob(value).sum(-1)
        return log_p - self.prior.energy(value) - self.prior.log_z()

    def draw(self, shape: torch.Size) -> Tensor:
        """The candidate with the largest -E + Gumbel noise: each with probability proportional to exp(-E)."""
        shape = self._extended_shape(shape)
        best = self.prior.noise.new_zeros(shape)
        best_score = best.new_full(shape[:-1], -math.inf)
        for _ in range(self.prior.num_candidates):
            z = torch.randn_like(best)
            score = -self.prior.energy(z) - torch.empty_like(best_score).exponential_().log()
            better = score > best_score
            best = torch.where(better.unsqueeze(-1), z, best)
            best_score = torch.where(better, score, best_score)
        return best
