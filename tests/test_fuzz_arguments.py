"""Fuzzers: whatever is given as a setting, it is taken, or refused by a documented error that names it."""

import json
import math
import tempfile
from typing import Any

import pyro
import torch
import zoo
from hypothesis import strategies as st
from strategies import any_tensor, error_of, fresh, fuzz, quiet, state_kept, unchanged, wrong, wrong_seed

import pyrovae
from pyrovae import (
    DRAW,
    IWAE_ELBO,
    MLP,
    STL_ELBO,
    VAE,
    AuxiliaryVAE,
    ConditionalVAE,
    Constant,
    ConvDecoder,
    ConvEncoder,
    Cyclical,
    DeepMarkovModel,
    FreeBits_ELBO,
    GaussianMixture,
    GaussianMixtureVAE,
    HiddenMarkovModel,
    HierarchicalVAE,
    Linear,
    LinearGaussian,
    LinearGaussianStateSpace,
    LocalGuide,
    SemiSupervisedVAE,
    WakeSleep_ELBO,
    agreement,
    as_program,
    checkpoint,
    classify,
    compare,
    evaluate,
    fit,
    fit_guide,
    fit_map,
    log_weights,
    mcmc_em,
    music,
    plots,
    posterior_draws,
    variational_em,
)
from pyrovae import conditionals as c
from pyrovae.nets import BackwardRNN, Combiner, GatedTransition, MaskedMLP
from pyrovae.weights import WeightSums

PRIOR, LIKELIHOOD = c.StandardNormal(3), c.Bernoulli.mlp(3, 6, (4,))
POSTERIOR = c.DiagonalNormal.mlp(6, 3, (4,))
X = (torch.arange(30.0).reshape(5, 6) % 4 > 1).float()


def _ones(lengths: int = 3) -> torch.Tensor:
    return torch.ones(lengths, 4)


