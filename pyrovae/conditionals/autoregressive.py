"""Densities value by value: each given those before it, by masked networks."""

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae.conditionals.conditional import Conditional, Distribution, network_autocast
from pyrovae.conditionals.density import Density, LogScaleNormal
from pyrovae.conditionals.priors import check_root, no_mean, no_mlp
from pyrovae.nets import Activation, MaskedMLP, _activation, _check_image_shape, _check_sizes, _glorot


class AutoregressivePrior(Conditional):
    """p(z) = prod_i N(z_i; mu_i(z_<i), sigma_i(z_<i)^2),  (mu, log sigma) = MaskedMLP(z), a root.

    The density takes one pass through the network, a draw takes one for each dimension. Scales begin at 1.

    Args:
        dim: size of z.
        hidden: units of each hidden layer.
        activation: after every hidden layer.

    Raises:
        ValueError: for a size below 1, or an unknown activation.

    Source:
        Germain et al. (2015); Kingma and Welling (2019), section 4.3.

    Example:
        >>> AutoregressivePrior(2, hidden=(10,))().sample((3,)).shape
        torch.Size([3, 2])
    """

    mlp = classmethod(no_mlp)  # pyright: ignore[reportAssignmentType]
    eta_at = no_mean

    def __init__(self, dim: int, hidden: Sequence[int] = (200, 200), activation: Activation = "tanh"):
        _check_sizes(dim=dim)
        net = MaskedMLP(dim, 2, hidden, activation=activation)
        super().__init__(net)
        self.dim, self.hidden, self.activation = dim, tuple(hidden), activation
        nn.init.zeros_(net.layers[-1].get_parameter("weight").data[dim:])

    @staticmethod
    def eta_dim(dim: int) -> int:
        """Nothing: mu and log sigma depend on z."""
        return 0

    @property
    def parts(self) -> dict[str, Any]:
        """The network from z to (mu, log sigma)."""
        return {"net": self.given}

    def given(self, z: Tensor) -> Tensor:
        """(mu, log sigma) `(*, 2 dim)`, of each dimension given those before it in z `(*, dim)`."""
        return super().eta(z)

    def eta(self, *parents: Tensor) -> Tensor:
        """Nothing, `(0,)`: the parameters depend on z."""
        check_root(self, parents)
        return next(self.parameters()).new_zeros(0)

    def distribution(self, eta: Tensor) -> Distribution:
        """p(z), whatever eta."""
        return _AutoregressiveNormal(self)


