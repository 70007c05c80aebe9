"""What the command line's options mean: the program at its first weights, and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyrovae import conditionals, models, sources
from pyrovae import data as data_sets
from pyrovae.bounds import IWAE_ELBO, STL_ELBO
from pyrovae.fit import fit
from pyrovae.options import Train
from pyrovae.program import LatentModel
from pyrovae.quadrants import quadrant
from pyrovae.schedules import Linear
from pyrovae.sequences import trim

if TYPE_CHECKING:
    from torch import Tensor

LIKELIHOODS = {
    "bernoulli": conditionals.Bernoulli,
    "unit-normal": conditionals.UnitNormal,
    "normal": conditionals.DiagonalNormal,
    "floor-normal": conditionals.FloorNormal,
    "continuous": conditionals.ContinuousBernoulli,
    "logistics": conditionals.DiscretizedLogisticMixture,
}
POSTERIORS = {
    "diagonal": conditionals.DiagonalNormal,
    "full": conditionals.FullNormal,
    "iaf": conditionals.InverseAutoregressiveFlow,
    "planar": conditionals.PlanarFlow,
    "householder": conditionals.HouseholderFlow,
    "spline": conditionals.NeuralSplineFlow,
}
PRIORS: dict[str, Callable[[int], conditionals.Conditional]] = {
    "standard": conditionals.StandardNormal,
    "mixture": conditionals.MixtureOfNormals,
    "real-nvp": conditionals.RealNVP.root,
    "maf": conditionals.MaskedAutoregressiveFlow.root,
    "autoregressive": conditionals.AutoregressivePrior,
}
_OF_VECTORS = ("vae", "auxiliary", "m2", "mixture-vae", "conditional")  # one layer of latents for one vector
# options that a model has beside those of all, with the value that stands for "not asked for"
OWN = {
    "likelihood": ("bernoulli", (*_OF_VECTORS, "hierarchical", "deep-markov", "hidden-markov")),
    "posterior": ("diagonal", (*_OF_VECTORS, "deep-markov")),
    "prior": ("standard", ("vae", "auxiliary", "m2")),
    "bound": ("elbo", ("vae", "auxiliary", "hierarchical", "conditional", "linear-gaussian", "deep-markov", "draw")),
    "free_bits": (None, ("vae", "auxiliary", "hierarchical", "conditional", "linear-gaussian", "draw")),
    "z_dim": (20, (*_OF_VECTORS, "linear-gaussian", "draw", "deep-markov", "linear-state-space")),
    "hidden": ((200, 200), (*_OF_VECTORS, "hierarchical", "deep-markov")),
    "rnn": (200, ("deep-markov",)),
    "states": (10, ("hidden-markov",)),
    "guide": ("bottom-up", ("hierarchical",)),
    "layers": ((20, 10), ("hierarchical",)),
    "clusters": (10, ("mixture", "mixture-vae")),
    "covariance": ("diagonal", ("mixture", "mixture-vae")),
    "pretrain": (50, ("mixture-vae",)),
    "given": ("class", ("conditional",)),
    "glimpses": (10, ("draw",)),
    "units": (256, ("draw",)),
    "read_size": (2, ("draw",)),
    "write_size": (5, ("draw",)),
    "labels": (100, ("m2",)),
    "supervised_weight": (None, ("m2",)),
}
REAL = ("linear-gaussian", "mixture", "linear-state-space")  # models of real values
SEQUENTIAL = ("deep-markov", "linear-state-space", "hidden-markov")  # models of sequences
BINARY = ("binarized-mnist", "jsb-chorales")  # data that are so already


def check_options(command: Train) -> None:
    """Raises ValueError for options that the model does not have, or that are not positive."""
    for name, (default, owners) in OWN.items():
        value = getattr(command, name)
        if not has(command, name) and value != default:
            raise ValueError(
                f"Expected --{name.replace('_', '-')} with --model {' or '.join(owners)} alone; "
                f"got {value} with --model {command.model}"
            )
    sizes = "z_dim", "hidden", "layers", "clusters", "pretrain", "num_particles", "labels"
    for name in (*sizes, "glimpses", "units", "read_size", "write_size", "rnn", "states"):
        value = getattr(command, name)
        smallest = min(value, default=1) if isinstance(value, tuple) else value
        if smallest < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be positive; got {smallest}")


def has(command: Train, option: str) -> bool:
    """Whether the model has this option."""
    return command.model in OWN[option][1]


def load_splits(command: Train) -> data_sets.Splits:
    """The data set, binarized as the likelihood needs it."""
    binarize = command.binarize
    if binarize == "auto":
        grey = command.likelihood == "bernoulli" and command.data not in BINARY and command.model not in REAL
        binarize = "dynamic" if grey else "none"
    needs_labels = command.model == "m2" or (command.model == "conditional" and command.given == "class")
    splits = data_sets.load(
        command.data, binarize, labels=needs_labels or command.data in sources.LABELLED, seed=command.seed
    )
    if ("lengths" in splits.train.tensors) != (command.model in SEQUENTIAL):
        kind = "sequences, as jsb-chorales," if command.model in SEQUENTIAL else "single data, no sequences,"
        raise ValueError(f"Expected --data of {kind} with --model {command.model}; got {command.data}")
    return splits


def of_part(command: Train, splits: data_sets.Splits, part: str) -> data_sets.Data:
    """One part of the data, as the program takes it when it is measured: without labels, with its conditions."""
    data = getattr(splits, part)
    if command.model in SEQUENTIAL:
        return data.select("x", "lengths")
    if command.model != "conditional":
        return data.select("x")
    if command.given != "class":
        return quadrant(data.select("x"), splits.shape, command.given)
    classes = conditionals.one_hot(data["y"], num_classes(splits)).to(data["x"].dtype)
    return data_sets.Data({"x": data["x"], "c": classes}, dynamic=data.dynamic)


def shown(data: data_sets.Data) -> data_sets.Batch:
    """All of the data as they are shown once."""
    return next(data.batches(len(data)))


def num_classes(splits: data_sets.Splits) -> int:
    """How many classes the training data show."""
    return int(splits.train["y"].max()) + 1


def program_of(command: Train, splits: data_sets.Splits) -> tuple[LatentModel, dict[str, Any]]:
    """The program at its first weights, and the data that `fit` takes for it."""
    import torch

    torch.manual_seed(command.seed)
    data = {part: of_part(command, splits, part) for part in ("train", "val")}
    train = data["train"]
    program = _MODELS[command.model](command, splits, (train if train.show is None else shown(train))["x"])
    if command.model == "m2":
        labeled, train = data_sets.split_labels(splits.train, command.labels // num_classes(splits), command.seed)
        data = {"train": train, "val": splits.val, "labeled": labeled}
        return program, data | {"supervised_weight": command.supervised_weight}
    if command.model in SEQUENTIAL and not command.compile:
        data["train"] = data_sets.Data(train.tensors, dynamic=train.dynamic, show=trim, check=False)
    return program, data


def _families(command: Train) -> dict[str, Any]:
    return {"likelihood": LIKELIHOODS[command.likelihood], "posterior": POSTERIORS[command.posterior]}


def _with_prior(program: Any, command: Train, x: Tensor) -> Any:
    program.likelihood.start_at(x.mean(0))
    if command.prior != "vamp":
        program.prior = PRIORS[command.prior](command.z_dim)
        return program
    if command.model != "vae":
        raise ValueError(f"Expected another --prior with --model {command.model}, whose q is not q(z | x); got vamp")
    import torch

    x = x[torch.randperm(len(x))[:500]]
    unit_interval = bool(((x >= 0) & (x <= 1)).all())
    program.prior = conditionals.VampPrior(program.posterior, x.shape[1], len(x), unit_interval).start_from(x)
    return program


def _vae(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    program = models.VAE.mlp(x.shape[1], command.z_dim, command.hidden, **_families(command))
    return _with_prior(program, command, x)


def _auxiliary(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    program = models.AuxiliaryVAE.mlp(x.shape[1], command.z_dim, command.hidden, **_families(command))
    return _with_prior(program, command, x)


def _m2(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    sizes = x.shape[1], num_classes(splits), command.z_dim, command.hidden
    return _with_prior(models.SemiSupervisedVAE.mlp(*sizes, **_families(command)), command, x)


def _linear_gaussian(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    return models.LinearGaussian(x.shape[1], command.z_dim)


def _mixture(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    return models.GaussianMixture(x.shape[1], command.clusters, command.covariance).start_from(x, command.seed)


def _mixture_vae(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    """Its networks are those of a VAE that is trained first, and its clusters those of the VAE's latents."""
    vae = models.VAE.mlp(x.shape[1], command.z_dim, command.hidden, **_families(command))
    vae.likelihood.start_at(x.mean(0))
    program = models.GaussianMixtureVAE(
        vae.likelihood, vae.posterior, command.z_dim, command.clusters, command.covariance
    )
    if not command.resume:
        names = "batch_size", "lr", "device", "grad_clip", "precision", "compile", "seed"
        settings = {name: getattr(command, name) for name in names}
        print(f"a VAE first, for {command.pretrain} epochs")
        train = of_part(command, splits, "train")
        fit(vae, train, epochs=command.pretrain, **settings)
        program.start_from(train, command.seed)
    return program


