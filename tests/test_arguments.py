"""Arguments of a wrong type, shape or layout are refused where they enter, by a message that names them."""

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close

from pyrovae import (
    DRAW,
    IWAE_ELBO,
    MLP,
    VAE,
    ConvEncoder,
    DeepMarkovModel,
    GaussianMixture,
    HiddenMarkovModel,
    HierarchicalVAE,
    Linear,
    LinearGaussian,
    LinearGaussianStateSpace,
    LocalGuide,
    SemiSupervisedVAE,
    as_program,
    compare,
    data,
    evaluate,
    fit,
    fit_guide,
    fit_map,
    indexed,
    log_weights,
    one_hot,
    pad,
    plots,
    posterior_draws,
    quadrant,
    variational_em,
)
from pyrovae.arguments import check_number, check_one_of, check_seed, check_whole
from pyrovae.conditionals import (
    Bernoulli,
    Categorical,
    DiagonalNormal,
    EnergyPrior,
    FloorNormal,
    OneHotCategorical,
    PlanarFlow,
    RecurrentPosterior,
    StandardNormal,
    VampPrior,
)
from pyrovae.data import Data
from pyrovae.nets import BackwardRNN, MaskedMLP
from pyrovae.weights import WeightSums

X = torch.tensor([[0.0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]])
SPARSE, META, COMPLEX = X.to_sparse(), X.to("meta"), X.to(torch.complex64)
Q = DiagonalNormal.mlp(6, 2, ())


def vae() -> VAE:
    return VAE.mlp(6, 2, (4,))


def quick(**settings):
    return fit(vae(), X, progress=False, **{"epochs": 1, **settings})


