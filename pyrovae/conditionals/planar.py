"""Normalizing flows whose steps are in closed form, of parameters that may depend on the parents."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions.transforms import Transform
from pyro.distributions.transforms.householder import ConditionedHouseholder
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor, nn

from pyrovae.conditionals.flows import Flow
from pyrovae.nets import _check_sizes


class PlanarFlow(Flow):
    """Planar flow: T times a push along u, by a tanh across the hyperplane w z + b = 0.

        z <- z + u' tanh(w z + b),  u' = u + (softplus(w u) - 1 - w u) w / |w|^2

    (u, w, b) of each step are parameters, to which, where `amortized`, the network adds its own for each x: h has
    T (2 dim + 1) values. The inverse has no closed form: where a value's noise is needed, which is so for every value
    that is not the flow's own draw, w z is found by bisection.

    Args:
        net: to eta.
        dim: size of z.
        steps: T.
        amortized: whether the steps depend on the parents.

    Raises:
        ValueError: for a size that is not positive.

    Source:
        Rezende and Mohamed (2015), eq. 10 to 13 and appendix A.1.

    Example:
        >>> PlanarFlow.mlp(784, 50, hidden=(100,))(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    of_parents = {"amortized": True}  # noqa: RUF012

    def __init__(self, net: nn.Module | None, dim: int, steps: int = 10, amortized: bool = False):
        _check_sizes(dim=dim, steps=steps)
        super().__init__(net, dim, steps, steps * (2 * dim + 1) if amortized else 0)
        self.amortized = amortized
        self.own = nn.Parameter(torch.empty(steps, 2 * dim + 1).uniform_(-1, 1) / dim**0.5)

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """A push for each step."""
        return [Planar(self.step(t, h)) for t in range(self.steps)]

    def step(self, t: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b `(*, 1)`, u and w `(*, dim)` of step t."""
        values = self.own[t]
        if self.amortized:
            values = values + h.unflatten(-1, self.own.shape)[..., t, :]
        u, w, b = values.split([self.dim, self.dim, 1], -1)
        return b, u, w

    @property
    def parts(self) -> dict[str, Any]:
        """What (b, u, w) are, given h."""
        return {"steps": [partial(self.step, t) for t in range(self.steps)]}


class HouseholderFlow(Flow):
    """Householder flow: T reflections, which turn the Gaussian's axes and leave its volume as it is.

        z <- z - 2 v (v z) / |v|^2

    v of each step is a parameter, to which, where `amortized`, the network adds its own for each x: h has T dim
    values.

    Args:
        net: to eta.
        dim: size of z.
        steps: T.
        amortized: whether the steps depend on the parents.

    Raises:
        ValueError: for a size that is not positive.

    Source:
        Tomczak and Welling (2016), eq. 7 to 9. There v_t is a linear function of v_{t-1}; here of the encoder.

    Example:
        >>> HouseholderFlow.mlp(784, 50, hidden=(100,))(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    of_parents = {"amortized": True}  # noqa: RUF012

    def __init__(self, net: nn.Module | None, dim: int, steps: int = 4, amortized: bool = False):
        _check_sizes(dim=dim, steps=steps)
        super().__init__(net, dim, steps, steps * dim if amortized else 0)
        self.amortized = amortized
        self.own = nn.Parameter(torch.randn(steps, dim))

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """All reflections as one."""
        return [ConditionedHouseholder(self.vectors(h))]

    def vectors(self, h: Tensor) -> Tensor:
        """v of each step, `(*, T, dim)`."""
        return self.own + h.unflatten(-1, self.own.shape) if self.amortized else self.own

    @property
    def parts(self) -> dict[str, Any]:
        """What v is, given h."""
        return {"steps": [partial(lambda h, t: self.vectors(h)[..., t, :], t=t) for t in range(self.steps)]}


class Planar(ConditionedPlanar):
    """Pyro's, with an inverse: a = w x solves a + (w u') tanh(a + b) = w y, whose left side increases in a."""

    def _inverse(self, y: Tensor) -> Tensor:
        b, u, w = self._params
        u = self.u_hat(u, w)
        wu, wy = (w * u).sum(-1, keepdim=True), (w * y).sum(-1, keepdim=True)
        with torch.no_grad():
            low, high = wy - wu.abs(), wy + wu.abs()
            for _ in range(60):
                a = (low + high) / 2
                above = a + wu * (a + b).tanh() > wy
                low, high = torch.where(above, low, a), torch.where(above, a, high)
            slope = 1 + wu * (1 - (a + b).tanh() ** 2)
        a = a - (a + wu * (a + b).tanh() - wy) / slope  # a step of Newton's, which has the root's gradient
        x = y - u * (a + b).tanh()
        self._call(x)  # keeps the log-determinant
        return x
