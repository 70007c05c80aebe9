"""One small, named constructor for every public Conditional and model: contract tests run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae import VAE, ConvDecoder, ConvEncoder, LatentModel, LinearGaussian, SemiSupervisedVAE
from pyrovae.conditionals import (
    Bernoulli,
    Conditional,
    DiagonalNormal,
    FullNormal,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveFlow,
    NeuralSplineFlow,
    OneHotCategorical,
    PlanarFlow,
    RealNVP,
    StandardNormal,
    UnitNormal,
)

CONDITIONALS: dict[str, Callable[[], Conditional]] = {
    "StandardNormal": lambda: StandardNormal(3),
    "DiagonalNormal": lambda: DiagonalNormal.mlp(4, 3, hidden=(5,)),
    "UnitNormal": lambda: UnitNormal.mlp(4, 3, hidden=(5,)),
    "FullNormal": lambda: FullNormal.mlp(4, 3, hidden=(5,)),
    "Bernoulli": lambda: Bernoulli.mlp(4, 3, hidden=(5,)),
    "OneHotCategorical": lambda: OneHotCategorical.mlp(4, 3, hidden=(5,)),
    "OneHotCategorical uniform": lambda: OneHotCategorical.uniform(3),
}
# small ones, and their options
FLOWS = {
    InverseAutoregressiveFlow: {"steps": 2, "step_hidden": (6,)},
    MaskedAutoregressiveFlow: {"steps": 2, "step_hidden": (6,)},
    RealNVP: {"steps": 2, "step_hidden": (6,)},
    NeuralSplineFlow: {"steps": 2, "step_hidden": (6,), "bins": 4},
    PlanarFlow: {"steps": 2},
    HouseholderFlow: {"steps": 2},
}
CONDITIONALS |= {
    name: make
    for flow, options in FLOWS.items()
    for name, make in {
        flow.__name__: lambda flow=flow, options=options: flow.mlp(4, 3, hidden=(5,), **options),
        f"{flow.__name__} root": lambda flow=flow, options=options: flow.root(3, **options),
    }.items()
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


def _flow_vae(flow: type[Conditional], posterior: bool) -> Entry:
    options = FLOWS[flow]

    def make() -> LatentModel:
        prior = StandardNormal(3) if posterior else flow.root(3, **options)
        q = flow.mlp(6, 3, (8,), **options) if posterior else DiagonalNormal.mlp(6, 3, (8,))
        return VAE(prior, Bernoulli.mlp(3, 6, (7,)), q)

    return Entry(make, 6, True)


PROGRAMS |= {f"VAE {flow.__name__}": _flow_vae(flow, posterior=True) for flow in FLOWS}
PROGRAMS |= {
    f"VAE {flow.__name__} prior": _flow_vae(flow, posterior=False)
    for flow in (InverseAutoregressiveFlow, MaskedAutoregressiveFlow, RealNVP, NeuralSplineFlow)
}


def _m2(posterior: type[Conditional], likelihood: type[Conditional], factorized: bool) -> Entry:
    make = lambda: SemiSupervisedVAE.mlp(  # noqa: E731
        6, 3, 2, (8,), likelihood=likelihood, posterior=posterior, factorized=factorized
    )
    return Entry(make, 6, likelihood is Bernoulli)


# three classes, which some of the data show
LABELED: dict[str, Entry] = {
    "M2": _m2(DiagonalNormal, Bernoulli, False),
    "M2 factorized": _m2(DiagonalNormal, Bernoulli, True),
    "M2 FullNormal": _m2(FullNormal, UnitNormal, False),
    "M2 factorized UnitNormal": _m2(UnitNormal, DiagonalNormal, True),
}