# Every public constructor, with arguments that it takes.
CONSTRUCTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MLP": (MLP, {"in_dim": 4, "out_dim": 3, "hidden": (5,), "activation": "tanh"}),
    "MaskedMLP": (MaskedMLP, {"dim": 3, "outputs": 2, "hidden": (5,), "context_dim": 2, "activation": "relu"}),
    "Constant": (Constant, {"out_dim": 3}),
    "ConvEncoder": (ConvEncoder, {"image_shape": (1, 6, 5), "out_dim": 3, "channels": (2,), "activation": "relu"}),
    "ConvDecoder": (ConvDecoder, {"in_dim": 3, "image_shape": (1, 6, 5), "channels": (2,), "activation": "relu"}),
    "GatedTransition": (GatedTransition, {"z_dim": 3, "hidden": 4}),
    "Combiner": (Combiner, {"z_dim": 3, "hidden": 4, "out_dim": 6}),
    "BackwardRNN": (BackwardRNN, {"x_dim": 3, "hidden": 4, "cell": "relu"}),
    "Linear": (Linear, {"steps": 5, "start": 0.0}),
    "Cyclical": (Cyclical, {"period": 5, "rising": 0.5}),
    "IWAE_ELBO": (IWAE_ELBO, {"num_particles": 2, "gradient": "dreg", "max_plate_nesting": 1}),
    "STL_ELBO": (STL_ELBO, {"num_particles": 2, "max_plate_nesting": math.inf}),
    "FreeBits_ELBO": (FreeBits_ELBO, {"nats": 0.5, "groups": 1, "num_particles": 2}),
    "WakeSleep_ELBO": (WakeSleep_ELBO, {"num_particles": 2, "phi": "wake"}),
    "WeightSums": (WeightSums, {"num_particles": 3}),
    "StandardNormal": (c.StandardNormal, {"dim": 3}),
    "uniform": (c.OneHotCategorical.uniform, {"dim": 3}),
    "Bernoulli": (c.Bernoulli, {"net": MLP(2, 3, ())}),
    "FloorNormal": (c.FloorNormal, {"net": MLP(2, 6, ()), "floor": 0.1}),
    "FloorNormal.mlp": (c.FloorNormal.mlp, {"parents_dim": 2, "dim": 3, "hidden": (4,), "floor": 0.1}),
    "Categorical": (c.Categorical, {"net": MLP(2, 12, ()), "num_classes": 4}),
    "Categorical.mlp": (c.Categorical.mlp, {"parents_dim": 2, "dim": 3, "hidden": (4,), "num_classes": 4}),
    "logistics": (c.DiscretizedLogisticMixture.mlp, {"parents_dim": 2, "dim": 3, "hidden": (4,), "num_components": 2}),
    "PixelCNN": (
        c.PixelCNN.mlp,
        {"parents_dim": 2, "dim": 6, "hidden": (4,), "image_shape": (1, 2, 3), "channels": 2, "num_layers": 1,
         "kernel_size": 3},
    ),
    "MixtureOfNormals": (c.MixtureOfNormals, {"dim": 3, "num_components": 2}),
    "VampPrior": (c.VampPrior, {"posterior": POSTERIOR, "x_dim": 6, "num_components": 2}),
    "AutoregressivePrior": (c.AutoregressivePrior, {"dim": 3, "hidden": (4,), "activation": "tanh"}),
    "EnergyPrior": (c.EnergyPrior, {"net": MLP(3, 1, ()), "dim": 3, "num_samples": 5, "num_candidates": 5}),
    "EnergyPrior.mlp": (c.EnergyPrior.mlp, {"parents_dim": 0, "dim": 3, "hidden": (4,), "num_samples": 5}),
    "RecurrentPosterior": (
        c.RecurrentPosterior,
        {"rnn": BackwardRNN(3, 4, "tanh"), "step": c.DiagonalNormal.mlp(6, 2, ()), "z_dim": 2},
    ),
    "VAE": (VAE, {"prior": PRIOR, "likelihood": LIKELIHOOD, "posterior": POSTERIOR}),
    "VAE.mlp": (
        VAE.mlp,
        {"x_dim": 6, "z_dim": 3, "hidden": (4,), "likelihood": c.Bernoulli, "posterior": c.DiagonalNormal,
         "activation": "tanh"},
    ),
    "LinearGaussian": (LinearGaussian, {"x_dim": 6, "z_dim": 2, "posterior": None}),
    "AuxiliaryVAE.mlp": (
        AuxiliaryVAE.mlp,
        {"x_dim": 6, "z_dim": 3, "hidden": (4,), "a_dim": 2, "likelihood": c.Bernoulli, "posterior": c.DiagonalNormal},
    ),
    "AuxiliaryVAE": (
        AuxiliaryVAE,
        {"prior": PRIOR, "likelihood": LIKELIHOOD, "posterior": c.DiagonalNormal.mlp(8, 3, ()),
         "auxiliary_posterior": c.DiagonalNormal.mlp(6, 2, ()), "auxiliary": c.DiagonalNormal.mlp(9, 2, ())},
    ),
    "ConditionalVAE.mlp": (
        ConditionalVAE.mlp, {"x_dim": 6, "c_dim": 2, "z_dim": 3, "hidden": (4,), "likelihood": c.Bernoulli}
    ),
    "ConditionalVAE": (
        ConditionalVAE, {"prior": PRIOR, "likelihood": LIKELIHOOD, "posterior": POSTERIOR, "c_dim": 2}
    ),
    "HierarchicalVAE": (
        HierarchicalVAE,
        {"priors": [PRIOR], "likelihood": LIKELIHOOD, "posteriors": [POSTERIOR], "guide_kind": "bottom-up"},
    ),
    "HierarchicalVAE.mlp": (
        HierarchicalVAE.mlp,
        {"x_dim": 6, "z_dims": (3, 2), "hidden": ((4,), (4,)), "guide_kind": "ladder", "likelihood": c.Bernoulli},
    ),
    "GaussianMixture": (GaussianMixture, {"x_dim": 3, "num_clusters": 2, "covariance": "full"}),
    "GaussianMixtureVAE": (
        GaussianMixtureVAE, {"likelihood": LIKELIHOOD, "posterior": POSTERIOR, "z_dim": 3, "num_clusters": 2}
    ),
    "GaussianMixtureVAE.mlp": (
        GaussianMixtureVAE.mlp, {"x_dim": 6, "num_clusters": 2, "z_dim": 3, "hidden": (4,), "covariance": "diagonal"}
    ),
    "SemiSupervisedVAE": (
        SemiSupervisedVAE,
        {"label_prior": c.OneHotCategorical.uniform(3), "prior": PRIOR, "likelihood": LIKELIHOOD,
         "classifier": c.OneHotCategorical.mlp(6, 3, ()), "posterior": POSTERIOR},
    ),
    "SemiSupervisedVAE.mlp": (SemiSupervisedVAE.mlp, {"x_dim": 6, "num_classes": 3, "z_dim": 2, "hidden": (4,)}),
    "DRAW": (
        DRAW,
        {"image_shape": (1, 3, 2), "z_dim": 2, "num_glimpses": 2, "hidden": 5, "read_size": 2, "write_size": 3},
    ),
    "DeepMarkovModel": (
        DeepMarkovModel,
        {"transition": c.DiagonalNormal.mlp(2, 2, ()), "likelihood": c.Bernoulli.mlp(2, 3, ()), "z_dim": 2,
         "posterior": c.RecurrentPosterior(BackwardRNN(3, 4, "tanh"), c.DiagonalNormal.mlp(6, 2, ()), 2)},
    ),
    "DeepMarkovModel.mlp": (
        DeepMarkovModel.mlp,
        {"x_dim": 3, "z_dim": 2, "hidden": (4,), "transition_dim": 3, "rnn_dim": 4, "cell": "gru"},
    ),
    "LinearGaussianStateSpace": (LinearGaussianStateSpace, {"x_dim": 3, "z_dim": 2, "posterior": None}),
    "HiddenMarkovModel": (HiddenMarkovModel, {"num_states": 3, "likelihood": c.Bernoulli.mlp(3, 4, ())}),
    "HiddenMarkovModel.linear": (HiddenMarkovModel.linear, {"x_dim": 3, "num_states": 2, "likelihood": c.Bernoulli}),
    "as_program": (as_program, {"model": len, "guide": len, "plate": "data", "params": None, "label": "y"}),
}  # fmt: skip
CONSTRUCTORS |= {
    flow.__name__: (flow.mlp, {"parents_dim": 2, "dim": 3, "hidden": (4,), **options})
    for flow, options in zoo.FLOWS.items()
} | {f"{flow.__name__}.root": (flow.root, {"dim": 3, **options}) for flow, options in zoo.FLOWS.items()}