class PixelCNN(Conditional):
    """p(x | parents) = prod_i Bernoulli(x_i; sigmoid(l_i)),  l = eta + Conv(x_<i, eta): an autoregressive decoder.

    Pixels come row by row, the channels of a pixel one after the other. A convolution masked so that it sees earlier
    values alone, `num_layers` more of 3 x 3, and one of 1 x 1 give what is added to the logits eta, which any decoder
    may give and which the first convolution sees as a whole. That addition begins at 0, so that training begins
    with a Bernoulli decoder. As in the paper's first form, a stack of masked convolutions does not see some pixels
    above and to the right (its blind spot).

    The density takes one pass through the network, a draw takes one for each value. The mean has no closed form.

    Args:
        net: network from the parents to eta, `(B, C * H * W)`.
        image_shape: (channels, height, width) of x, which is flattened to `(*, C * H * W)`.
        channels: feature maps of each hidden layer, for each channel of the image.
        num_layers: hidden layers after the first.
        kernel_size: of the first layer, an odd number.
        activation: after every hidden layer.

    Raises:
        ValueError: for a shape or size that is not positive, or an even kernel_size.

    Source:
        van den Oord et al. (2016), Pixel Recurrent Neural Networks; with latents, Gulrajani et al. (2017).

    Example:
        >>> PixelCNN.mlp(50, 784, image_shape=(1, 28, 28))(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    def __init__(
        self,
        net: nn.Module | None,
        image_shape: Sequence[int],
        channels: int = 16,
        num_layers: int = 3,
        kernel_size: int = 5,
        activation: Activation = "relu",
    ):
        super().__init__(net)
        _check_image_shape(image_shape)
        _check_sizes(channels=channels, num_layers=num_layers, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"Expected kernel_size to be odd; got {kernel_size}")
        self.image_shape, self.channels, self.num_layers = tuple(image_shape), channels, num_layers
        self.kernel_size, self.activation = kernel_size, activation
        colors, function = image_shape[0], _activation(activation)
        width = channels * colors
        self.seen = _MaskedConv(colors, width, kernel_size, colors, itself=False)
        self.context = nn.Conv2d(colors, width, 3, padding=1)
        hidden = list[nn.Module]()
        for _ in range(num_layers):
            hidden += [function(), _MaskedConv(width, width, 3, colors, itself=True)]
        out = _MaskedConv(width, colors, 1, colors, itself=True)
        self.hidden = nn.Sequential(*hidden, function(), out)
        _glorot(self.hidden)
        nn.init.zeros_(out.weight)

    @classmethod
    def mlp(
        cls,
        parents_dim: int,
        dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        **family: Any,
    ) -> Self:
        """This family over a perceptron that gives eta; without image_shape the image is a square of one channel.

        Raises:
            ValueError: where dim is no square and no image_shape is given, or is not its product.
        """
        _check_sizes(dim=dim)
        side = math.isqrt(dim)
        shape = family.setdefault("image_shape", (1, side, side))
        _check_image_shape(shape)
        if math.prod(shape) != dim:
            raise ValueError(f"Expected image_shape=(channels, height, width) of {dim} values; got {tuple(shape)}")
        return super().mlp(parents_dim, dim, hidden, activation, **family)

    @staticmethod
    def eta_dim(dim: int, **family: Any) -> int:
        """A logit for each value."""
        return dim

    def eta_at(self, mean: Tensor) -> Tensor:
        """logit(mean), with the mean kept within [0.001, 0.999]."""
        return mean.clamp(0.001, 0.999).logit()

    @property
    def parts(self) -> dict[str, Any]:
        """The network from x and eta to logits."""
        return {"net": self.logits}

    def logits(self, x: Tensor, eta: Tensor) -> Tensor:
        """The logits l `(*, dim)` of each value given those before it in x `(*, dim)`."""
        x, eta = torch.broadcast_tensors(x, eta)
        images, etas = x.reshape(-1, *self.image_shape), eta.reshape(-1, *self.image_shape)
        with network_autocast(x.device):
            added = self.hidden(self.seen(images) + self.context(etas))
        return eta + added.reshape(eta.shape).to(eta.dtype)

    def distribution(self, eta: Tensor) -> Distribution:
        """An image from eta `(*, C * H * W)`."""
        size = math.prod(self.image_shape)
        if eta.shape[-1] != size:
            raise ValueError(
                f"Expected PixelCNN's network to give a number for each of {size} values; got {eta.shape[-1]}"
            )
        return _Pixels(self, eta)


class _MaskedConv(nn.Conv2d):
    """A convolution that sees rows above, values to the left, and of a pixel the channels before (or its own, too)."""

    mask: Tensor

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, colors: int, itself: bool):
        super().__init__(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
        middle = kernel_size // 2
        mask = torch.zeros_like(self.weight)
        mask[:, :, :middle] = 1
        mask[:, :, middle, :middle] = 1
        color_in = torch.arange(channels_in) * colors // channels_in
        color_out = torch.arange(channels_out).unsqueeze(-1) * colors // channels_out
        mask[:, :, middle, middle] = (color_in <= color_out if itself else color_in < color_out).to(mask.dtype)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H, W)`."""
        return nn.functional.conv2d(input, self.weight * self.mask, self.bias, padding=self.padding)


class _AutoregressiveNormal(Density):
    """The density of an `AutoregressivePrior`."""

    values = constraints.real_vector
    has_rsample = True

    def __init__(self, prior: AutoregressivePrior, batch_shape: torch.Size = torch.Size()):  # noqa: B008
        self.prior = prior
        super().__init__(batch_shape, torch.Size([prior.dim]))

    def expanded(self, batch_shape: torch.Size) -> "_AutoregressiveNormal":
        return _AutoregressiveNormal(self.prior, batch_shape)

    def log_density(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        mu, log_sigma = self.prior.given(value).chunk(2, -1)
        return LogScaleNormal(mu, log_sigma).log_prob(value).sum(-1)

    def draw(self, shape: torch.Size) -> Tensor:
        z = next(self.prior.parameters()).new_zeros(self._extended_shape(shape))
        eps = torch.randn_like(z)
        for i in range(self.prior.dim):
            mu, log_sigma = self.prior.given(z).chunk(2, -1)
            z = torch.cat([z[..., :i], (mu + log_sigma.exp() * eps)[..., i : i + 1], z[..., i + 1 :]], -1)
        return z


class _Pixels(Density):
    """The density of a `PixelCNN` at eta `(*, dim)`."""

    values = constraints.independent(constraints.boolean, 1)

    def __init__(self, conditional: PixelCNN, eta: Tensor):
        self.conditional, self.eta = conditional, eta
        super().__init__(eta.shape[:-1], eta.shape[-1:])

    def expanded(self, batch_shape: torch.Size) -> "_Pixels":
        return _Pixels(self.conditional, self.eta.expand(batch_shape + self.event_shape))

    def log_density(self, value: Tensor) -> Tensor:
        logits = self.conditional.logits(value, self.eta)
        return dist.Bernoulli(logits=logits, validate_args=False).log_prob(value.expand_as(logits)).sum(-1)

    def draw(self, shape: torch.Size) -> Tensor:
        colors, height, width = self.conditional.image_shape
        x = self.eta.new_zeros(self._extended_shape(shape))
        for i in range(height * width):
            for j in range(i, colors * height * width, height * width):  # the channels of pixel i
                x[..., j] = self.conditional.logits(x, self.eta)[..., j].sigmoid().bernoulli()
        return x
