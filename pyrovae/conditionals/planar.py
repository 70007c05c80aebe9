"""Normalizing flows whose steps are in closed form, of parameters that may depend on the parents."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import Transform
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor, nn
from torch.nn import functional as F

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
        v = self.vectors(h)
        return [ConditionedHouseholder(v / _size(v))]

    def vectors(self, h: Tensor) -> Tensor:
        """v of each step, `(*, T, dim)`."""
        return self.own + h.unflatten(-1, self.own.shape) if self.amortized else self.own

    @property
    def parts(self) -> dict[str, Any]:
        """What v is, given h."""
        return {"steps": [partial(lambda h, t: self.vectors(h)[..., t, :], t=t) for t in range(self.steps)]}


class Planar(Transform):
    """x <- x + u' a,  a = tanh(w x + b), with an inverse: a' = w x solves a' + (w u') tanh(a' + b) = w y.

    Its left side increases in a', for w u' = softplus(w u) - 1 > -1. The log-determinant, log(1 + (1 - a^2) w u'), is
    written log(a^2 + (1 - a^2) softplus(w u)), in which nothing cancels.

    Args:
        params: b `(*, 1)`, u and w `(*, dim)`.
    """

    domain = codomain = constraints.real_vector  # pyright: ignore[reportAssignmentType]
    bijective = True
    log_det: Tensor

    def __init__(self, params: tuple[Tensor, Tensor, Tensor]):
        super().__init__(cache_size=1)
        self.b, u, self.w = params
        wu = (self.w * u).sum(-1, keepdim=True)
        self.least = F.softplus(wu)  # slope where a = 0
        size = _size(self.w)
        v = self.w / size
        self.u = u + (F.softplus(-wu) - 1) * v / (v**2).sum(-1, keepdim=True) / size

    def _call(self, x: Tensor) -> Tensor:
        a = ((self.w * x).sum(-1, keepdim=True) + self.b).tanh()
        self.log_det = self._slope(a).log().squeeze(-1)
        return x + self.u * a

    def _slope(self, a: Tensor) -> Tensor:
        return a**2 + (1 - a**2) * self.least

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the pair that was computed last, as it is; of another, anew."""
        if self._cached_x_y[0] is not x or self._cached_x_y[1] is not y:
            self._call(x)
        return self.log_det

    def _inverse(self, y: Tensor) -> Tensor:
        wu, wy = self.least - 1, (self.w * y).sum(-1, keepdim=True)
        with torch.no_grad():
            low, high = wy - wu.abs(), wy + wu.abs()
            for _ in range(60):
                a = (low + high) / 2
                above = a + wu * (a + self.b).tanh() > wy
                low, high = torch.where(above, low, a), torch.where(above, a, high)
            slope = self._slope((a + self.b).tanh()).clamp(min=torch.finfo(a.dtype).tiny)
        off = a + wu * (a + self.b).tanh() - wy
        a = a - (off - off.detach()) / slope  # the root, with its gradient
        x = y - self.u * (a + self.b).tanh()
        self._call(x)  # keeps the log-determinant
        return x


def _size(vectors: Tensor) -> Tensor:
    """The largest entry, by which a vector is divided lest its square underflow; `(*, 1)`, of no gradient."""
    return vectors.detach().abs().amax(-1, keepdim=True)
