"""Gaussian families."""

import math
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.arguments import is_number
from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.conditionals.density import LogScaleNormal
from pyrovae.nets import _check_sizes


class StandardNormal(Conditional):
    """p(z) = N(z; 0, I), a root.

    Args:
        dim: size of z.

    Raises:
        ValueError: for a size that is not positive.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2)).item()
        -1.837877...
    """

    zero: Tensor

    def __init__(self, dim: int):
        super().__init__(net=None)
        _check_sizes(dim=dim)
        self.dim = dim
        # knows device and dtype, is no part of the weights
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    @classmethod
    def mlp(cls, parents_dim: int, dim: int, *args: Any, **kwargs: Any) -> Self:
        """Not there: this family has no network.

        Raises:
            TypeError: always.
        """
        raise TypeError("Expected StandardNormal(dim): it has no parents and no network")

    @staticmethod
    def eta_dim(dim: int) -> int:
        """None: there is nothing to learn."""
        return 0

    def eta_at(self, mean: Tensor) -> Tensor:
        """Not there: the mean is 0.

        Raises:
            TypeError: always.
        """
        raise TypeError("Expected a family with a mean to set; got StandardNormal, whose mean is 0")

    def eta(self, *parents: Tensor) -> Tensor:
        """Nothing, `(0,)`."""
        if parents:
            raise TypeError(f"Expected no parents for StandardNormal; got {len(parents)}")
        return self.zero.new_zeros(0)

    def distribution(self, eta: Tensor) -> Distribution:
        """N(0, I), whatever eta."""
        zeros = self.zero.expand(self.dim)
        return dist.Normal(zeros, 1 + zeros).to_event(1)


class DiagonalNormal(Conditional):
    """p(a | parents) = N(a; mu, diag(sigma^2)),  eta = (mu, log sigma)     (Kingma and Welling 2019, eq. 2.36, 2.37).

    Example:
        >>> q = DiagonalNormal.mlp(784, 50)
        >>> q(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    @staticmethod
    def eta_dim(dim: int) -> int:
        """mu and log sigma."""
        return 2 * dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """(mean, 0): unit variance."""
        return torch.cat([mean, torch.zeros_like(mean)])

    def distribution(self, eta: Tensor) -> Distribution:
        """N(mu, diag(sigma^2)) from eta `(*, 2 dim)`."""
        if eta.shape[-1] % 2:
            raise ValueError(f"Expected DiagonalNormal's network to give 2 D numbers for some D; got {eta.shape[-1]}")
        mu, log_sigma = eta.chunk(2, -1)
        return LogScaleNormal(mu, log_sigma).to_event(1)


class FloorNormal(Conditional):
    """p(x | parents) = N(x; mu, diag(sigma^2)),  sigma = floor + exp(log s),  eta = (mu, log s).

    A Gaussian likelihood with a learned scale that is never below the floor. Without one the likelihood is unbounded:
    at a pixel that is the same in all data, log p(x | z) grows without end as sigma falls to 0.

    Args:
        net: network from the parents to eta, `(B, 2 dim)`.
        floor: least sigma, in the units of x.

    Raises:
        ValueError: for a floor that is not positive and finite.

    Source:
        Mattei and Frellsen (2018), on likelihoods that are unbounded and constraints that bound them.

    Example:
        >>> FloorNormal.mlp(20, 560, floor=0.1)(torch.zeros(3, 20)).stddev.min().item()
        1.1000...
    """

    def __init__(self, net: nn.Module | None, floor: float = 0.01):
        super().__init__(net)
        if not is_number(floor) or not 0 < floor < math.inf:
            raise ValueError(f"Expected floor to be positive and finite; got {floor!r}")
        self.floor = floor

    @staticmethod
    def eta_dim(dim: int, floor: float = 0.01) -> int:
        """mu and log s."""
        return 2 * dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """(mean, 0): a scale of 1 + floor."""
        return torch.cat([mean, torch.zeros_like(mean)])

    @property
    def parts(self) -> dict[str, Any]:
        """The floor."""
        return {"floor": self.floor}

    def distribution(self, eta: Tensor) -> Distribution:
        """N(mu, diag((floor + s)^2)) from eta `(*, 2 dim)`."""
        if eta.shape[-1] % 2:
            raise ValueError(f"Expected FloorNormal's network to give 2 D numbers for some D; got {eta.shape[-1]}")
        mu, log_s = eta.chunk(2, -1)
        return LogScaleNormal(mu, (self.floor + log_s.exp()).log()).to_event(1)


class UnitNormal(Conditional):
    """p(a | parents) = N(a; mu, I),  eta = mu: a Gaussian decoder with sigma = I.

    Example:
        >>> UnitNormal.mlp(20, 560)(torch.zeros(3, 20)).variance.unique()
        tensor([1.])
    """

    @staticmethod
    def eta_dim(dim: int) -> int:
        """mu."""
        return dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """The mean."""
        return mean

    def distribution(self, eta: Tensor) -> Distribution:
        """N(mu, I) from eta `(*, dim)`."""
        return dist.Normal(eta, eta.new_ones(())).to_event(1)


class FullNormal(Conditional):
    """p(a | parents) = N(a; mu, L L^T),  eta = (mu, log sigma, L')     (Kingma and Welling 2019, Algorithm 2).

    L = L_mask * L' + diag(sigma), L_mask the strictly lower triangular ones. The paper's network gives the whole
    matrix L' and masks it; ours gives only the dim (dim - 1) / 2 entries that the mask lets through, row by row.

    Example:
        >>> FullNormal.mlp(784, 50)(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    @staticmethod
    def eta_dim(dim: int) -> int:
        """mu, log sigma and the strictly lower triangle of L'."""
        return 2 * dim + dim * (dim - 1) // 2

    def eta_at(self, mean: Tensor) -> Tensor:
        """(mean, 0, 0): the identity for a covariance."""
        return torch.cat([mean, mean.new_zeros(self.eta_dim(len(mean)) - len(mean))])

    def distribution(self, eta: Tensor) -> Distribution:
        """N(mu, L L^T) from eta `(*, 2 dim + dim (dim - 1) / 2)`."""
        dim = (math.isqrt(9 + 8 * eta.shape[-1]) - 3) // 2
        if self.eta_dim(dim) != eta.shape[-1]:
            raise ValueError(
                f"Expected FullNormal's network to give 2 D + D (D - 1) / 2 numbers for some D; got {eta.shape[-1]}"
            )
        mu, log_sigma, lower = eta.split([dim, dim, eta.shape[-1] - 2 * dim], -1)
        scale_tril = torch.diag_embed(log_sigma.exp())
        row, column = torch.tril_indices(dim, dim, -1, device=eta.device)
        scale_tril[..., row, column] = lower
        return dist.MultivariateNormal(mu, scale_tril=scale_tril)
