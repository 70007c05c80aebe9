"""What flows do at each step, as transforms that remember their last pair of values."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional as F

from pyrovae.nets import MLP, MaskedMLP

SPLINE_BOUND, SPLINE_LEAST = 3.0, 1e-3  # the box that a spline bends; the least width, height and slope in it


class Curve(NamedTuple):
    """y_i = f(x_i; params_i), increasing in x_i: x to (y, log dy/dx), and y to (x, log dy/dx); params `(*, P, D)`."""

    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    inverse: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Step(Transform):
    """A curve for each value, whose parameters a network gives from values that come earlier in the order."""

    domain = codomain = constraints.real_vector  # pyright: ignore[reportAssignmentType]
    bijective = True
    log_slopes: Tensor

    def __init__(self, net: nn.Module, h: Tensor, curve: Curve):
        super().__init__(cache_size=1)
        self.net, self.h, self.curve = net, h, curve

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the pair that was computed last, as it is; of another, anew."""
        if self._cached_x_y[0] is not x or self._cached_x_y[1] is not y:
            self._call(x)
        return self.log_slopes.sum(-1)


class Autoregressive(_Step):
    """y_i = f(x_i; params_i(x_1 ... x_{i-1}, h)): the inverse takes a pass of the network for each i."""

    net: MaskedMLP

    def _call(self, x: Tensor) -> Tensor:
        y, self.log_slopes = self.curve.forward(x, self.net(x, self.h))
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.expand(*torch.broadcast_shapes(y.shape[:-1], self.h.shape[:-1]), -1)
        x, log_slopes = ([torch.zeros_like(y[..., 0])] * y.shape[-1] for _ in range(2))
        for i in self.net.order:
            params = self.net(torch.stack(x, -1), self.h)[..., i : i + 1]
            x[i], log_slopes[i] = (value.squeeze(-1) for value in self.curve.inverse(y[..., i : i + 1], params))
        self.log_slopes = torch.stack(log_slopes, -1)
        return torch.stack(x, -1)


class Coupling(_Step):
    """y_a = x_a, y_b = f(x_b; params(x_a, h)), a the first half of the values and b the second, or the reverse."""

    def __init__(self, net: nn.Module, h: Tensor, curve: Curve, reverse: bool):
        super().__init__(net, h, curve)
        self.reverse = reverse

    def _call(self, x: Tensor) -> Tensor:
        return self._through(x, self.curve.forward)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._through(y, self.curve.inverse)

    def _through(self, value: Tensor, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value = value.expand(*torch.broadcast_shapes(value.shape[:-1], self.h.shape[:-1]), -1)
        a, b = _halves(value.flip(-1) if self.reverse else value)
        b, self.log_slopes = function(b, of_halves(self.net, a, self.h, b.shape[-1]))
        value = torch.cat([a, b], -1)
        return value.flip(-1) if self.reverse else value


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.tensor_split([value.shape[-1] // 2], -1)  # pyright: ignore[reportReturnType]


def of_halves(net: nn.Module, a: Tensor, h: Tensor, size: int) -> Tensor:
    """Parameters `(*, P, size)` of the second half."""
    assert isinstance(net, MLP)
    return net.joined(a, h).unflatten(-1, (-1, size))


def _gate(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    m, s = params.unbind(-2)
    return s.sigmoid() * x + (-s).sigmoid() * m, F.logsigmoid(s)


def _ungate(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    m, s = params.unbind(-2)
    return y + (y - m) * (-s).exp(), F.logsigmoid(s)  # 1 / g = 1 + exp(-s)


def _affine(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, log_scale = params.unbind(-2)
    return x * log_scale.exp() + shift, log_scale


def _unaffine(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, log_scale = params.unbind(-2)
    return (y - shift) * (-log_scale).exp(), log_scale


def _standardize(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    u, log_scale = _unaffine(x, params)
    return u, -log_scale


def _unstandardize(u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    x, log_scale = _affine(u, params)
    return x, -log_scale


def _bin(value: Tensor, by: int, params: Tensor) -> tuple[Tensor, ...]:
    """Of the bin of each value, within the box: its corners' x, y and slopes, (x0, x1, y0, y1, d0, d1)."""
    num_bins = (params.shape[-2] + 1) // 3
    widths, heights, slopes = params.movedim(-2, -1).split([num_bins, num_bins, num_bins - 1], -1)
    knots = [_knots(widths), _knots(heights)]
    shift = math.log(math.expm1(1 - SPLINE_LEAST))  # where the network gives 0, the slope is 1
    knots.append(F.pad(SPLINE_LEAST + F.softplus(slopes + shift), (1, 1), value=1.0))
    index = (value.unsqueeze(-1) >= knots[by][..., 1:-1]).sum(-1, keepdim=True)
    return tuple(k.gather(-1, index + i).squeeze(-1) for k in knots for i in (0, 1))


def _knots(sizes: Tensor) -> Tensor:
    shares = SPLINE_LEAST + (1 - SPLINE_LEAST * sizes.shape[-1]) * sizes.softmax(-1)
    inner = 2 * SPLINE_BOUND * shares[..., :-1].cumsum(-1) - SPLINE_BOUND
    return F.pad(F.pad(inner, (1, 0), value=-SPLINE_BOUND), (0, 1), value=SPLINE_BOUND)


def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Durkan et al. (2019), eq. 4 and 5."""
    inside = x.clamp(-SPLINE_BOUND, SPLINE_BOUND)
    x0, x1, y0, y1, d0, d1 = _bin(inside, 0, params)
    slope, t = (y1 - y0) / (x1 - x0), (inside - x0) / (x1 - x0)
    below = slope + (d1 + d0 - 2 * slope) * t * (1 - t)
    y = y0 + (y1 - y0) * (slope * t**2 + d0 * t * (1 - t)) / below
    above = slope**2 * (d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t) ** 2)
    bent = x.abs() < SPLINE_BOUND
    return torch.where(bent, y, x), torch.where(bent, above.log() - 2 * below.log(), 0.0)


def _unspline(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Durkan et al. (2019), eq. 6 to 8 and 29."""
    inside = y.clamp(-SPLINE_BOUND, SPLINE_BOUND)
    x0, x1, y0, y1, d0, d1 = _bin(inside, 1, params)
    slope, rise = (y1 - y0) / (x1 - x0), inside - y0
    a = (y1 - y0) * (slope - d0) + rise * (d1 + d0 - 2 * slope)
    b = (y1 - y0) * d0 - rise * (d1 + d0 - 2 * slope)
    c = -slope * rise
    root = (b**2 - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()  # rounding may take it below 0
    # of the two forms of the root the one whose terms have the same sign; where b < 0, a is above 0
    t = torch.where(b < 0, (root - b) / torch.where(b < 0, 2 * a, torch.ones_like(a)), -2 * c / (b.abs() + root))
    x = torch.where(y.abs() < SPLINE_BOUND, x0 + t * (x1 - x0), y)
    return x, spline(x, params)[1]


GATE, AFFINE, STANDARDIZE = Curve(_gate, _ungate), Curve(_affine, _unaffine), Curve(_standardize, _unstandardize)
SPLINE = Curve(spline, _unspline)
