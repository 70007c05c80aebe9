"""Families over discrete values."""

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.nets import Constant


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


class OneHotCategorical(Conditional):
    """p(y | parents) = prod_c pi_c^{y_c},  pi = softmax(eta), y a one-hot vector of size dim.

    Example:
        >>> q = OneHotCategorical.mlp(784, 10)
        >>> q(torch.zeros(3, 784)).event_shape
        torch.Size([10])
    """

    @classmethod
    def uniform(cls, dim: int) -> Self:
        """A root that gives each of `dim` classes the probability 1 / dim."""
        return cls(Constant(dim))

    @staticmethod
    def eta_dim(dim: int) -> int:
        """A logit for each class."""
        return dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """log(mean), with the probabilities kept above 0.001."""
        return mean.clamp(min=0.001).log()

    def distribution(self, eta: Tensor) -> Distribution:
        """A class from logits `(*, dim)`, as a one-hot vector."""
        return dist.OneHotCategorical(logits=eta)


def one_hot(y: Tensor, num_classes: int) -> Tensor:
    """Integer labels `(*)` as vectors `(*, num_classes)` of zeros and a one; all zeros for what is no class.

    Raises:
        ValueError: for labels that are not integers, as those that are one-hot already.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        hint = ". Of one-hot vectors: y.argmax(-1)" if y.dim() > 1 else ""
        raise ValueError(f"Expected labels that are integers (N,); got {y.dtype} of shape {tuple(y.shape)}{hint}")
    return (y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)).to(torch.get_default_dtype())
