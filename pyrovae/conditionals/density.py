"""What the distributions that are our own have in common."""

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


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
