"""Networks against matrices and convolutions written out by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrovae.nets import ACTIVATIONS, MLP, ConvDecoder, ConvEncoder

BY_HAND = {
    "tanh": lambda a: 1 - 2 / (torch.exp(2 * a) + 1),
    "relu": lambda a: a * (a > 0),
    "elu": lambda a: torch.where(a > 0, a, torch.exp(a) - 1),
    "softplus": lambda a: torch.log(1 + torch.exp(a)),
    "silu": lambda a: a / (1 + torch.exp(-a)),
}
IMAGES = [(1, 28, 28), (1, 28, 20), (1, 8, 8), (3, 7, 9)]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def drawn(net: nn.Module) -> nn.Module:
    """In float64, with every parameter drawn anew, biases too."""
    net = net.double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layers(net: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, kinds)]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_activation_is_written_by_hand():
    assert set(BY_HAND) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", sorted(BY_HAND))
@pytest.mark.parametrize("hidden", [(), (4,), (4, 5)])
def test_mlp_is_a_product_of_matrices(hidden, activation):
    mlp, x = drawn(MLP(3, 2, hidden, activation)), normal(7, 3)
    linear = layers(mlp, nn.Linear)
    sizes = (3, *hidden, 2)
    assert [tuple(layer.weight.shape) for layer in linear] == [(b, a) for a, b in pairwise(sizes)]
    h = x
    for layer in linear[:-1]:
        h = BY_HAND[activation](h @ layer.weight.T + layer.bias)
    assert_same(mlp(x), h @ linear[-1].weight.T + linear[-1].bias)


def test_mlp_has_the_documented_defaults():
    mlp = MLP(3, 2)
    assert [layer.out_features for layer in layers(mlp, nn.Linear)] == [200, 200, 2]
    assert len(layers(mlp, nn.Tanh)) == 2


@pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3), (2, 5, 3), (4, 1, 2, 3)])
def test_mlp_treats_leading_dimensions_one_by_one(shape):
    mlp, x = drawn(MLP(3, 2, (4,))), normal(*shape)
    one_by_one = [mlp(row) for row in x.reshape(-1, 3)]
    expected = torch.stack(one_by_one) if one_by_one else x.new_zeros(0, 2)
    assert_same(mlp(x), expected.reshape(*shape[:-1], 2))


@pytest.mark.parametrize("image", IMAGES)
def test_conv_encoder_is_patches_times_matrices(image):
    net, x = drawn(ConvEncoder(image, 6, (4, 5))), normal(3, math.prod(image))
    a, (height, width) = x.reshape(3, *image), image[1:]
    for conv in layers(net, nn.Conv2d):
        patches = F.unfold(a, 4, stride=2, padding=1)
        height, width = height // 2, width // 2
        a = conv.weight.flatten(1) @ patches + conv.bias.unsqueeze(-1)
        a = BY_HAND["relu"](a).reshape(3, -1, height, width)
    (last,) = layers(net, nn.Linear)
    assert_same(net(x), a.flatten(1) @ last.weight.T + last.bias)


@pytest.mark.parametrize("image", IMAGES)
def test_conv_decoder_is_a_matrix_then_adjoints_of_the_encoders_convolutions(image):
    net, z = drawn(ConvDecoder(6, image, (4, 5))), normal(3, 6)
    (_, height, width), (first,) = image, layers(net, nn.Linear)
    a = (z @ first.weight.T + first.bias).reshape(3, 5, height // 4, width // 4)
    targets = [(height // 2, width // 2), (height, width)]
    for conv, size in zip(layers(net, nn.ConvTranspose2d), targets, strict=True):

        def encoders(image, weight=conv.weight):
            return F.conv2d(image, weight, stride=2, padding=1)

        zeros = torch.zeros(3, conv.weight.shape[1], *size, dtype=torch.float64)
        _, adjoint = torch.autograd.functional.vjp(encoders, zeros, BY_HAND["relu"](a))
        a = adjoint + conv.bias[:, None, None]
    assert_same(net(z), a.flatten(1))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 2)])
def test_conv_leading_dimensions_equal_flat(image, leading):
    size = math.prod(image)
    encoder, decoder = drawn(ConvEncoder(image, 6, (4, 5))), drawn(ConvDecoder(6, image, (4, 5)))
    x, z = normal(*leading, size), normal(*leading, 6)
    assert_same(encoder(x), encoder(x.reshape(-1, size)).reshape(*leading, 6))
    assert_same(decoder(z), decoder(z.reshape(-1, 6)).reshape(*leading, size))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("channels", [(), (3,), (32, 64)])
def test_conv_gives_vectors_of_the_documented_size(image, channels):
    size = math.prod(image)
    assert ConvEncoder(image, 40, channels)(torch.zeros(2, size)).shape == (2, 40)
    assert ConvDecoder(20, image, channels)(torch.zeros(2, 20)).shape == (2, size)


@pytest.mark.parametrize("image", IMAGES)
def test_every_parameter_receives_gradient(image):
    size = math.prod(image)
    nets = [MLP(size, 4), ConvEncoder(image, 4), ConvDecoder(4, image)]
    for net, in_dim in zip(nets, (size, size, 4), strict=True):
        net.double()(normal(9, in_dim)).square().sum().backward()
        without = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert not without, type(net).__name__


def fan_in_plus_fan_out(layer: nn.Module) -> int:
    outs, ins, *kernel = layer.weight.shape
    return (outs + ins) * math.prod(kernel)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(300, 40, (200,)),
        lambda: ConvEncoder((1, 28, 28), 40, (16, 32)),
        lambda: ConvDecoder(20, (1, 28, 28), (16, 32)),
    ],
    ids=["MLP", "ConvEncoder", "ConvDecoder"],
)
def test_glorot_uniform_weights_and_zero_biases(make):
    found = layers(make(), nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    assert len(found) >= 2
    for layer in found:
        u = layer.weight.double() / math.sqrt(6 / fan_in_plus_fan_out(layer))  # uniform on (-1, 1)
        assert u.abs().max() <= 1 + 1e-6
        # mean and mean square of that uniform: 0 and 1/3, with variances 1/3 and 4/45
        assert abs(u.mean()) < 5 * math.sqrt(1 / 3 / u.numel()), f"{layer}, seed 0"
        assert abs((u**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / u.numel()), f"{layer}, seed 0"
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0, 2), "in_dim .* got 0"),
        (lambda: MLP(2.0, 2), r"in_dim .* got 2\.0"),
        (lambda: MLP(True, 2), "in_dim .* got True"),
        (lambda: MLP(3, -1), "out_dim .* got -1"),
        (lambda: MLP(3, 2, (4, 0)), r"hidden\[1\] .* got 0"),
        (lambda: MLP(3, 2, (4,), "swish"), "activation .*silu; got 'swish'"),
        (lambda: MLP(3, 2, (), "swish"), "activation .*silu; got 'swish'"),
        (lambda: ConvEncoder((28, 28), 3), r"image_shape .*channels, height, width.* got \(28, 28\)"),
        (lambda: ConvEncoder((1, 28, 0), 3), r"image_shape\[2\] .* got 0"),
        (lambda: ConvEncoder((1, 3, 28), 3), r"image_shape .*2 halvings.* got \(1, 3, 28\)"),
        (lambda: ConvEncoder((1, 28, 28), 3, (4, 0)), r"channels\[1\] .* got 0"),
        (lambda: ConvEncoder((1, 28, 28), 0), "out_dim .* got 0"),
        (lambda: ConvEncoder((1, 28, 28), 3, activation="swish"), "activation .* got 'swish'"),
        (lambda: ConvDecoder(0, (1, 28, 28)), "in_dim .* got 0"),
        (lambda: ConvDecoder(3, (1, 28)), r"image_shape .* got \(1, 28\)"),
        (lambda: ConvDecoder(3, (1, 7, 7), (4, 4, 4)), r"image_shape .*3 halvings.* got \(1, 7, 7\)"),
        (lambda: ConvDecoder(3, (1, 28, 28), activation="swish"), "activation .* got 'swish'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        make()


@pytest.mark.parametrize(
    ("net", "shape", "expected"),
    [
        (MLP(3, 2), (5, 4), r"\(\*, 3\); got \(5, 4\)"),
        (MLP(3, 2), (), r"\(\*, 3\); got \(\)"),
        (ConvEncoder((1, 8, 8), 2), (5, 8, 8), r"\(\*, 64\); got \(5, 8, 8\)"),
        (ConvDecoder(2, (1, 8, 8)), (5, 64), r"\(\*, 2\); got \(5, 64\)"),
    ],
)
def test_wrong_input_is_told(net, shape, expected):
    with pytest.raises(ValueError, match=f"input .*{expected}"):
        net(torch.zeros(shape))


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_without_a_constant_in_the_output(hidden):
    net = MLP(5, 2, hidden, out_bias=False)
    assert [name for name, _ in net.named_parameters()][-1].endswith("weight")
    x = torch.randn(3, 5)
    torch.testing.assert_close(net.joined(x[:, :2], x[:, 2:]), net(x))
    assert MLP(5, 2, hidden, out_bias=False)(torch.zeros(5)).abs().max() == 0