REFUSED = {
    # data, at `as_batch`
    "sparse data": (lambda: evaluate(vae(), SPARSE), r"data\['x'\] to be a dense tensor .*; got torch.sparse_coo"),
    "meta data": (lambda: fit(vae(), META), r"train\['x'\] to be a dense tensor of real numbers; got meta"),
    "complex data": (lambda: log_weights(vae(), COMPLEX, 2), r"batch\['x'\] to be a dense .*; got torch.complex64"),
    "complex to encode": (lambda: vae().encode(COMPLEX), r"x\['x'\] to be a dense tensor"),
    "a key that is no name": (lambda: vae().encode({1: X}), "the keys of x to be names of arguments; got 1"),
    "dynamic integers": (lambda: Data(X.byte(), dynamic=True), "x, of floats, among the .* got x of torch.uint8"),
    "show that is none": (lambda: Data(X, show=3), "show to be a function of a minibatch; got int"),
    "show that forgets": (lambda: next(Data(X, show=print).batches(2)), "show to give a minibatch.*; got NoneType"),
    "half a batch": (lambda: next(Data(X).batches(2.5)), "batch_size to be a whole number of at least 1; got 2.5"),
    "classes by name": (lambda: data.split_labels((X, torch.arange(3)), "1"), "per_class to be a whole number .*'1'"),
    "half a seed": (lambda: data.split_labels((X, torch.tensor([0, 0, 0])), 1, 0.5), "seed to be a whole number"),
    "seed of a set": (lambda: data.load("digits", seed="0"), "seed to be a whole number from .*; got '0'"),
    "no list to pad": (lambda: pad(3), r"sequences to be a list of tensors \(T, D\); got int"),
    "lists to pad": (lambda: pad([[1.0, 2.0]]), "sequences to be dense tensors .*; got list at index 0"),
    "a scalar to pad": (lambda: pad([torch.tensor(1.0)]), r"sequences of shape \(T, D\), T at least 1; got \(\)"),
    "types to pad": (
        lambda: pad([X, X.double()]), "of one dtype on one device; got torch.float64 on cpu at index 1"
    ),
    "a list of labels": (lambda: one_hot([1, 2], 3), r"labels that are a tensor of integers \(N,\); got list"),
    "no classes": (lambda: one_hot(torch.tensor([0]), 0), "num_classes to be a whole number of at least 1; got 0"),
    "a side": (lambda: quadrant(X, 6, "top-left"), r"shape to be \(channels, height, width\); got 6"),
    "no channels": (lambda: quadrant(X, (0, 2, 3), "top-left"), r"shape\[0\] to be a positive whole number; got 0"),
    # data that a program does not run on
    "too many values": (lambda: evaluate(LinearGaussian(4, 2), X), r"x to have shape \(\*, 4\); got \(3, 6\)"),
    "one value": (lambda: LinearGaussian(4, 2).encode(X[:, :1]), r"x to have shape \(\*, 4\); got \(3, 1\)"),
    "one value, exact": (lambda: LinearGaussian(4, 2).log_prob(X[:, :1]), r"x to have shape \(\*, 4\)"),
    "whole numbers, exact": (lambda: LinearGaussian(6, 2).log_prob(X.long()), "x to have its weights' dtype"),
    "a mixture's values": (lambda: GaussianMixture(4, 2).predict(X), r"x to have shape \(\*, 4\); got \(3, 6\)"),
    "a cluster too far": (
        lambda: GaussianMixture(6, 2).log_prob(X, torch.tensor([0, 1, 2])), r"clusters \(3,\) from 0 to 1; got .*2"
    ),
    "bytes": (lambda: evaluate(vae(), X.byte()), "dtype, torch.float32; got torch.uint8"),
    "half precision": (lambda: vae().reconstruct(X.half()), "dtype, torch.float32; got torch.float16"),
    "bytes without a network": (
        lambda: posterior_draws(vae(), X.byte()),
        r"Expected data that the program runs on; got x \(3, 6\) of torch.uint8, .*where it fails: result type Float",
    ),
    "whole steps": (
        lambda: LinearGaussianStateSpace(6, 2).log_prob(X.long()[None], torch.tensor([3])), "sequences of floating"
    ),
    "a list of lengths": (
        lambda: LinearGaussianStateSpace(6, 2).log_prob(X[None], [3]), "lengths to be whole numbers; got list"
    ),
    "an index of floats": (lambda: indexed({"x": X, "index": torch.rand(3)}), "index to be whole numbers"),
    "an index too far": (
        lambda: variational_em(LocalGuide.of(vae(), X), {"x": X, "index": torch.tensor([0, 1, 3])}),
        "index in train from 0 to 2",
    ),
    "a support without a map": (
        lambda: fit_guide(zoo.PROGRAMS["LinearGaussianStateSpace"].make(), pad([X[:, :3]])),
        "latents whose support numbers without bounds map to; got site 'z', MarkovChain",
    ),
    # what a program is asked
    "half a datum": (lambda: vae().sample(2.5), "n to be a whole number of at least 1; got 2.5"),
    "a class by name": (lambda: SemiSupervisedVAE.mlp(6, 3, 2).sample(2, y="a"), "y to be a tensor or a number"),
    "sites": (lambda: vae().encode(X, ["z"]), r"site to be one of z; got \['z'\]"),
    "a huge seed": (lambda: evaluate(vae(), X, 2, seed=2**64), "seed to be a whole number from .*; got 184467440737"),
    "a seed of floats": (lambda: quick(seed=0.5), "seed to be a whole number from .*; got 0.5"),
    "particles as a tensor": (lambda: evaluate(vae(), X, torch.tensor([1, 2])), "num_particles to be a whole number"),
    "every K by name": (lambda: compare(vae(), X, "all"), "num_particles to be a whole number .* got 'all'"),
    "draws": (lambda: compare(vae(), X, 2, elbo_draws="3"), "elbo_draws to be a whole number"),
    "batch by name": (lambda: evaluate(vae(), X, 2, batch_size="2"), "batch_size to be a whole number"),
    "half a chunk": (lambda: evaluate(vae(), X, 2, chunk_size=0.5), "chunk_size to be a whole number"),
    "precisions": (lambda: evaluate(vae(), X, 2, precision=["32-true"]), "precision to be one of 32-true"),
    "true epochs": (lambda: quick(epochs=True), "epochs to be a positive whole number; got True"),
    "no rate": (lambda: quick(lr=None), "lr to be a positive number; got None"),
    "an elbo as a tensor": (lambda: fit_map(vae(), X, prior=X, elbo=X), "elbo to be a pyro.infer.ELBO"),
    "a weight by name": (
        lambda: fit(SemiSupervisedVAE.mlp(6, 3, 2), X, labeled=(X, torch.arange(3)), supervised_weight="1"),
        "supervised_weight to be a number of at least 0; got '1'",
    ),
    "three of free bits": (lambda: quick(free_bits=(1.0, 1, 1)), r"free_bits to be nats, or \(nats, groups\)"),
    "a rate that moves": (lambda: fit_guide(vae(), X, lr=lambda epoch: 0.1), "lr to be a number, for it falls"),
    "a plate": (lambda: as_program(len, len, plate=3), "plate to be a name; got 3"),
    "values": (lambda: as_program(len, len, params=[1]), "params to be a dict of tensors; got list"),
    # constructors
    "hidden as a number": (lambda: VAE.mlp(6, 2, 200), r"hidden to be a sequence of sizes, as \(200, 200\); got 200"),
    "hidden used up": (lambda: MLP(6, 2, iter([3])), "hidden to be a sequence of sizes"),
    "activations": (lambda: MLP(6, 2, (3,), ["tanh"]), "activation to be one of tanh"),
    "a family by name": (lambda: VAE.mlp(6, 2, likelihood="bernoulli"), "likelihood to be a class of Conditionals"),
    "a network for a family": (lambda: VAE(StandardNormal(2), MLP(2, 6), Q), "likelihood to be a Conditional"),
    "hidden of one layer": (lambda: HierarchicalVAE.mlp(6, (3, 2), (4, 4)), r"hidden\[0\] to be a sequence of sizes"),
    "priors": (lambda: HierarchicalVAE(Q, Q, [Q]), "priors to be a list of Conditionals; got DiagonalNormal"),
    "half a size": (lambda: LinearGaussian(2.5, 2), "x_dim to be a positive whole number; got 2.5"),
    "a posterior for sequences": (lambda: LinearGaussianStateSpace(6, 2, Q), "posterior to be a RecurrentPosterior"),
    "none for sequences": (lambda: DeepMarkovModel(Q, Q, None, 2), "posterior to be a RecurrentPosterior; got None"),
    "an emission": (lambda: HiddenMarkovModel(3, None), "likelihood to be a Conditional, as .*; got None"),
    "no network": (lambda: RecurrentPosterior(None, Q, 2), "rnn to be a network, as BackwardRNN; got None"),
    "cells": (lambda: BackwardRNN(3, 4, np.array([1, 2])), "cell to be one of relu, tanh, gru"),
    "an image's side": (lambda: ConvEncoder(28, 3), r"image_shape to be \(channels, height, width\); got 28"),
    "an image by name": (lambda: DRAW("1, 2"), r"image_shape to be \(channels, height, width\); got '1, 2'"),
    "feature maps": (lambda: ConvEncoder((1, 8, 8), 3, 2), "channels to be a sequence of sizes"),
    "a negative context": (lambda: MaskedMLP(3, context_dim=-1), "context_dim to be a whole number of at least 0"),
    "a root's posterior": (lambda: VampPrior(None, 6), "posterior to be a Conditional"),
    "a net that is none": (lambda: Bernoulli("net"), "net to be a network, an nn.Module; got 'net'"),
    "a true floor": (lambda: FloorNormal(None, True), "floor to be positive and finite; got True"),
    "no dim": (lambda: Categorical.mlp(2, None), "dim to be a positive whole number; got None"),
    "no steps": (lambda: PlanarFlow.mlp(2, 3, steps=None), "steps to be a positive whole number; got None"),
    "parents of a root": (lambda: EnergyPrior.mlp(X, 3), "parents_dim to be 0"),
    "plates by name": (lambda: IWAE_ELBO(2, max_plate_nesting="1"), "max_plate_nesting to be a whole number"),
    "a start by name": (lambda: Linear(3, "0"), "start to be a number of at least 0; got '0'"),
    "no particles": (lambda: WeightSums(0), "num_particles to be a whole number"),
    # Conditionals and networks, called
    "a parent that is none": (lambda: Q([1.0] * 6), r"parents to be tensors of shape \(\*, D\); got list"),
    "a scalar for a parent": (lambda: Q(torch.tensor(1.0)), r"parents to be tensors of shape \(\*, D\); got \(\)"),
    "parents apart": (
        lambda: Q(torch.zeros(3, 2), torch.zeros(4, 4)), r"the last broadcast; got shapes \(3, 2\), \(4, 4\)"
    ),
    "parents of other types": (
        lambda: Q(torch.zeros(3, 2).long(), torch.zeros(2, 3, 4).long()), "dtype, torch.float32; got torch.int64"
    ),
    "a family without a network": (lambda: Bernoulli(None)(X), "Bernoulli with a network, for it is called; got none"),
    "a mean as a number": (lambda: Q.start_at(0.5), r"mean to be a floating-point tensor \(dim,\); got 0.5"),
    "a context that lacks": (lambda: MaskedMLP(6, context_dim=2)(X), "a context of 2 values; got 0"),
    # pictures
    "a picture's side": (lambda: plots.samples(vae(), 2, 6), r"shape to be \(channels, height, width\), or .*; got 6"),
    "labels as a list": (lambda: plots.latent_space(vae(), X, [0, 1, 2]), r"y to be labels \(3,\), .*; got list"),
    "no history": (lambda: plots.learning_curves(3), "history to be what fit returns"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message.removeprefix('Expected ')}"):
        call()


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (check_whole, np.int64(3)),
        (check_number, np.float32(0.5)),
        (check_seed, -1),
        (check_seed, 2**64 - 1),
        (lambda a: check_one_of(["b", "a"], a=a), "a"),
    ],
)
def test_taken(check, value):
    check(value) if check is check_seed or not isinstance(value, np.generic) else check(value=value)


