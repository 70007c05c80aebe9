"""What the distributions that are our own have in common."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

LOG_2_PI = math.log(2 * math.pi)


class LogScaleNormal(dist.Normal):
    """N(mu, sigma^2), given log sigma: -(eps^2 + log 2 pi) / 2 - log sigma,  eps = (a - mu) exp(-log sigma).

    Its gradients are those of eps. Torch's Normal goes by sigma^2, and by way of sigma^4 in its gradient, which leaves
    float32 where (a - mu)^2 / sigma^4 is above 1e38; in a mixture such a component, of weight 0, makes all of it NaN.

    Args:
        loc: mu, `(*)`.
        log_scale: log sigma, `(*)`.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor):
        super().__init__(loc, log_scale.exp())
        self.log_scale = log_scale.expand(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogScaleNormal":
        """The same with another batch shape."""
        new: Any = self._get_checked_instance(LogScaleNormal, _instance)
        new.log_scale = self.log_scale.expand(batch_shape)
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; mu, sigma^2)."""
        if self._validate_args:
            self._validate_sample(value)
        eps = (value - self.loc) * (-self.log_scale).exp()
        return -(eps**2 + LOG_2_PI) / 2 - self.log_scale


class Mixture(dist.MixtureSameFamily):
    """Pyro's mixture, whose components share the gradient of a value's density in parts that sum to 1."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log sum_k pi_k p_k(value)."""
        if self._validate_args:
            self._validate_sample(value)
        log_pi = self.mixture_distribution.logits.log_softmax(-1)
        return logsumexp(log_pi + self.component_distribution.log_prob(self._pad(value)), -1)


def logsumexp(values: Tensor, dim: int) -> Tensor:
    """log sum exp, with the gradient exp(v_k - max) / sum_j exp(v_j - max).

    Torch's has exp(v_k - log sum exp v), whose sum is wrong by as much as the result is rounded: in float32 and a
    billion nats from zero, where log 2 is nothing, two equal values have the gradient 1 each.
    """
    largest = values.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(values.dtype).min)
    return (values - largest).exp().sum(dim).log() + largest.squeeze(dim)


class Density(TorchDistribution):
    """A Pyro distribution of which a subclass gives `values`, `expanded`, `log_density` and `draw`.

    Args:
        batch_shape: its batch shape.
        event_shape: its event shape.

    Attributes:
        values: the support.
    """

    values: ClassVar[constraints.Constraint]

    def __init__(self, batch_shape: torch.Size, event_shape: torch.Size):
        super().__init__(batch_shape, event_shape)

    @property
    def arg_constraints(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """None: what a network gives is right by construction."""
        return {}

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values that have a probability."""
        return self.values

    @abstractmethod
    def expanded(self, batch_shape: torch.Size) -> Self:
        """The same with this batch shape."""

    @abstractmethod
    def log_density(self, value: Tensor) -> Tensor:
        """log p(value), `(*)`, for a value that broadcasts with the batch shape."""

    @abstractmethod
    def draw(self, shape: torch.Size) -> Tensor:
        """Draws of this shape before the batch shape."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same with another batch shape."""
        return self.expanded(torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), checked where Pyro's validation is on."""
        if self._validate_args:
            self._validate_sample(value)
        return self.log_density(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without gradients."""
        with torch.no_grad():
            return self.draw(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients, where `has_rsample`."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__} has no draws with gradients")
        return self.draw(torch.Size(sample_shape))
