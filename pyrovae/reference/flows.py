"""Posteriors by flows, and the flows as priors.

z_0 = mu + sigma eps, z_t = f_t(z_{t-1}; h), z = z_T,
log q = log N(eps; 0, I) - sum_i log sigma_i - sum_t log |det df_t / dz_{t-1}|, with eta = (mu, log sigma, h).

A step is two functions of a value `(*, D)`, h and what gives the step's parameters: to z_t and log |det|, and back.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae.reference import densities, gaussians
from pyrovae.reference.densities import Net, split
from pyrovae.reference.gaussians import diagonal_normal, diagonal_normal_noise


def _flow(step: Callable[..., tuple[Tensor, Tensor]], back: Callable[..., Tensor]) -> tuple[Any, Any]:
    """(eps, eta) to z and log q, and (z, eta) to eps, with eta = (mu, log sigma, h)."""

    def transform(eps: Tensor, eta: Tensor, *, steps: list[Any], **more: Any) -> tuple[Tensor, Tensor]:
        gaussian, h = split(eta, 2 * eps.shape[-1])
        z, log_q = diagonal_normal(eps, gaussian)
        for net in steps:
            z, log_det = step(z, h, net, **more)
            log_q = log_q - log_det
        return z, log_q

    def noise(z: Tensor, eta: Tensor, *, steps: list[Any], **more: Any) -> Tensor:
        gaussian, h = split(eta, 2 * z.shape[-1])
        for net in reversed(steps):
            z = back(z, h, net, **more)
        return diagonal_normal_noise(z, gaussian)

    return transform, noise


def _iaf(z: Tensor, h: Tensor, net: Any) -> tuple[Tensor, Tensor]:
    m, s = net(z, h).unbind(-2)
    # Algorithm 3; 1 - g and log g without loss of digits
    return torch.sigmoid(s) * z + torch.sigmoid(-s) * m, -torch.logaddexp(-s, torch.zeros_like(s)).sum(-1)


def _iaf_back(y: Tensor, h: Tensor, net: Any) -> Tensor:
    z = torch.zeros_like(y)
    for _ in range(y.shape[-1]):  # the k-th pass gets the k-th value in the order right
        m, s = net(z, h).unbind(-2)
        z = (y - torch.sigmoid(-s) * m) / torch.sigmoid(s)
    return z


def _maf(u: Tensor, h: Tensor, net: Any) -> tuple[Tensor, Tensor]:
    z, alpha = torch.zeros_like(u), u
    for _ in range(u.shape[-1]):
        mu, alpha = net(z, h).unbind(-2)
        z = u * torch.exp(alpha) + mu  # Papamakarios et al. (2017), eq. 2 to 4
    return z, alpha.sum(-1)


def _maf_back(z: Tensor, h: Tensor, net: Any) -> Tensor:
    mu, alpha = net(z, h).unbind(-2)
    return (z - mu) * torch.exp(-alpha)


def _coupled(z: Tensor, h: Tensor, part: Any, bend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    net, reverse = part
    z = z.flip(-1) if reverse else z
    a, b = split(z, z.shape[-1] // 2)
    b, log_slopes = bend(b, net(a, h))
    z = torch.cat([a, b], -1)
    return (z.flip(-1) if reverse else z), log_slopes.sum(-1)


def _nvp(b: Tensor, ts: Tensor) -> tuple[Tensor, Tensor]:
    t, s = ts.unbind(-2)
    return b * torch.exp(s) + t, s  # Dinh et al. (2017), eq. 7


def _nvp_back(b: Tensor, ts: Tensor) -> tuple[Tensor, Tensor]:
    t, s = ts.unbind(-2)
    return (b - t) * torch.exp(-s), -s


def _slope(f: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x), each value on its own."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = f(x)
        return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _root(f: Net, y: Tensor, radius: Tensor | float) -> Tensor:
    """x with f(x) = y, f increasing and |x - y| < radius: by bisection, with the gradient of a step of Newton's."""
    with torch.no_grad():
        low, high = y - radius, y + radius
        for _ in range(70):
            x = (low + high) / 2
            low, high = torch.where(f(x) < y, x, low), torch.where(f(x) < y, high, x)
    off, slope = f(x) - y, _slope(f, x)[1].detach()
    return x - (off - off.detach()) / slope.clamp(min=torch.finfo(x.dtype).tiny)


