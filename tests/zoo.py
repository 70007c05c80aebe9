"""One small, named constructor for every public Conditional and model: contract tests run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae import VAE, ConvDecoder, ConvEncoder, LatentModel, LinearGaussian
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, FullNormal, StandardNormal, UnitNormal

CONDITIONALS: dict[str, Callable[[], Conditional]] = {
    "StandardNormal": lambda: StandardNormal(3),
    "DiagonalNormal": lambda: DiagonalNormal.mlp(4, 3, hidden=(5,)),
    "UnitNormal": lambda: UnitNormal.mlp(4, 3, hidden=(5,)),
    "FullNormal": lambda: FullNormal.mlp(4, 3, hidden=(5,)),
    "Bernoulli": lambda: Bernoulli.mlp(4, 3, hidden=(5,)),
}
POSTERIORS = (DiagonalNormal, UnitNormal, FullNormal)
LIKELIHOODS = (Bernoulli, UnitNormal, DiagonalNormal, FullNormal)


@dataclass(frozen=True)
class Entry:
    """A program and the kind of data that it takes, N x X."""

    make: Callable[[], LatentModel]
    x_dim: int
    binary: bool

    def data(self, n: int, seed: int = 0) -> Tensor:
        x = torch.randn(n, self.x_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return ((x > 0).double() if self.binary else x).to(torch.get_default_dtype())


def _vae(posterior: type[Conditional], likelihood: type[Conditional]) -> Entry:
    make = lambda: VAE.mlp(6, 3, (8, 7), likelihood=likelihood, posterior=posterior)  # noqa: E731
    return Entry(make, 6, likelihood is Bernoulli)


PROGRAMS: dict[str, Entry] = {
    f"VAE {posterior.__name__} {likelihood.__name__}": _vae(posterior, likelihood)
    for posterior in POSTERIORS
    for likelihood in LIKELIHOODS
} | {
    "VAE convolutional": Entry(
        lambda: VAE(
            StandardNormal(3),
            Bernoulli(ConvDecoder(3, (1, 6, 5), channels=(2,))),
            DiagonalNormal(ConvEncoder((1, 6, 5), 6, channels=(2,))),
        ),
        30,
        True,
    ),
    "LinearGaussian exact": Entry(lambda: LinearGaussian(4, 2), 4, False),
    "LinearGaussian amortized": Entry(lambda: LinearGaussian(4, 2, DiagonalNormal.mlp(4, 2, hidden=())), 4, False),
}
