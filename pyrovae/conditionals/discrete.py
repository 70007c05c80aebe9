"""Families over discrete values."""

import pyro.distributions as dist
from torch import Tensor

from pyrovae.conditionals.conditional import Conditional, Distribution


class Bernoulli(Conditional):
    """p(x | parents) = prod_i Bernoulli(x_i; sigmoid(eta_i)),  eta = logits, x in {0, 1}^dim.

    log p(x | parents) = sum_i x_i eta_i - softplus(eta_i). Grey values in [0, 1] are not in its support.

    Example:
        >>> import torch
        >>> Bernoulli.mlp(50, 784)(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    @staticmethod
    def eta_dim(dim: int) -> int:
        """A logit for each value."""
        return dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """logit(mean), with the mean kept within [0.001, 0.999]."""
        return mean.clamp(0.001, 0.999).logit()

    def distribution(self, eta: Tensor) -> Distribution:
        """Independent Bernoullis from logits `(*, dim)`."""
        return dist.Bernoulli(logits=eta).to_event(1)
