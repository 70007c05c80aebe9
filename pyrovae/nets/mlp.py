"""Perceptrons."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pyrovae.arguments import check_one_of, check_whole

Activation = Literal["tanh", "relu", "elu", "softplus", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}


def _activation(name: str) -> type[nn.Module]:
    check_one_of(ACTIVATIONS, activation=name)
    return ACTIVATIONS[name]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"Expected {name} to be a positive whole number; got {size!r}")


def _check_sequence(name: str, sizes: Sequence[int], example: tuple[int, ...]) -> None:
    if not isinstance(sizes, list | tuple):  # an iterator would be used up
        raise ValueError(f"Expected {name} to be a sequence of sizes, as {example}; got {sizes!r}")
    _check_sizes(**{f"{name}[{i}]": size for i, size in enumerate(sizes)})


def _check_hidden(hidden: Sequence[int]) -> None:
    _check_sequence("hidden", hidden, (200, 200))


def _check_image_shape(shape: Sequence[int], name: str = "image_shape") -> None:
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        found = tuple(shape) if isinstance(shape, list | tuple) else repr(shape)
        raise ValueError(f"Expected {name} to be (channels, height, width); got {found}")
    _check_sequence(name, shape, (1, 28, 28))


def _check_input(x: Tensor, dim: int, module: nn.Module, name: str = "the network's input") -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] != dim:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"Expected {name} to have shape (*, {dim}); got {found}")
    _check_dtype(x, module, name)


def _check_dtype(x: Tensor, module: nn.Module, name: str = "the network's input") -> None:
    dtype = next((weight.dtype for weight in module.parameters()), x.dtype)
    if x.dtype != dtype:
        raise ValueError(f"Expected {name} to have its weights' dtype, {dtype}; got {x.dtype}")


def _glorot(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases, as in Burda et al. (2016)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Constant(nn.Module):
    """The network of a root: the same numbers `(out_dim,)` always, zeros at first.

    Args:
        out_dim: how many.
        learned: whether they are parameters.

    Raises:
        ValueError: for a size that is not positive.

    Example:
        >>> Constant(3)()
        tensor([0., 0., 0.])
    """

    value: Tensor

    def __init__(self, out_dim: int, learned: bool = False):
        super().__init__()
        _check_sizes(out_dim=out_dim)
        self.out_dim, self.learned = out_dim, learned
        if learned:
            self.value = nn.Parameter(torch.zeros(out_dim))
        else:
            self.register_buffer("value", torch.zeros(out_dim), persistent=False)

    def forward(self) -> Tensor:
        """The numbers `(out_dim,)`."""
        return self.value


class MLP(nn.Module):
    """A multi-layer perceptron, Glorot-initialised.

    Args:
        in_dim: size of the last dimension of the input.
        out_dim: size of the last dimension of the output.
        hidden: units of each hidden layer; empty for a linear map.
        activation: after every hidden layer: tanh, relu, elu, softplus or silu.
        out_bias: whether a constant is added to the output.

    Raises:
        ValueError: for a size that is not positive or an unknown activation.

    Example:
        >>> import torch
        >>> MLP(784, 100, hidden=(200, 200))(torch.zeros(5, 784)).shape
        torch.Size([5, 100])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        out_bias: bool = True,
    ):
        super().__init__()
        _check_hidden(hidden)
        self.in_dim, self.out_dim, self.hidden, self.activation = in_dim, out_dim, tuple(hidden), activation
        self.out_bias = out_bias
        _check_sizes(in_dim=in_dim, out_dim=out_dim)
        sizes, function = [in_dim, *hidden], _activation(activation)
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [nn.Linear(size, next_size), function()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim, bias=out_bias))
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(*, in_dim)` to `(*, out_dim)`."""
        _check_input(x, self.in_dim, self)
        return self.layers(x)

    def joined(self, *parts: Tensor) -> Tensor:
        """The output for an input given in parts `(*, D_i)`, broadcast against each other.

        The first layer is applied to each part before it is broadcast: what is the same for all classes or particles
        is multiplied once.
        """
        sizes = [part.shape[-1] for part in parts]
        if sum(sizes) != self.in_dim:
            raise ValueError(f"Expected parents of {self.in_dim} values in all; got {sizes}")
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        for part in parts:
            _check_dtype(part, self)
        weights = first.weight.split(sizes, 1)
        out = first.weight.new_zeros(()) if first.bias is None else first.bias
        for part, weight in zip(parts, weights, strict=True):
            out = out + part @ weight.T
        for layer in list(self.layers)[1:]:
            out = layer(out)
        return out


class MaskedMLP(nn.Module):
    """An autoregressive network: what it says of x_i depends on x_1 ... x_{i-1} and the context alone.

    Every input has a degree, its place in the order, and every hidden unit one too; a unit sees those of a degree not
    above its own, an output those of a degree below its own. All other weights are masked out, exactly.

    Args:
        dim: size of x.
        outputs: how many numbers are said of each x_i.
        hidden: units of each hidden layer; each must have a unit for every degree.
        context_dim: size of the context, which everything may depend on.
        activation: after every hidden layer.
        reverse: the order is x_dim ... x_1.

    Raises:
        ValueError: for a size that is not positive, a hidden layer too narrow, or an unknown activation.

    Source:
        Germain et al. (2015), MADE, eq. 12 and 13.

    Example:
        >>> net = MaskedMLP(3, outputs=2, hidden=(8,), context_dim=4)
        >>> net(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        dim: int,
        outputs: int = 2,
        hidden: Sequence[int] = (100,),
        context_dim: int = 0,
        activation: Activation = "relu",
        reverse: bool = False,
    ):
        super().__init__()
        _check_hidden(hidden)
        _check_sizes(dim=dim, outputs=outputs)
        check_whole(0, context_dim=context_dim)
        self.dim, self.outputs, self.hidden, self.context_dim = dim, outputs, tuple(hidden), context_dim
        self.activation, self.reverse = activation, reverse
        place = torch.arange(1, dim + 1).flip(0) if reverse else torch.arange(1, dim + 1)
        least = 0 if context_dim or dim == 1 else 1  # units of degree 0 see the context alone
        if min(hidden, default=dim) < dim - least:
            raise ValueError(f"Expected hidden layers of at least {dim - least} units, one a degree; got {self.hidden}")
        units = [least + torch.arange(size) % (dim - least) for size in hidden]
        degrees = [place, *units, place.repeat(outputs) - 1]
        self.order = list(range(dim))[:: -1 if reverse else 1]
        self.function = _activation(activation)()
        self.layers = nn.ModuleList(nn.Linear(len(below), len(above)) for below, above in pairwise(degrees))
        for i, (below, above) in enumerate(pairwise(degrees)):
            mask = (above.unsqueeze(1) >= below).to(torch.get_default_dtype())
            self.register_buffer(f"mask_{i}", mask, persistent=False)
        self.context = nn.Linear(context_dim, len(degrees[1]), bias=False) if context_dim else None
        _glorot(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*, dim)` and a context `(*, context_dim)`, broadcast against each other, to `(*, outputs, dim)`."""
        _check_input(x, self.dim, self)
        given = 0 if context is None else context.shape[-1]
        if given != self.context_dim:
            raise ValueError(f"Expected a context of {self.context_dim} values; got {given}")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            x = nn.functional.linear(x if i == 0 else self.function(x), layer.weight * self.mask(i), layer.bias)
            if i == 0 and self.context is not None:
                x = x + self.context(context)
        return x.unflatten(-1, (self.outputs, self.dim))

    def mask(self, i: int) -> Tensor:
        """Ones where a weight of layer i counts, zeros elsewhere."""
        return self.get_buffer(f"mask_{i}")
