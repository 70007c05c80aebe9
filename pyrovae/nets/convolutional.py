"""Convolutions between flattened images and vectors."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyrovae.nets.mlp import (
    Activation,
    _activation,
    _check_image_shape,
    _check_input,
    _check_sequence,
    _check_sizes,
    _glorot,
)


def _halvings(image_shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Heights and widths before and after each stride-2 convolution."""
    _check_image_shape(image_shape)
    _check_sequence("channels", channels, (32, 64))
    sizes = [(image_shape[1], image_shape[2])]
    for _ in channels:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    if min(sizes[-1]) < 1:
        raise ValueError(
            f"Expected image_shape to survive {len(channels)} halvings, one for each of channels={tuple(channels)}; "
            f"got {tuple(image_shape)}"
        )
    return sizes


class ConvEncoder(nn.Module):
    """Stride-2 convolutions, then a linear map: from a flattened image to a vector.

    Args:
        image_shape: (channels, height, width) of the image, which comes flattened to `(*, C * H * W)`.
        out_dim: size of the last dimension of the output.
        channels: feature maps of each convolution; each halves height and width.
        activation: after every convolution.

    Raises:
        ValueError: for an image too small for the number of halvings, or a size that is not positive.

    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 28), 40)(torch.zeros(3, 5, 784)).shape
        torch.Size([3, 5, 40])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_dim: int,
        channels: Sequence[int] = (32, 64),
        activation: Activation = "relu",
    ):
        super().__init__()
        _check_sizes(out_dim=out_dim)
        height, width = _halvings(image_shape, channels)[-1]
        self.image_shape, self.out_dim = tuple(image_shape), out_dim
        self.channels, self.activation = tuple(channels), activation
        widths, function = [image_shape[0], *channels], _activation(activation)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, 4, stride=2, padding=1), function()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, out_dim))
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(*, C * H * W)` to `(*, out_dim)`."""
        _check_input(x, math.prod(self.image_shape), self)
        return self.layers(x.reshape(-1, *self.image_shape)).reshape(*x.shape[:-1], self.out_dim)


class ConvDecoder(nn.Module):
    """A linear map, then transposed stride-2 convolutions: from a vector to a flattened image.

    The mirror image of `ConvEncoder`; odd heights and widths are restored exactly.

    Args:
        in_dim: size of the last dimension of the input.
        image_shape: (channels, height, width) of the output, which is flattened to `(*, C * H * W)`.
        channels: feature maps, named from the image inwards, as the encoder's.
        activation: before every transposed convolution.

    Raises:
        ValueError: for an image too small for the number of halvings, or a size that is not positive.

    Example:
        >>> import torch
        >>> ConvDecoder(20, (1, 28, 28))(torch.zeros(3, 5, 20)).shape
        torch.Size([3, 5, 784])
    """

    def __init__(
        self,
        in_dim: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        activation: Activation = "relu",
    ):
        super().__init__()
        _check_sizes(in_dim=in_dim)
        sizes = _halvings(image_shape, channels)[::-1]
        self.in_dim, self.image_shape = in_dim, tuple(image_shape)
        self.channels, self.activation = tuple(channels), activation
        widths, function = [image_shape[0], *channels][::-1], _activation(activation)
        height, width = sizes[0]
        layers: list[nn.Module] = [
            nn.Linear(in_dim, widths[0] * height * width),
            nn.Unflatten(-1, (widths[0], height, width)),
        ]
        for i, (target_height, target_width) in enumerate(sizes[1:]):
            odd = (target_height % 2, target_width % 2)
            layers.append(function())
            layers.append(nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1, output_padding=odd))
        self.layers = nn.Sequential(*layers)
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(*, in_dim)` to `(*, C * H * W)`."""
        _check_input(x, self.in_dim, self)
        return self.layers(x.reshape(-1, self.in_dim)).reshape(*x.shape[:-1], math.prod(self.image_shape))
