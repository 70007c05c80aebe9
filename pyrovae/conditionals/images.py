"""Families over grey values in [0, 1]."""

from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.conditionals.density import Density
from pyrovae.nets import Activation, _check_sizes


class ContinuousBernoulli(Conditional):
    """p(x | parents) = prod_i C(l_i) exp(l_i x_i),  C(l) = l / (e^l - 1),  eta = l, x in [0, 1]^dim.

    It is lambda^x (1 - lambda)^(1 - x), lambda = sigmoid(l), with the constant that a Bernoulli of grey values lacks.
    The mean is not lambda but 1 / (1 - e^-l) - 1 / l.

    Source:
        Loaiza-Ganem and Cunningham (2019), written in l.

    Example:
        >>> ContinuousBernoulli.mlp(50, 784)(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    @staticmethod
    def eta_dim(dim: int) -> int:
        """A logit for each value."""
        return dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """The l with this mean, by bisection, with the mean kept within [0.01, 0.99]."""
        mean = mean.clamp(0.01, 0.99)
        low, high = torch.full_like(mean, -200), torch.full_like(mean, 200)
        for _ in range(60):
            middle = (low + high) / 2
            below = _ContinuousBernoulli(middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def distribution(self, eta: Tensor) -> Distribution:
        """Independent continuous Bernoullis from logits `(*, dim)`."""
        return _ContinuousBernoulli(eta).to_event(1)


class DiscretizedLogisticMixture(Conditional):
    """p(x | parents) = prod_i sum_k pi_ik [F_ik(c_i + 1/255) - F_ik(c_i - 1/255)],  F(c) = sigmoid((c - mu) / s).

    For images of 8 bits, given as x = k / 255; c = 2 x - 1 lies in [-1, 1]. At x = 0 the second term is 0, at x = 1
    the first is 1, so that the 256 probabilities sum to one. eta = (mu, log s, log pi) `(3 K dim)`, the last up to a
    constant. Each value has a mixture of its own: the channels of a pixel are independent given the parents, where
    the paper has those of one pixel depend on each other. log s is kept above -7, as in the paper's code.

    Args:
        net: network from the parents to eta, `(B, 3 K dim)`.
        num_components: K.

    Raises:
        ValueError: for K < 1.

    Source:
        Salimans et al. (2017), eq. 1 and 2.

    Example:
        >>> DiscretizedLogisticMixture.mlp(50, 784, num_components=5)(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    def __init__(self, net: nn.Module | None, num_components: int = 5):
        super().__init__(net)
        _check_sizes(num_components=num_components)
        self.num_components = num_components

    @classmethod
    def mlp(
        cls,
        parents_dim: int,
        dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        **family: Any,
    ) -> Self:
        """This family over a perceptron, whose components begin spread over the grey values."""
        conditional = super().mlp(parents_dim, dim, hidden, activation, **family)
        return conditional.start_at(torch.full((dim,), 0.5))

    @staticmethod
    def eta_dim(dim: int, num_components: int = 5) -> int:
        """A mean, a log scale and a log weight of each component, for each value."""
        _check_sizes(num_components=num_components)
        return 3 * num_components * dim

    @staticmethod
    def num_locations(dim: int, num_components: int = 5) -> int:
        """The means."""
        return num_components * dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """Means spread evenly about the given one, half a unit of [0, 1] from end to end; s = e^-2, equal weights.

        The mean is the given one but for what lies beyond 0 and 1.
        """
        spread = torch.linspace(-0.5, 0.5, self.num_components, dtype=mean.dtype, device=mean.device)
        spread = spread if self.num_components > 1 else torch.zeros_like(spread)
        mu = (2 * mean - 1 + spread.unsqueeze(-1)).flatten()
        return torch.cat([mu, torch.full_like(mu, -2.0), torch.zeros_like(mu)])

    @property
    def parts(self) -> dict[str, Any]:
        """K."""
        return {"num_components": self.num_components}

    def distribution(self, eta: Tensor) -> Distribution:
        """Independent values from eta `(*, 3 K dim)`."""
        if eta.shape[-1] % (3 * self.num_components):
            raise ValueError(
                f"Expected DiscretizedLogisticMixture's network to give 3 K D numbers for K = {self.num_components} "
                f"and some D; got {eta.shape[-1]}"
            )
        mu, log_s, log_pi = eta.unflatten(-1, (3, self.num_components, -1)).movedim(-1, -2).unbind(-3)
        return _DiscretizedLogistics(mu, log_s, log_pi).to_event(1)


class _ContinuousBernoulli(Density):
    """C(l) exp(l x) on [0, 1]; below |l| = 1/2 by power series in l, whose closed forms cancel there."""

    values = constraints.unit_interval

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape, torch.Size())

    def expanded(self, batch_shape: torch.Size) -> "_ContinuousBernoulli":
        return _ContinuousBernoulli(self.logits.expand(batch_shape))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where |l| < 1/2, l there, and |l| elsewhere: each harmless, and of no gradient, where it is not used."""
        small = self.logits.abs() < 0.5
        one = torch.ones_like(self.logits)
        return small, torch.where(small, self.logits, 0 * one), torch.where(small, one, self.logits.abs())

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-l) - 1 / l."""
        small, near, far = self._parts()
        h = near**2
        series = near * (1 / 12 - h * (1 / 720 - h * (1 / 30240 - h * (1 / 1209600 - h / 47900160))))
        closed = (-1 / (-far).expm1() - 1 / far - 0.5) * self.logits.sign()
        return 0.5 + torch.where(small, series, closed)

    def log_density(self, value: Tensor) -> Tensor:
        """l (x - 1/2) less the series, or l (x - 1) for l > 0 and l x for l < 0 less log((1 - e^-|l|) / |l|)."""
        small, near, far = self._parts()
        h = (near / 2) ** 2
        series = h * (
            1 / 6 - h * (1 / 180 - h * (1 / 2835 - h * (1 / 37800 - h * (1 / 467775 - h * 691 / 3831077250))))
        )
        from_here = torch.where(small, 0.5, (self.logits > 0).to(self.logits.dtype))
        return (value - from_here) * self.logits - torch.where(small, series, (-(-far).expm1() / far).log())

    def draw(self, shape: torch.Size) -> Tensor:
        u = torch.rand(self._extended_shape(shape), dtype=self.logits.dtype, device=self.logits.device)
        rate = -self.logits.abs().clamp(min=1e-6)
        x = (torch.log1p(u * rate.expm1()) / rate).clamp(0, 1)
        return torch.where(self.logits < 0, x, 1 - x)