def _planar(z: Tensor, h: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    b, u, w, slope = _planar_parameters(step(h))
    a = torch.tanh((w * z).sum(-1, keepdim=True) + b)
    # Rezende and Mohamed (2015), eq. 10 to 12: det = 1 + (1 - a^2) w u', with w u' = log(1 + exp(w u)) - 1
    return z + u * a, torch.log(a**2 + (1 - a**2) * slope).squeeze(-1)


def _planar_back(y: Tensor, h: Tensor, step: Any) -> Tensor:
    b, u, w, slope = _planar_parameters(step(h))
    uw, wy = slope - 1, (w * y).sum(-1, keepdim=True)
    return y - u * torch.tanh(_root(lambda a: a + uw * torch.tanh(a + b), wy, uw.abs() + 1) + b)


def _planar_parameters(values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, u' and w  (appendix A.1), and log(1 + exp(w u)); log(1 + exp(w u)) - w u is log(1 + exp(-w u))."""
    b, u, w = values
    wu = (w * u).sum(-1, keepdim=True)
    slope, rest = (torch.logaddexp(value, torch.zeros_like(wu)) for value in (wu, -wu))
    size = _size(w)
    return b, u + (rest - 1) * (w / size) / ((w / size) ** 2).sum(-1, keepdim=True) / size, w, slope


def _size(v: Tensor) -> Tensor:
    """The largest entry, without which the square of a tiny vector would be 0."""
    return torch.abs(v).amax(-1, keepdim=True).detach()


def _reflected(z: Tensor, h: Tensor, step: Any) -> Tensor:
    v = step(h)
    v = v / _size(v)
    return z - 2 * v * (v * z).sum(-1, keepdim=True) / (v**2).sum(-1, keepdim=True)  # Tomczak and Welling (2016), eq. 8


def _householder(z: Tensor, h: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    z = _reflected(z, h, step)
    return z, torch.zeros_like(z[..., 0])


def _spline(b: Tensor, theta: Tensor, bound: float, least: float) -> tuple[Tensor, Tensor]:
    """y and log dy/dx of rational-quadratic splines, theta = (widths, heights, inner slopes) `(*, 3 K - 1, D)`."""
    num_bins = (theta.shape[-2] + 1) // 3
    widths, heights, inner = theta.split([num_bins, num_bins, num_bins - 1], -2)
    w, r = (2 * bound * (least + (1 - num_bins * least) * torch.softmax(a, -2)) for a in (widths, heights))
    right, low = torch.cumsum(w, -2) - bound, torch.cumsum(r, -2) - r - bound
    right = torch.cat([right[..., :-1, :], torch.full_like(right[..., :1, :], bound)], -2)
    left = torch.cat([torch.full_like(right[..., :1, :], -bound), right[..., :-1, :]], -2)
    inner = inner + math.log(math.exp(1 - least) - 1)
    inner = least + torch.logaddexp(inner, torch.zeros_like(inner))
    ones = torch.ones_like(inner[..., :1, :])
    d0, d1 = torch.cat([ones, inner], -2), torch.cat([inner, ones], -2)
    x = b.unsqueeze(-2)  # in every bin at once, of which one is chosen
    chosen = (x >= left) & (x < right)
    xi = torch.where(chosen, (x - left) / w, torch.zeros_like(w))
    s, product = r / w, xi * (1 - xi)
    y = low + r * (s * xi**2 + d0 * product) / (s + (d1 + d0 - 2 * s) * product)  # Durkan et al. (2019), eq. 4
    slope = s**2 * (d1 * xi**2 + 2 * s * product + d0 * (1 - xi) ** 2) / (s + (d1 + d0 - 2 * s) * product) ** 2  # eq. 5
    outside = ~chosen.any(-2)
    return torch.where(outside, b, (y * chosen).sum(-2)), torch.where(
        outside, torch.zeros_like(b), (torch.log(slope) * chosen).sum(-2)
    )


def _spline_back(b: Tensor, theta: Tensor, bound: float, least: float) -> tuple[Tensor, Tensor]:
    x = _root(lambda x: _spline(x, theta, bound, least)[0], b, 2 * bound)
    return x, x


def _coupling(bend: Callable[..., tuple[Tensor, Tensor]], back: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    def step(z: Tensor, h: Tensor, part: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return _coupled(z, h, part, lambda b, theta: bend(b, theta, **more))

    def undo(y: Tensor, h: Tensor, part: Any, **more: Any) -> Tensor:
        return _coupled(y, h, part, lambda b, theta: back(b, theta, **more))[0]

    return _flow(step, undo)


FLOWS = {
    "InverseAutoregressiveFlow": _flow(_iaf, _iaf_back),
    "MaskedAutoregressiveFlow": _flow(_maf, _maf_back),
    "RealNVP": _coupling(_nvp, _nvp_back),
    "NeuralSplineFlow": _coupling(_spline, _spline_back),
    "PlanarFlow": _flow(_planar, _planar_back),
    "HouseholderFlow": _flow(_householder, _reflected),
}


def _density(transform: Any, noise: Any) -> Callable[..., Tensor]:
    return lambda z, eta, **parts: transform(noise(z, eta, **parts), eta.expand(*z.shape[:-1], -1), **parts)[1]


# by the names of the families, flows and all others
POSTERIORS: dict[str, Any] = gaussians.POSTERIORS | FLOWS
PRIORS: dict[str, Any] = densities.PRIORS | {name: _density(*functions) for name, functions in FLOWS.items()}