FUNCTIONS = ("kl_weight", "lr", "local_lr", "optimizer", "model", "guide")


@st.composite
def changed(draw, table):
    """A function and its arguments, of which one or two are something else."""
    name = draw(st.sampled_from(sorted(table)))
    function, arguments = table[name]
    arguments = dict(arguments)
    for key in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2)):
        value = draw(wrong_seed if key == "seed" else wrong)
        if key not in FUNCTIONS or not callable(value):  # what a function of the caller's own raises is the caller's
            arguments[key] = value
    return name, function, arguments


@fuzz(400, 20000, case=changed(CONSTRUCTORS))
def test_constructors_take_arguments_or_refuse_them(case):
    """What is built tells its arguments, in JSON, so that it can be built again from a file."""
    _, function, arguments = case
    built = []
    with state_kept(seeded=False):
        error = error_of(lambda: built.append(function(**{key: fresh(value) for key, value in arguments.items()})))
    if error is None and isinstance(built[0], pyrovae.LatentModel):
        config = checkpoint.describe(built[0])
        assert config is None or json.loads(json.dumps(config)) == config


def _vae() -> VAE:
    torch.manual_seed(0)
    return VAE.mlp(6, 2, (4,))


def _m2() -> SemiSupervisedVAE:
    torch.manual_seed(0)
    return SemiSupervisedVAE.mlp(6, 3, 2, (4,))


def _labeled(**settings: Any) -> Any:
    return fit(_m2(), X, labeled=(X, torch.tensor([0, 1, 2, 0, 1])), epochs=1, progress=False, **settings)


def _local(**settings: Any) -> Any:
    program = _vae()
    return variational_em(LocalGuide.of(program, X), X, progress=False, **settings)


