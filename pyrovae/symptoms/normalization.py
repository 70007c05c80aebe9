"""What the probabilities of all values of a distribution add to, where that can be told."""

from itertools import product
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Independent, constraints

MANY = 4096  # values of a support, at most, over which probabilities are summed
GRID = 801
WIDTH = 10  # standard deviations to either side


def total_probability(fn: Any) -> float | None:
    """The sum, or the integral, of exp(log_prob) over all values: the one furthest from 1 of all in the batch.

    Independent values are looked at one by one. None where there are too many values, or no rule for them: only
    enumerable and binary values, and single numbers from the real line or the unit interval, are summed over. Nor is
    anything said of what is masked.

    Args:
        fn: a distribution.
    """
    while type(fn) in (Independent, dist.Independent):
        fn = fn.base_dist
    if isinstance(fn, dist.MaskedDistribution):  # what is masked adds nothing to log p, and its exponential is 1
        return None
    try:
        if fn.has_enumerate_support:
            values = fn.enumerate_support(expand=False)
            total = fn.log_prob(values).exp().sum(0) if len(values) <= MANY else None
        elif fn.event_shape == () and not fn.support.is_discrete:
            total = _integral(fn)
        else:
            total = _over_bits(fn)
    except NotImplementedError:
        return None
    return None if total is None else total.flatten()[(total - 1).abs().argmax()].item()


def _integral(fn: Any) -> Tensor | None:
    """By the trapezoidal rule, over WIDTH standard deviations; in the unit interval by the midpoint rule."""
    u = torch.linspace(-1, 1, GRID, dtype=fn.mean.dtype, device=fn.mean.device)
    u = u.reshape(-1, *[1] * len(fn.batch_shape))
    if fn.support is constraints.real:
        width = WIDTH * fn.stddev
        p = fn.log_prob(fn.mean + width * u).exp() * width * 2 / (GRID - 1)
        return p.sum(0) if bool(width.isfinite().all()) else None
    if fn.support is constraints.unit_interval:
        p = fn.log_prob((u * (1 - 1 / GRID) + 1) / 2).exp() / GRID
        return p.sum(0) if bool((p[[0, -1]] < 0.01).all()) else None  # too steep at an end for this rule
    return None


def _over_bits(fn: Any) -> Tensor | None:
    """Over all vectors of zeros and ones."""
    dim = fn.event_shape.numel()
    if getattr(fn.support, "base_constraint", fn.support) is not constraints.boolean or 2**dim > MANY:
        return None
    bits = torch.tensor(list(product((0.0, 1.0), repeat=dim))).to(fn.sample())
    return fn.log_prob(bits.reshape(-1, *[1] * len(fn.batch_shape), *fn.event_shape)).exp().sum(0)
