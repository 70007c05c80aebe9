"""One small, named constructor for every public Conditional and model: contract tests run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae import (
    DRAW,
    VAE,
    AuxiliaryVAE,
    ConditionalVAE,
    ConvDecoder,
    ConvEncoder,
    DeepMarkovModel,
    GaussianMixture,
    GaussianMixtureVAE,
    HiddenMarkovModel,
    HierarchicalVAE,
    LatentModel,
    LinearGaussian,
    LinearGaussianStateSpace,
    SemiSupervisedVAE,
)
from pyrovae.conditionals import (
    AutoregressivePrior,
    Bernoulli,
    Categorical,
    Conditional,
    ContinuousBernoulli,
    DiagonalNormal,
    DiscretizedLogisticMixture,
    EnergyPrior,
    FloorNormal,
    FullNormal,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveFlow,
    MixtureOfNormals,
    NeuralSplineFlow,
    OneHotCategorical,
    PixelCNN,
    PlanarFlow,
    RealNVP,
    RecurrentPosterior,
    StandardNormal,
    UnitNormal,
    VampPrior,
)
from pyrovae.models.hierarchical import GuideKind
from pyrovae.nets import BackwardRNN

CONDITIONALS: dict[str, Callable[[], Conditional]] = {
    "StandardNormal": lambda: StandardNormal(3),
    "DiagonalNormal": lambda: DiagonalNormal.mlp(4, 3, hidden=(5,)),
    "UnitNormal": lambda: UnitNormal.mlp(4, 3, hidden=(5,)),
    "FullNormal": lambda: FullNormal.mlp(4, 3, hidden=(5,)),
    "Bernoulli": lambda: Bernoulli.mlp(4, 3, hidden=(5,)),
    "OneHotCategorical": lambda: OneHotCategorical.mlp(4, 3, hidden=(5,)),
    "OneHotCategorical uniform": lambda: OneHotCategorical.uniform(3),
    "MixtureOfNormals": lambda: MixtureOfNormals(3, 4),
    "VampPrior": lambda: VampPrior(DiagonalNormal.mlp(4, 3, hidden=(5,)), 4, num_components=2),
    "AutoregressivePrior": lambda: AutoregressivePrior(3, hidden=(5,)),
    "EnergyPrior": lambda: EnergyPrior.mlp(0, 3, hidden=(5,), num_samples=20, num_candidates=10),
    "FloorNormal": lambda: FloorNormal.mlp(4, 3, hidden=(5,)),
    "Categorical": lambda: Categorical.mlp(4, 3, hidden=(5,), num_classes=4),
    "ContinuousBernoulli": lambda: ContinuousBernoulli.mlp(4, 3, hidden=(5,)),
    "DiscretizedLogisticMixture": lambda: DiscretizedLogisticMixture.mlp(4, 3, hidden=(5,), num_components=2),
    "PixelCNN": lambda: PixelCNN.mlp(4, 12, hidden=(5,), image_shape=(2, 2, 3), channels=2, num_layers=1),
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
    values: Callable[[Tensor], Tensor] | None = None  # of data from N(0, I), where they are neither these nor binary
    c_dim: int = 0  # of a condition c beside x
    num_steps: int = 0  # of the longest sequence, where data are sequences
    reparameterized: bool = True

    def data(self, n: int, seed: int = 0) -> Tensor:
        shape = (n, self.num_steps, self.x_dim) if self.num_steps else (n, self.x_dim)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.values is not None:
            x = self.values(x)
        return ((x > 0).double() if self.binary else x).to(torch.get_default_dtype())

    def batch(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """All arguments of model and guide: x, and a condition where the program has one."""
        batch = {"x": self.data(n, seed)}
        if self.c_dim:
            batch["c"] = torch.randn(n, self.c_dim, generator=torch.Generator().manual_seed(1000 + seed))
        if self.num_steps:
            lengths = torch.randint(1, self.num_steps + 1, (n,), generator=torch.Generator().manual_seed(seed))
            batch["lengths"] = lengths.index_fill(0, torch.tensor(0), self.num_steps)
        return batch


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


def _with_prior(prior: Callable[[Conditional], Conditional], family: type[Conditional] = DiagonalNormal) -> Entry:
    def make() -> VAE:
        q = family.mlp(6, 3, (7,))
        return VAE(prior(q), Bernoulli.mlp(3, 6, (7,)), q)

    return Entry(make, 6, True)


PROGRAMS |= {f"VAE {flow.__name__}": _flow_vae(flow, posterior=True) for flow in FLOWS}
PROGRAMS |= {
    f"VAE {flow.__name__} prior": _flow_vae(flow, posterior=False)
    for flow in (InverseAutoregressiveFlow, MaskedAutoregressiveFlow, RealNVP, NeuralSplineFlow)
}


def _with_likelihood(likelihood: Callable[[], Conditional], values: Callable[[Tensor], Tensor] | None) -> Entry:
    make = lambda: VAE(StandardNormal(3), likelihood(), DiagonalNormal.mlp(6, 3, (7,)))  # noqa: E731
    return Entry(make, 6, False, values)


PROGRAMS |= {
    "VAE prior MixtureOfNormals": _with_prior(lambda q: MixtureOfNormals(3, 4)),
    "VAE prior VampPrior": _with_prior(lambda q: VampPrior(q, 6, num_components=4)),
    "VAE prior VampPrior FullNormal": _with_prior(lambda q: VampPrior(q, 6, 4, unit_interval=False), FullNormal),
    "VAE prior AutoregressivePrior": _with_prior(lambda q: AutoregressivePrior(3, (5,))),
    "VAE prior EnergyPrior": _with_prior(lambda q: EnergyPrior.mlp(0, 3, (5,), num_samples=50, num_candidates=10)),
    "VAE FloorNormal": _with_likelihood(lambda: FloorNormal.mlp(3, 6, (7,), floor=0.1), None),
    "VAE Categorical": _with_likelihood(
        lambda: Categorical.mlp(3, 6, (7,), num_classes=4), lambda x: (2 + x).round().clamp(0, 3)
    ),
    "VAE ContinuousBernoulli": _with_likelihood(lambda: ContinuousBernoulli.mlp(3, 6, (7,)), torch.sigmoid),
    "VAE DiscretizedLogisticMixture": _with_likelihood(
        lambda: DiscretizedLogisticMixture.mlp(3, 6, (7,), num_components=3),
        lambda x: (x.sigmoid() * 255).round() / 255,
    ),
    "VAE PixelCNN": _with_likelihood(
        lambda: PixelCNN.mlp(3, 6, (7,), image_shape=(1, 2, 3), channels=3, num_layers=1, kernel_size=3),
        lambda x: (x > 0).double(),
    ),
}


PROGRAMS["DRAW"] = Entry(lambda: DRAW((1, 3, 2), z_dim=2, num_glimpses=2, hidden=5, read_size=2, write_size=3), 6, True)
PROGRAMS["AuxiliaryVAE"] = Entry(lambda: AuxiliaryVAE.mlp(6, 3, (7,), a_dim=2), 6, True)


def _hierarchy(guide_kind: GuideKind, z_dims: tuple[int, ...], likelihood: type[Conditional] = Bernoulli) -> Entry:
    hidden = [(7,)] * len(z_dims)
    make = lambda: HierarchicalVAE.mlp(6, z_dims, hidden, guide_kind=guide_kind, likelihood=likelihood)  # noqa: E731
    return Entry(make, 6, likelihood is Bernoulli)


PROGRAMS |= {
    "HierarchicalVAE bottom-up": _hierarchy("bottom-up", (3, 2)),
    "HierarchicalVAE top-down": _hierarchy("top-down", (3, 2)),
    "HierarchicalVAE ladder": _hierarchy("ladder", (3, 2)),
    "HierarchicalVAE ladder of three": _hierarchy("ladder", (4, 3, 2), DiagonalNormal),
    "ConditionalVAE": Entry(lambda: ConditionalVAE.mlp(6, 4, 3, (7,)), 6, True, c_dim=4),
}


def _markov(make: Callable[[], LatentModel], binary: bool = False, **about: bool) -> Entry:
    return Entry(make, 3, binary, num_steps=5, **about)


def _recurrent(step: Conditional) -> RecurrentPosterior:
    return RecurrentPosterior(BackwardRNN(3, 4, "tanh"), step, 2)


PROGRAMS |= {
    "DeepMarkovModel": _markov(lambda: DeepMarkovModel.mlp(3, 5, (5,), transition_dim=6, rnn_dim=4), True),
    "DeepMarkovModel gru": _markov(
        lambda: DeepMarkovModel.mlp(
            3, 5, (5,), transition_dim=6, rnn_dim=4, cell="gru", likelihood=DiagonalNormal, posterior=FullNormal
        )
    ),
    "DeepMarkovModel IAF": _markov(
        lambda: DeepMarkovModel.mlp(
            3, 5, (5,), transition_dim=6, rnn_dim=4, posterior=InverseAutoregressiveFlow, steps=2, step_hidden=(6,)
        ),
        True,
    ),
    "LinearGaussianStateSpace": _markov(lambda: LinearGaussianStateSpace(3, 2)),
    "LinearGaussianStateSpace recurrent": _markov(
        lambda: LinearGaussianStateSpace(3, 2, _recurrent(DiagonalNormal.mlp(6, 2, ())))
    ),
    "HiddenMarkovModel": _markov(lambda: HiddenMarkovModel.linear(3, 4, DiagonalNormal), reparameterized=False),
}


def _m2(posterior: type[Conditional], likelihood: type[Conditional], factorized: bool) -> Entry:
    make = lambda: SemiSupervisedVAE.mlp(  # noqa: E731
        6, 3, 2, (8,), likelihood=likelihood, posterior=posterior, factorized=factorized
    )
    return Entry(make, 6, likelihood is Bernoulli)


# three classes, which some of the data show
M2: dict[str, Entry] = {
    "M2": _m2(DiagonalNormal, Bernoulli, False),
    "M2 factorized": _m2(DiagonalNormal, Bernoulli, True),
    "M2 FullNormal": _m2(FullNormal, UnitNormal, False),
    "M2 factorized UnitNormal": _m2(UnitNormal, DiagonalNormal, True),
}
CLUSTERS: dict[str, Entry] = {
    "GaussianMixture diagonal": Entry(lambda: GaussianMixture(6, 3, "diagonal"), 6, False),
    "GaussianMixture full": Entry(lambda: GaussianMixture(6, 3), 6, False),
    "GaussianMixtureVAE": Entry(lambda: GaussianMixtureVAE.mlp(6, 3, 2, (8,)), 6, True),
    "GaussianMixtureVAE full": Entry(
        lambda: GaussianMixtureVAE.mlp(6, 3, 2, (8,), likelihood=UnitNormal, posterior=FullNormal, covariance="full"),
        6,
        False,
    ),
}
LABELED = M2 | CLUSTERS