FITTING: dict[str, tuple[Any, dict[str, Any]]] = {
    "fit": (
        lambda **settings: fit(_vae(), X, progress=False, **settings),
        {"val": X, "elbo": None, "kl_weight": 1.0, "free_bits": None, "epochs": 1, "batch_size": 5, "lr": 1e-3,
         "optimizer": None, "patience": None, "grad_clip": None, "seed": 0, "device": "cpu", "precision": "32-true",
         "compile": False},
    ),
    "fit with labels": (_labeled, {"supervised_weight": 1.0, "labeled_batch_size": 2, "labels": "sample", "seed": 0}),
    "fit_map": (
        lambda **settings: fit_map(_vae(), X, epochs=1, progress=False, **settings),
        {"prior": pyro.distributions.Normal(0.0, 1.0), "elbo": None, "lr": 1e-3, "seed": 0},
    ),
    "variational_em": (
        _local,
        {"val": None, "steps": 1, "local_lr": 0.1, "elbo": None, "epochs": 1, "batch_size": 5, "lr": 1e-3, "seed": 0},
    ),
    "fit_guide": (
        lambda **settings: fit_guide(_vae(), X, progress=False, **settings),
        {"steps": 1, "lr": 0.1, "elbo": None, "batch_size": 5, "seed": 0},
    ),
    "mcmc_em": (
        lambda **settings: mcmc_em(_vae(), X, progress=False, **settings),
        {"draws": 1, "warmup": 1, "epochs": 1, "batch_size": 5, "lr": 1e-3, "seed": 0},
    ),
    "posterior_draws": (
        lambda **settings: posterior_draws(_vae(), X, progress=False, **settings),
        {"num_draws": 1, "warmup": 1, "batch_size": 5, "seed": 0},
    ),
}  # fmt: skip
MEASURING: dict[str, tuple[Any, dict[str, Any]]] = {
    "evaluate": (
        lambda **settings: evaluate(progress=False, **settings),
        {"program": _vae(), "data": X, "num_particles": 2, "classes": None, "batch_size": 2, "chunk_size": 2,
         "seed": 0, "precision": "32-true", "compile": False},
    ),
    "evaluate clusters": (
        lambda **settings: evaluate(_m2(), X, 2, progress=False, **settings),
        {"classes": torch.tensor([0, 1, 2, 0, 1]), "seed": 0},
    ),
    "classify": (
        lambda **settings: classify(_m2(), X, progress=False, **settings),
        {"num_particles": 2, "seed": 0, "precision": "32-true", "compile": False},
    ),
    "compare": (
        lambda **settings: compare(_vae(), X, progress=False, **settings),
        {"num_particles": (1, 2), "elbo_draws": 1, "seed": 0},
    ),
    "log_weights": (log_weights, {"program": _vae(), "batch": X, "num_particles": 2}),
    "sample": (_vae().sample, {"n": 3, "like": None}),
    "sample a class": (_m2().sample, {"n": 3, "y": torch.tensor([0, 1, 2])}),
    "sample sequences": (zoo.PROGRAMS["DeepMarkovModel"].make().sample, {"n": 3, "lengths": 4}),
    "sample for conditions": (zoo.PROGRAMS["ConditionalVAE"].make().sample, {"n": 3, "c": _ones()}),
    "encode": (_vae().encode, {"x": X, "site": "z"}),
    "canvases": (DRAW((1, 3, 2), 2, 2, 5).canvases, {"n": 2}),
    "canvases_of": (DRAW((1, 3, 2), 2, 2, 5).canvases_of, {"x": X}),
    "start_at": (c.Bernoulli.mlp(2, 3, (4,)).start_at, {"mean": torch.full((3,), 0.5)}),
    "start_from": (
        lambda **settings: GaussianMixture(6, 2).start_from(**settings), {"x": torch.randn(9, 6), "seed": 0}
    ),
    "GaussianMixture.em": (
        lambda **settings: GaussianMixture(6, 2).em(progress=False, **settings),
        {"x": torch.randn(9, 6), "iterations": 2, "tolerance": 0.0, "floor": 0.1},
    ),
    "agreement": (agreement, {"clusters": torch.tensor([0, 1, 1]), "classes": torch.tensor([1, 0, 0])}),
    "data.load": (pyrovae.data.load, {"name_or_path": "digits", "binarize": "static", "seed": 0}),
    "plots.samples": (lambda **given: plots.samples(_vae(), **given), {"n": 3, "shape": (1, 2, 3)}),
    "plots.reconstructions": (
        lambda **given: plots.reconstructions(_vae(), **given), {"x": X, "shape": (1, 2, 3), "n": 2}
    ),
    "plots.latent_space": (lambda **given: plots.latent_space(_vae(), X, **given), {"y": torch.arange(5), "site": "z"}),
    "plots.sequences": (
        plots.sequences, {"values": {"x": torch.rand(3, 4, 2)}, "lengths": torch.tensor([4, 2, 1]), "n": 2}
    ),
    "plots.learning_curves": (
        plots.learning_curves, {"history": [{"epoch": 1, "elbo": -3.0, "log_px_z": -2.0, "kl": 1.0}]}
    ),
}  # fmt: skip


@fuzz(12, 600, case=changed(FITTING))
def test_learning_takes_settings_or_refuses_them(case):
    _, function, arguments = case
    with quiet(), state_kept(seeded=False), unchanged(X):
        error_of(lambda: function(**{key: fresh(value) for key, value in arguments.items()}))


@fuzz(80, 5000, case=changed(MEASURING))
def test_measuring_takes_settings_or_refuses_them(case):
    _, function, arguments = case
    with quiet(), state_kept(arguments.get("program"), seeded=False), unchanged(X, arguments):
        error_of(lambda: function(**{key: fresh(value) for key, value in arguments.items()}))


@fuzz(
    60,
    3000,
    roll=st.one_of(any_tensor(), wrong),
    tempo=st.one_of(wrong, st.floats()),
    lowest=st.one_of(wrong, st.integers()),
)
def test_midi_files_are_written_or_refused(roll, tempo, lowest):
    with tempfile.TemporaryDirectory() as folder, unchanged(roll), state_kept():
        error_of(lambda: music.write_midi(roll, f"{folder}/chords.mid", tempo=tempo, lowest=lowest))
