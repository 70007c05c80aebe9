"""Families over discrete values."""

from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.arguments import check_whole
from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.nets import Constant, _check_sizes


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


class Categorical(Conditional):
    """p(x | parents) = prod_i pi_{i, x_i},  pi_i = softmax(eta_i),  each x_i one of 0, ..., C - 1.

    Values are numbers, as all that passes between sites, and so are draws; the mean is that of the numbers. eta is
    `(C, dim)`, flattened: the logits of the first class for all values, then those of the second.

    Args:
        net: network from the parents to eta, `(B, C * dim)`.
        num_classes: C.

    Raises:
        ValueError: for C < 1.

    Example:
        >>> Categorical.mlp(50, 784, num_classes=4)(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    def __init__(self, net: nn.Module | None, num_classes: int = 256):
        super().__init__(net)
        _check_sizes(num_classes=num_classes)
        self.num_classes = num_classes

    @staticmethod
    def eta_dim(dim: int, num_classes: int = 256) -> int:
        """A logit for each class of each value."""
        _check_sizes(num_classes=num_classes)
        return num_classes * dim

    @staticmethod
    def num_locations(dim: int, num_classes: int = 256) -> int:
        """All are logits."""
        return num_classes * dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """Logits that are linear in the class with this mean, by bisection; kept 0.001 (C - 1) within 0 and C - 1."""
        classes = torch.arange(self.num_classes, dtype=mean.dtype, device=mean.device).unsqueeze(-1)
        top = self.num_classes - 1
        mean, low, high = mean.clamp(0.001 * top, 0.999 * top), torch.full_like(mean, -10), torch.full_like(mean, 10)
        for _ in range(60):
            middle = (low + high) / 2
            below = ((middle * classes).softmax(0) * classes).sum(0) < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2 * classes).flatten()

    @property
    def parts(self) -> dict[str, Any]:
        """C."""
        return {"num_classes": self.num_classes}

    def distribution(self, eta: Tensor) -> Distribution:
        """Independent classes from logits `(*, C * dim)`."""
        if eta.shape[-1] % self.num_classes:
            raise ValueError(
                f"Expected Categorical's network to give C D numbers for C = {self.num_classes} and some D; "
                f"got {eta.shape[-1]}"
            )
        return _Classes(logits=eta.unflatten(-1, (self.num_classes, -1)).movedim(-2, -1)).to_event(1)


class _Classes(dist.Categorical):
    """Classes as numbers: their draws have the logits' dtype, and they have a mean."""

    @property
    def mean(self) -> Tensor:
        """sum_c c pi_c."""
        return (self.probs * torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)).sum(
            -1
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi_x; of what is no class minus infinity, where validation does not refuse it."""
        if self._validate_args:
            self._validate_sample(value)
        classes = value.long().clamp(0, self.logits.shape[-1] - 1)
        logits = self.logits.expand(*torch.broadcast_shapes(value.shape, self.batch_shape), -1)
        log_p = logits.gather(-1, classes.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return torch.where(classes == value, log_p, -torch.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Classes as numbers."""
        return super().sample(sample_shape).to(self.logits.dtype)


def one_hot(y: Tensor, num_classes: int) -> Tensor:
    """Integer labels `(*)` as vectors `(*, num_classes)` of zeros and a one; all zeros for what is no class.

    Raises:
        ValueError: for labels that are not integers, as those that are one-hot already, or num_classes below 1.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"Expected labels that are a tensor of integers (N,); got {type(y).__name__}")
    check_whole(num_classes=num_classes)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        hint = ". Of one-hot vectors: y.argmax(-1)" if y.dim() > 1 else ""
        raise ValueError(f"Expected labels that are integers (N,); got {y.dtype} of shape {tuple(y.shape)}{hint}")
    return (y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)).to(torch.get_default_dtype())
