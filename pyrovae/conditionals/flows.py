"""Normalizing flows: a Gaussian, bent step by step."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import Transform
from torch import Tensor, nn

from pyrovae.conditionals.conditional import Conditional, Distribution
from pyrovae.conditionals.density import LogScaleNormal
from pyrovae.conditionals.transforms import (
    AFFINE,
    GATE,
    SPLINE,
    SPLINE_BOUND,
    SPLINE_LEAST,
    STANDARDIZE,
    Autoregressive,
    Coupling,
    of_halves,
)
from pyrovae.nets import MLP, Activation, Constant, MaskedMLP, _check_sizes


class Flow(Conditional):
    """p(z | parents) = N(z_0; mu, diag(sigma^2)) |det dz_T / dz_0|^-1,  z_t = f_t(z_{t-1}; h),  z = z_T.

    eta = (mu, log sigma, h): the network gives the Gaussian and a context h for the steps, which have parameters of
    their own. As a prior, `root`, mu = log sigma = 0 and there is no h. The steps are part of the density: they run in
    full precision where networks run in bfloat16. A draw's density needs no inverse; the mean has no closed form.

    A new flow fills in `transforms` and `parts`.

    Args:
        net: from the parents `(B, sum D_i)` to eta `(B, 2 dim + context_dim)`.
        dim: size of z.
        steps: T.
        context_dim: size of h.

    Raises:
        ValueError: for a size that is not positive.
    """

    of_parents: dict[str, Any] = {"context_dim": 64}  # noqa: RUF012  # what differs where there are parents

    def __init__(self, net: nn.Module | None, dim: int, steps: int, context_dim: int):
        super().__init__(net)
        _check_sizes(dim=dim, steps=steps)
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ValueError(f"Expected context_dim to be 0 or more; got {context_dim!r}")
        self.dim, self.steps, self.context_dim = dim, steps, context_dim

    @classmethod
    def mlp(
        cls,
        parents_dim: int,
        dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        **options: Any,
    ) -> Self:
        """This flow over a multi-layer perceptron, which gives mu first and then, at zero, log sigma and h.

        Args:
            parents_dim: the parents' sizes, summed.
            dim: size of the variable.
            hidden: units of each of the perceptron's hidden layers.
            activation: after every hidden layer of the perceptron.
            options: arguments of the class, as steps.
        """
        _check_sizes(parents_dim=parents_dim, dim=dim)
        options = cls.of_parents | options
        net = MLP(parents_dim, 2 * dim + cls(None, dim, **options).context_dim, hidden, activation)
        nn.init.zeros_(net.layers[-1].get_parameter("weight").data[dim:])
        return cls(net, dim, **options)

    @classmethod
    def root(cls, dim: int, **options: Any) -> Self:
        """This flow of N(0, I), without parents: a prior.

        Args:
            dim: size of the variable.
            options: arguments of the class, as steps.
        """
        cls(None, dim, **options)  # says what is wrong with the arguments under their own names
        return cls(Constant(2 * dim), dim, **options)

    @staticmethod
    def eta_dim(dim: int) -> int:
        """mu and log sigma; the context follows."""
        return 2 * dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """(mean, 0, 0): that of z_0, with unit variance."""
        return torch.cat([mean, mean.new_zeros(len(mean) + self.context_dim)])

    def distribution(self, eta: Tensor) -> Distribution:
        """The flow of N(mu, diag(sigma^2)), from eta `(*, 2 dim + context_dim)`."""
        if eta.shape[-1] != 2 * self.dim + self.context_dim:
            raise ValueError(
                f"Expected {type(self).__name__}'s network to give 2 dim + context_dim = "
                f"{2 * self.dim + self.context_dim} numbers; got {eta.shape[-1]}"
            )
        mu, log_sigma, h = eta.split([self.dim, self.dim, self.context_dim], -1)
        base = LogScaleNormal(mu, log_sigma).to_event(1)
        return dist.TransformedDistribution(base, list(self.transforms(h)))

    @abstractmethod
    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """f_1 ... f_T for a context `(*, context_dim)`, made anew: what they keep lasts as long as the distribution."""


class _WithNets(Flow):
    """A flow each of whose steps has a network. A new one fills in `step_nets` beside what a `Flow` does."""

    def __init__(
        self,
        net: nn.Module | None,
        dim: int,
        steps: int = 4,
        context_dim: int = 0,
        step_hidden: Sequence[int] | None = None,
        step_activation: Activation = "tanh",
    ):
        super().__init__(net, dim, steps, context_dim)
        self.step_hidden = step_hidden
        self.step_activation: Activation = step_activation
        self.nets = self.step_nets()

    @abstractmethod
    def step_nets(self) -> nn.ModuleList:
        """A network for each step."""

    @property
    def parts(self) -> dict[str, Any]:
        """The networks."""
        return {"steps": list(self.nets)}


def _masked_nets(flow: _WithNets) -> nn.ModuleList:
    """Networks from z and h to two numbers for each z_i, in one order and the reverse by turns."""
    sizes = (max(100, 2 * flow.dim),) if flow.step_hidden is None else flow.step_hidden
    nets = [
        MaskedMLP(flow.dim, 2, sizes, flow.context_dim, flow.step_activation, t % 2 == 1) for t in range(flow.steps)
    ]
    return _near_zero([net.layers[-1] for net in nets], nets)


def _half_nets(flow: _WithNets, numbers: int) -> nn.ModuleList:
    """Networks from one half of z and h to so many numbers for each value of the other half."""
    if flow.dim < 2:
        raise ValueError(f"Expected dim to be 2 or more, for one half bends the other; got {flow.dim}")
    half, sizes = flow.dim // 2, (100,) if flow.step_hidden is None else flow.step_hidden
    shape = half + flow.context_dim, numbers * (flow.dim - half)
    nets = [MLP(*shape, sizes, flow.step_activation) for _ in range(flow.steps)]
    return _near_zero([net.layers[-1] for net in nets], nets)


def _near_zero(last: Sequence[nn.Module], nets: Sequence[nn.Module]) -> nn.ModuleList:
    """Begin near the Gaussian: a tenth of the usual weights in the last layers."""
    for layer in last:
        layer.get_parameter("weight").data.mul_(0.1)
    return nn.ModuleList(nets)


class InverseAutoregressiveFlow(_WithNets):
    """Inverse autoregressive flow: fast draws, with their density; the density of another value takes `dim` passes.

        (m, s) = AutoregressiveNet_t(z, h),  g = sigmoid(s),  z <- g z + (1 - g) m,  log q <- log q - sum_i log g_i

    Every second network has the reverse order. Gates begin near sigmoid(2) = 0.88, as the authors advise.

    Args:
        net: to eta.
        dim: size of z.
        steps: T.
        context_dim: size of h.
        step_hidden: units of the hidden layers of each step's `MaskedMLP`; None for one of max(100, 2 dim).
        step_activation: after each of them.

    Raises:
        ValueError: for a size that is not positive.

    Source:
        Kingma et al. (2016), eq. 13 to 15; Kingma and Welling (2019), Algorithm 3.

    Example:
        >>> q = InverseAutoregressiveFlow.mlp(784, 50, hidden=(100,), steps=2)
        >>> q(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    def step_nets(self) -> nn.ModuleList:
        """Masked networks."""
        nets = _masked_nets(self)
        for step in nets:
            nn.init.constant_(step.get_submodule("layers")[-1].bias[self.dim :], 2.0)  # pyright: ignore
        return nets

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """An autoregressive step for each network."""
        return [Autoregressive(net, h, GATE) for net in self.nets]


class MaskedAutoregressiveFlow(_WithNets):
    """Masked autoregressive flow: p(z_i | z_1 ... z_{i-1}) a Gaussian, T times over.

        z_i = u_i exp(alpha_i) + mu_i,  (mu, alpha) = AutoregressiveNet_t(z, h),  u the step's input

    The density of any value is fast, a draw takes `dim` passes: the inverse of an inverse autoregressive flow, which
    suits priors. Every second network has the reverse order.

    Args: those of `InverseAutoregressiveFlow`.

    Source:
        Papamakarios et al. (2017), eq. 2 to 5.

    Example:
        >>> MaskedAutoregressiveFlow.root(20)().event_shape
        torch.Size([20])
    """

    def step_nets(self) -> nn.ModuleList:
        """Masked networks."""
        return _masked_nets(self)

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """The inverse of an autoregressive step for each network."""
        return [Autoregressive(net, h, STANDARDIZE).inv for net in self.nets]


class RealNVP(_WithNets):
    """Affine coupling: one half of the values scales and shifts the other; draws and densities are both fast.

        z_b <- z_b exp(s(z_a, h)) + t(z_a, h),  z_a the first dim // 2 values, or by turns the last

    Args: those of `InverseAutoregressiveFlow`, with a perceptron in each step, and dim of 2 or more.

    Source:
        Dinh et al. (2017), eq. 4 to 8.

    Example:
        >>> RealNVP.root(20)().event_shape
        torch.Size([20])
    """

    def step_nets(self) -> nn.ModuleList:
        """Perceptrons."""
        return _half_nets(self, 2)

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """A coupling for each network."""
        return [Coupling(net, h, AFFINE, t % 2 == 1) for t, net in enumerate(self.nets)]

    @property
    def parts(self) -> dict[str, Any]:
        """What (t, s) is given z_a and h, and whether z_a is the last half."""
        size = self.dim - self.dim // 2
        return {"steps": [(partial(of_halves, net, size=size), t % 2 == 1) for t, net in enumerate(self.nets)]}


class NeuralSplineFlow(_WithNets):
    """Spline coupling: one half of the values bends the other by rational-quadratic splines, both ways fast.

        z_b <- spline(z_b; theta(z_a, h)) in [-3, 3], else z_b;  z_a the first dim // 2 values, or by turns the last

    Args:
        net: to eta.
        dim: size of z, 2 or more.
        steps: T.
        context_dim: size of h.
        bins: pieces of each spline.
        step_hidden: units of the hidden layers of each step's perceptron; None for one of 100.
        step_activation: after each of them.

    Raises:
        ValueError: for a size that is not positive, or dim < 2, or fewer than 2 bins.

    Source:
        Durkan et al. (2019), section 3 and appendix A.1.

    Example:
        >>> NeuralSplineFlow.root(20)().event_shape
        torch.Size([20])
    """

    def __init__(
        self,
        net: nn.Module | None,
        dim: int,
        steps: int = 4,
        context_dim: int = 0,
        bins: int = 8,
        step_hidden: Sequence[int] | None = None,
        step_activation: Activation = "tanh",
    ):
        if not isinstance(bins, int) or not 2 <= bins < 1 / SPLINE_LEAST:
            raise ValueError(f"Expected bins to be 2 or more, and below {1 / SPLINE_LEAST:.0f}; got {bins}")
        self.bins = bins
        super().__init__(net, dim, steps, context_dim, step_hidden, step_activation)

    def step_nets(self) -> nn.ModuleList:
        """Perceptrons."""
        return _half_nets(self, 3 * self.bins - 1)

    def transforms(self, h: Tensor) -> Sequence[Transform]:
        """A coupling for each network."""
        return [Coupling(net, h, SPLINE, t % 2 == 1) for t, net in enumerate(self.nets)]

    @property
    def parts(self) -> dict[str, Any]:
        """What theta is given z_a and h, and whether z_a is the last half; the spline's box."""
        size = self.dim - self.dim // 2
        steps = [(partial(of_halves, net, size=size), t % 2 == 1) for t, net in enumerate(self.nets)]
        return {"steps": steps, "bound": SPLINE_BOUND, "least": SPLINE_LEAST}
