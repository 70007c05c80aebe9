"""The noun that carries the library: p(a | parents)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyrovae.arguments import check_one_of
from pyrovae.nets import MLP, Activation, _check_sizes

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
_NETWORK_DTYPE: ContextVar[torch.dtype | None] = ContextVar("_NETWORK_DTYPE", default=None)


@contextmanager
def networks_in(precision: str) -> Iterator[None]:
    """Run the networks of all Conditionals, never their densities, in bfloat16 (bf16-mixed) or as they are (32-true).

    A program with networks outside its Conditionals puts them into `network_autocast`.

    Raises:
        ValueError: for another precision.
    """
    check_one_of(PRECISIONS, precision=precision)
    token = _NETWORK_DTYPE.set(PRECISIONS[precision])
    try:
        yield
    finally:
        _NETWORK_DTYPE.reset(token)


def network_dtype() -> torch.dtype | None:
    """The dtype that `networks_in` has set."""
    return _NETWORK_DTYPE.get()


def network_autocast(device: torch.device) -> torch.autocast:
    """Around a network's call: torch's autocast to that dtype, or none."""
    dtype = network_dtype()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Conditional(nn.Module, ABC):
    """p(a | parents): a network gives the parameters, a family gives the density.

        eta = NeuralNet(parents),  p(a | parents) = p(a | eta)     (Kingma and Welling 2019, eq. 1.7, 1.8)

    Nothing in a Conditional knows its role: the same class serves as likelihood, posterior or prior.
    Called with the values of the parents, each `(*, D_i)`, it returns a Pyro distribution with batch shape `*`
    and event shape `(dim,)`. Several parents are broadcast against each other on `*` and concatenated on the last
    dimension. A root is called with nothing.

    Leading dimensions (data, particles, enumerated labels) are folded into one before the network sees them,
    so any network from `(B, D)` to `(B, E)` serves, batch norm and convolutions included.

    Args:
        net: network from the parents, `(B, sum D_i)`, to eta, `(B, E)`; for a root it takes no argument.

    Raises:
        ValueError: when called, for parents that are no tensors `(*, D_i)`, or that do not broadcast.

    A new family fills in `eta_dim`, `eta_at` and `distribution`.
    """

    def __init__(self, net: nn.Module | None):
        super().__init__()
        if net is not None and not isinstance(net, nn.Module):
            raise ValueError(f"Expected net to be a network, an nn.Module; got {net!r}")
        self.net = net

    @classmethod
    def mlp(
        cls,
        parents_dim: int,
        dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        **family: Any,
    ) -> Self:
        """This family over a multi-layer perceptron, which gives the location first and then, at zero, all else.

        Log scales and correlations begin at 0, whatever the parents: a Gaussian whose scale begins at random begins
        with errors of millions of nats, which Adam's running mean of squares forgets only after thousands of steps.

        Args:
            parents_dim: the parents' sizes, summed.
            dim: size of the variable.
            hidden: units of each hidden layer.
            activation: after every hidden layer.
            family: what the family's constructor takes beside the network, as num_classes=10.
        """
        _check_sizes(parents_dim=parents_dim, dim=dim)
        net = MLP(parents_dim, cls.eta_dim(dim, **family), hidden, activation)
        weight = net.layers[-1].get_parameter("weight")
        nn.init.zeros_(weight.data[cls.num_locations(dim, **family) :])
        return cls(net, **family)

    @staticmethod
    @abstractmethod
    def eta_dim(dim: int, **family: Any) -> int:
        """How many numbers the network must give for a variable of size `dim`."""

    @staticmethod
    def num_locations(dim: int, **family: Any) -> int:
        """How many numbers of eta, the first ones, are locations or logits, which need not begin at zero."""
        return dim

    @abstractmethod
    def eta_at(self, mean: Tensor) -> Tensor:
        """Parameters `(E,)` of a member of the family with this mean `(dim,)`."""

    @abstractmethod
    def distribution(self, eta: Tensor) -> Distribution:
        """The Pyro distribution with parameters eta `(*, E)`."""

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> Self:
        """Set the output bias so that training begins with this mean, whatever the parents (Burda et al. 2016).

        A likelihood that begins at the mean of the data need not spend its first epochs, and its latents, on it.

        Args:
            mean: `(dim,)`; a Bernoulli's is kept within [0.001, 0.999].

        Raises:
            ValueError: for a network that is no MLP, or a mean of another size.
        """
        if not isinstance(self.net, MLP):
            raise ValueError(f"Expected an MLP as network; got {type(self.net).__name__}")
        if not isinstance(mean, Tensor) or mean.dim() != 1 or not mean.is_floating_point():
            raise ValueError(f"Expected mean to be a floating-point tensor (dim,); got {mean!r}")
        last, eta = self.net.layers[-1], self.eta_at(mean)
        assert isinstance(last, nn.Linear)
        bias = last.bias
        if bias.shape != eta.shape:
            raise ValueError(f"Expected mean for {len(bias)} outputs; got shape {tuple(mean.shape)}")
        bias.copy_(eta)
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """What the family's function in `reference` takes beside the value and eta."""
        return {}

    def by_hand(self, table: dict[str, Any]) -> Any:
        """The family's function in one of the tables of `reference`, or its functions; None where there is none."""
        found = table.get(type(self).__name__)
        if isinstance(found, tuple):
            return tuple(partial(function, **self.parts) for function in found)
        return found and partial(found, **self.parts)

    def forward(self, *parents: Tensor) -> Distribution:
        """The distribution given the parents' values, each `(*, D_i)`."""
        return self.distribution(self.eta(*parents))

    def eta(self, *parents: Tensor) -> Tensor:
        """The parameters `(*, E)` given the parents' values, each `(*, D_i)`."""
        if self.net is None:
            raise ValueError(f"Expected {type(self).__name__} with a network, for it is called; got none")
        if not parents:
            return self.net()
        batch_shape = _batch_shape(parents)
        with network_autocast(parents[0].device):
            if isinstance(self.net, MLP) and any(parent.shape[:-1] != batch_shape for parent in parents):
                eta = self.net.joined(*parents)
            else:
                joined = torch.cat([parent.expand(*batch_shape, parent.shape[-1]) for parent in parents], -1)
                rows = self.net(joined.reshape(math.prod(batch_shape), joined.shape[-1]))
                eta = rows.reshape(*batch_shape, math.prod(rows.shape[1:]))
        return eta.to(parents[0].dtype)