def test_seeds_of_numpy_serve():
    labels = torch.tensor([0, 1] * 5)
    ours, plain = (
        data.split_labels((labels.unsqueeze(1).float(), labels), 2, seed)[0]["x"] for seed in (np.int64(3), 3)
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", ["Bernoulli", "FullNormal", "PixelCNN", "RealNVP"])
def test_parents_of_no_rows_have_no_eta(name):
    """As many numbers for each of no rows as for one."""
    conditional = zoo.CONDITIONALS[name]()
    size = conditional.eta(torch.zeros(1, 4)).shape[-1]
    assert conditional.eta(torch.zeros(0, 4)).shape == (0, size)
    assert conditional.eta(torch.zeros(2, 0, 1), torch.zeros(3)).shape == (2, 0, size)


def test_a_network_that_gives_images_is_flattened():
    conditional = Bernoulli(nn.Unflatten(-1, (2, 3)))
    assert_close(conditional.eta(X.expand(2, 3, 6)), X.expand(2, 3, 6))


@pytest.mark.parametrize("as_loader", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_training_leaves_data_that_ask_for_gradients_alone(leaf, as_loader):
    """Neither is a gradient added to them, nor the graph that they came from gone through twice."""
    x = X.clone().requires_grad_()
    x = x if leaf else 1 * x
    given = torch.utils.data.DataLoader(list(x), batch_size=2) if as_loader else x
    program, plain = vae(), vae()
    plain.load_state_dict(program.state_dict())
    settings = {"epochs": 2, "batch_size": 2, "seed": 0, "progress": False}
    fit(program, given, **settings)
    fit(plain, torch.utils.data.DataLoader(list(X), batch_size=2) if as_loader else X, **settings)
    assert not leaf or x.grad is None
    for p, q in zip(program.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_condition_for_all():
    program = zoo.PROGRAMS["HiddenMarkovModel"].make()
    torch.manual_seed(0)
    first = program.sample(3, lengths=torch.tensor(4))
    torch.manual_seed(0)
    assert torch.equal(first, program.sample(3, lengths=4))


def test_a_mixture_tells_the_density_of_each_cluster():
    program, c = GaussianMixture(6, 2), torch.tensor([0, 1, 1])
    both = torch.stack([program.log_prob(X, torch.full((3,), k)) for k in range(2)], 1)
    assert torch.equal(program.log_prob(X, c), both[torch.arange(3), c])
    assert_close(both.logsumexp(1), program.log_prob(X))


def test_what_is_no_mistake_of_the_data_passes_as_it_is():
    """A program's own errors keep their type, and those of torch the cause."""

    def guide(x):
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        as_program(vae().model, guide).encode(X)
    with pytest.raises(ValueError, match="where it fails: ") as caught:
        as_program(vae().model, lambda x: x @ x).encode(X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert OneHotCategorical.uniform(3)().event_shape == (3,)