def _hierarchical(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    program = models.HierarchicalVAE.mlp(
        x.shape[1],
        command.layers,
        [command.hidden] * len(command.layers),
        guide_kind=command.guide,
        likelihood=LIKELIHOODS[command.likelihood],
    )
    program.likelihood.start_at(x.mean(0))
    return program


def _conditional(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    sizes = x.shape[1], shown(of_part(command, splits, "train"))["c"].shape[1], command.z_dim, command.hidden
    program = models.ConditionalVAE.mlp(*sizes, **_families(command))
    program.likelihood.start_at(x.mean(0))
    return program


def _deep_markov(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    program = models.DeepMarkovModel.mlp(
        x.shape[-1], command.z_dim, command.hidden, rnn_dim=command.rnn, cell="gru", **_families(command)
    )
    program.likelihood.start_at(_mean_step(splits))
    return program


def _linear_state_space(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    return models.LinearGaussianStateSpace(x.shape[-1], command.z_dim)


def _hidden_markov(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    program = models.HiddenMarkovModel.linear(x.shape[-1], command.states, LIKELIHOODS[command.likelihood])
    program.likelihood.start_at(_mean_step(splits))
    return program


def _mean_step(splits: data_sets.Splits) -> Tensor:
    """The mean of all steps of all training sequences."""
    return splits.train["x"].sum((0, 1)) / splits.train["lengths"].sum()


def _draw(command: Train, splits: data_sets.Splits, x: Tensor) -> LatentModel:
    sizes = command.z_dim, command.glimpses, command.units, command.read_size, command.write_size
    return models.DRAW(splits.shape, *sizes).start_at(x.mean(0))


_MODELS: dict[str, Callable[[Train, data_sets.Splits, Any], LatentModel]] = {
    "vae": _vae,
    "auxiliary": _auxiliary,
    "m2": _m2,
    "linear-gaussian": _linear_gaussian,
    "mixture": _mixture,
    "mixture-vae": _mixture_vae,
    "hierarchical": _hierarchical,
    "conditional": _conditional,
    "deep-markov": _deep_markov,
    "linear-state-space": _linear_state_space,
    "hidden-markov": _hidden_markov,
    "draw": _draw,
}


def bound_of(command: Train, num_train: int) -> dict[str, Any]:
    """The bound, as arguments of `fit`."""
    if command.draws < 1 or command.kl_warmup < 0:
        raise ValueError(
            f"Expected --draws of at least 1 and --kl-warmup of at least 0; got {command.draws}, {command.kl_warmup}"
        )
    bounds = {
        "elbo": lambda: None,
        "iwae": lambda: IWAE_ELBO(command.draws),
        "dreg": lambda: IWAE_ELBO(command.draws, "dreg"),
        "stl": lambda: STL_ELBO(command.draws),
    }
    steps = command.kl_warmup * -(-num_train // command.batch_size)
    return {
        "elbo": bounds[command.bound](),
        "kl_weight": Linear(steps) if steps else 1.0,
        "free_bits": command.free_bits,
    }


def rate_of(command: Train) -> float | Callable[[int], float]:
    """The learning rate: a number, or falling geometrically from epoch to epoch."""
    first, last = command.lr, command.lr_final
    if last is None:
        return first
    if min(first, last) <= 0:
        raise ValueError(f"Expected --lr and --lr-final to be positive; got {first} and {last}")

    def geometric(epoch: int) -> float:
        return first * (last / first) ** ((epoch - 1) / max(1, command.epochs - 1))

    return geometric