def check_conditionals(**conditionals: Any) -> None:
    """Raises ValueError for what is not a `Conditional`."""
    for name, conditional in conditionals.items():
        if not isinstance(conditional, Conditional):
            raise ValueError(f"Expected {name} to be a Conditional, as Bernoulli.mlp(20, 784); got {conditional!r}")


def check_families(**families: Any) -> None:
    """Raises ValueError for what is not a class of Conditionals."""
    for name, family in families.items():
        if not (isinstance(family, type) and issubclass(family, Conditional)):
            raise ValueError(f"Expected {name} to be a class of Conditionals, as Bernoulli; got {family!r}")


def _batch_shape(parents: tuple[Tensor, ...]) -> torch.Size:
    """The leading dimensions of the parents `(*, D_i)`, broadcast against each other."""
    if not all(isinstance(parent, Tensor) and parent.dim() for parent in parents):
        found = ", ".join("()" if isinstance(parent, Tensor) else type(parent).__name__ for parent in parents)
        raise ValueError(f"Expected parents to be tensors of shape (*, D); got {found}")
    try:
        return torch.broadcast_shapes(*(parent.shape[:-1] for parent in parents))
    except RuntimeError:
        shapes = ", ".join(str(tuple(parent.shape)) for parent in parents)
        raise ValueError(f"Expected parents whose dimensions but the last broadcast; got shapes {shapes}") from None