class _Bytes(constraints.Constraint):
    """k / 255 for k = 0, ..., 255."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        k = value * 255
        return ((k - k.round()).abs() < 1e-3) & (k > -0.5) & (k < 255.5)

    def __repr__(self) -> str:
        return "k / 255 for k = 0, ..., 255"


class _DiscretizedLogistics(Density):
    """Mixtures `(*, K)` of logistics, each value given to the nearest k / 255."""

    values = _Bytes()

    def __init__(self, mu: Tensor, log_s: Tensor, log_pi: Tensor):
        self.mu, self.log_s, self.log_pi = mu, log_s, log_pi
        super().__init__(mu.shape[:-1], torch.Size())

    def expanded(self, batch_shape: torch.Size) -> "_DiscretizedLogistics":
        shape = batch_shape + self.mu.shape[-1:]
        return _DiscretizedLogistics(self.mu.expand(shape), self.log_s.expand(shape), self.log_pi.expand(shape))

    def _scale(self) -> Tensor:
        return self.log_s.clamp(min=-7).exp()

    def log_density(self, value: Tensor) -> Tensor:
        """By sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)), which does not cancel."""
        x, scale = value.unsqueeze(-1), self._scale()
        centre = 2 * x - 1 - self.mu
        log_above, log_below = logsigmoid((centre + 1 / 255) / scale), logsigmoid(-(centre - 1 / 255) / scale)
        inside = log_above + log_below + (-(-2 / 255 / scale).expm1()).log()
        log_p = torch.where(x < 0.5 / 255, log_above, torch.where(x > 254.5 / 255, log_below, inside))
        return torch.logsumexp(self.log_pi.log_softmax(-1) + log_p, -1)

    def draw(self, shape: torch.Size) -> Tensor:
        k = dist.Categorical(logits=self.log_pi).sample(shape).unsqueeze(-1)
        mu, scale = (p.expand(shape + p.shape).gather(-1, k).squeeze(-1) for p in (self.mu, self._scale()))
        u = torch.rand_like(mu).clamp(torch.finfo(mu.dtype).tiny, 1 - torch.finfo(mu.dtype).eps)
        c = mu + scale * u.logit()
        return ((c + 1) * 127.5).round().clamp(0, 255) / 255

    @property
    def mean(self) -> Tensor:
        """sum_k P(x >= (k - 1/2) / 255) / 255, from k = 1 to 255."""
        weights, scale, total = self.log_pi.softmax(-1), self._scale(), torch.zeros_like(self.mu[..., 0])
        for k in range(1, 256):
            edge = (2 * k - 1) / 255 - 1
            total = total + (weights * ((self.mu - edge) / scale).sigmoid()).sum(-1)
        return total / 255
