"""Gaussian mixtures, known exactly, by hand, by scikit-learn, by EM and by SVI; a VAE whose prior is one."""

import itertools
import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae import (
    IWAE_ELBO,
    VAE,
    GaussianMixture,
    GaussianMixtureVAE,
    compare,
    evaluate,
    fit,
    log_weights,
    reference,
)
from pyrovae.clustering import agreement
from pyrovae.conditionals import MixtureOfNormals
from pyrovae.labels import Label
from pyrovae.supervision import EnumeratedELBO
from pyrovae.survey import Survey, draw

float64 = pytest.mark.usefixtures("float64")
covariances = pytest.mark.parametrize("covariance", ["diagonal", "full"])
clusters = pytest.mark.parametrize("entry", zoo.CLUSTERS.values(), ids=zoo.CLUSTERS)


def blobs(n: int, dim: int = 3, num_clusters: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clusters of different shapes, and which datum is of which."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randint(num_clusters, (n,), generator=g)
    scale = torch.eye(dim) + 0.4 * torch.randn(num_clusters, dim, dim, generator=g)
    mean = 3 * torch.randn(num_clusters, dim, generator=g)
    return mean[c] + (scale[c] @ torch.randn(n, dim, 1, generator=g)).squeeze(-1), c


def scattered(program):
    for p in program.parameters():
        nn.init.normal_(p, std=0.7)
    return program


def parameters(program: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """pi (C,), mu (C, X) and Sigma (C, X, X), from the distributions that the program has."""
    each = program.likelihood(torch.eye(program.num_clusters))
    covariance = each.covariance_matrix if program.covariance == "full" else torch.diag_embed(each.variance)
    return program.label_prior().probs.detach(), each.mean.detach(), covariance.detach()


def scikit(program: GaussianMixture, **options):
    """scikit-learn's mixture with the program's parameters as its start."""
    from sklearn.mixture import GaussianMixture as Theirs

    weights, means, covariance = (value.numpy() for value in parameters(program))
    precisions = np.linalg.inv(covariance)
    kind = "full"
    if program.covariance == "diagonal":
        precisions, kind = np.diagonal(precisions, axis1=1, axis2=2), "diag"
    return Theirs(
        program.num_clusters,
        covariance_type=kind,
        weights_init=weights,
        means_init=means,
        precisions_init=precisions,
        **options,
    )


# The mixture is known exactly


@float64
def test_log_prob_is_a_value_by_hand():
    """Half N(0, 1) and half N(2, 1), at 0: log(0.5 (1 + exp(-2)) / sqrt(2 pi))."""
    program = GaussianMixture(1, 2)
    with torch.no_grad():
        program.likelihood.net.layers[0].weight.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    expected = math.log(0.5 * (1 + math.exp(-2)) / math.sqrt(2 * math.pi))
    assert program.log_prob(torch.zeros(1, 1)).item() == pytest.approx(expected, abs=1e-12)
    assert program.predict(torch.zeros(1, 1))[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-12)


@float64
@covariances
def test_log_prob_and_posterior_are_those_by_hand_and_scikit_learns(covariance):
    program, x = scattered(GaussianMixture(3, 4, covariance)), torch.randn(20, 3)
    weights, means, sigma = parameters(program)
    theirs = scikit(program)
    theirs._initialize(x.numpy(), np.zeros((20, 4)))  # takes over all three
    assert_close(program.log_prob(x), torch.from_numpy(theirs.score_samples(x.numpy())), rtol=0, atol=1e-10)
    assert_close(program.predict(x), torch.from_numpy(theirs.predict_proba(x.numpy())), rtol=0, atol=1e-10)
    by_hand = reference.gaussian_mixture_log_prob(x, weights.log(), means, sigma)
    assert_close(program.log_prob(x), by_hand, rtol=0, atol=1e-10)
    posterior = reference.gaussian_mixture_posterior(x, weights.log(), means, sigma)
    assert_close(program.predict(x), posterior, rtol=0, atol=1e-10)
    c = torch.arange(20) % 4
    joint = by_hand + posterior.log().gather(1, c.unsqueeze(1)).squeeze(1)
    assert_close(program.log_prob(x, c), joint, rtol=0, atol=1e-10)
    assert_close(log_weights(program, {"x": x, "c": c}, 1), joint.unsqueeze(0), rtol=0, atol=1e-10)


@float64
@covariances
def test_evaluate_and_compare_find_the_exact_value(covariance):
    program, x = scattered(GaussianMixture(3, 4, covariance)), torch.randn(20, 3)
    result = evaluate(program, x, 3, progress=False)
    assert_close(result.log_px, program.log_prob(x), rtol=0, atol=1e-10)
    assert_close(result.elbo, program.log_prob(x), rtol=0, atol=1e-10)
    assert result.standard_error.max() < 1e-7
    exact = program.log_prob(x).mean().item()
    found = compare(program, x, (1, 5), elbo_draws=3, progress=False)
    assert [bound.value for bound in found.bounds] == pytest.approx([exact] * 5, abs=1e-10)
    shown = compare(program, {"x": x, "c": torch.arange(20) % 4}, 1, elbo_draws=1, progress=False)
    exact = program.log_prob(x, torch.arange(20) % 4).mean().item()
    assert [bound.value for bound in shown.bounds] == pytest.approx([exact] * 4, abs=1e-10)


@float64
@covariances
def test_the_enumerated_loss_is_minus_log_p_in_value_and_gradient(covariance):
    program, x = scattered(GaussianMixture(3, 4, covariance)), torch.randn(20, 3)
    loss = EnumeratedELBO(Trace_ELBO(), Label("c", torch.eye(4)), 1)(program.model, program.guide)(x=x)
    log_p = program.log_prob(x).sum()
    by_hand = program.reference_elbo(x, torch.eye(4)[torch.arange(20) % 4]).sum()
    own = list(program.parameters())
    grads = [torch.autograd.grad(value, own) for value in (-loss, log_p, by_hand)]
    for value, each in ((log_p, grads[1]), (by_hand, grads[2])):
        assert_close(-loss.detach(), value.detach(), rtol=0, atol=1e-10)
        for a, b in zip(grads[0], each, strict=True):
            assert_close(a, b, rtol=0, atol=1e-10)


def test_samples_are_those_of_the_clusters():
    torch.manual_seed(0)
    program = scattered(GaussianMixture(3, 4))
    weights, means, sigma = parameters(program)
    x = program.sample(20_000, c=3)
    error = (sigma[3].diagonal() / 20_000).sqrt()
    assert ((x.mean(0) - means[3]).abs() < 5 * error).all(), "seed 0"
    assert torch.equal(program.sample(2, c=1, mean=True), means[1].expand(2, -1))
    x = program.sample(20_000)
    assert ((x.mean(0) - weights @ means).abs() < 5 * x.std(0) / 20_000**0.5).all(), "seed 0"


# EM


@float64
@covariances
def test_em_never_falls_and_reaches_a_fixed_point(covariance):
    x, _ = blobs(300)
    program = GaussianMixture(3, 4, covariance).start_from(x, seed=0)
    before = program.log_prob(x).mean().item()
    history = program.em(x, floor=0.0, tolerance=1e-10, progress=False)
    steps = np.diff([before, *history])
    assert steps.min() > -1e-12
    assert len(history) > 3
    assert history[-1] == pytest.approx(program.log_prob(x).mean().item(), abs=1e-12)
    slopes = torch.autograd.grad(program.log_prob(x).mean(), list(program.parameters()))
    assert max(slope.abs().max() for slope in slopes) < 1e-3


@float64
@covariances
def test_em_is_scikit_learns(covariance):
    x, _ = blobs(300)
    program = GaussianMixture(3, 4, covariance).start_from(x, seed=1)
    theirs = scikit(program, reg_covar=1e-6, tol=0.0, max_iter=10)
    with pytest.warns(UserWarning, match="converge"):
        theirs.fit(x.numpy())
    history = program.em(x, iterations=10, tolerance=0.0, progress=False)
    assert len(history) == 10
    assert history[-1] == pytest.approx(theirs.score(x.numpy()), abs=1e-6)
    assert_close(parameters(program)[1], torch.from_numpy(theirs.means_), rtol=0, atol=1e-6)


@covariances
def test_em_and_svi_find_the_same_optimum(covariance):
    x, _ = blobs(300)
    by_em = GaussianMixture(3, 4, covariance).start_from(x, seed=0)
    by_svi = GaussianMixture(3, 4, covariance)
    by_svi.load_state_dict(by_em.state_dict())
    best = by_em.em(x, tolerance=1e-9, progress=False)[-1]
    rate = lambda epoch: 0.05 * 0.01 ** (epoch / 250)  # noqa: E731
    history = fit(by_svi, x, epochs=250, batch_size=300, lr=rate, seed=0, progress=False)
    assert history[-1]["elbo"] == pytest.approx(best, abs=2e-3)
    assert history[-1]["elbo"] == pytest.approx(by_svi.log_prob(x).mean().item(), abs=1e-4)
    assert history[-1]["elbo"] > history[0]["elbo"]


def test_the_start_finds_clusters_that_are_apart():
    x = torch.cat([torch.randn(40, 2) + 20 * k for k in range(3)])
    program = GaussianMixture(2, 3).start_from(x, seed=0)
    true = torch.arange(3).repeat_interleave(40)
    assert agreement(program.predict(x).argmax(1), true).accuracy == 1.0
    weights, means, sigma = parameters(program)
    assert_close(weights, torch.full((3,), 1 / 3))
    order = means[:, 0].argsort()
    assert_close(means[order], x.reshape(3, 40, 2).mean(1), rtol=0, atol=1e-4)
    assert_close(sigma[order][0], x[:40].T.cov(correction=0), rtol=0, atol=1e-4)


@float64
def test_splitting_and_merging_leaves_a_local_optimum():
    """EM begun with two clusters on one heap, and one on two, stays there."""
    torch.manual_seed(0)
    true = torch.arange(3).repeat_interleave(100)
    x = torch.randn(300, 2) + torch.tensor([[0.0, 0], [12, 0], [12, 12]])[true]
    program = GaussianMixture(2, 3)
    with torch.no_grad():
        program.likelihood.net.layers[0].weight[:2] = torch.tensor([[-1.0, 0], [1, 0], [12, 6]]).T
    stuck = program.em(x, progress=False)[-1]
    assert agreement(program.predict(x).argmax(1), true).accuracy < 0.7
    found = program.split_and_merge(x)
    assert found > stuck + 0.5
    assert found == pytest.approx(program.log_prob(x).mean().item(), abs=1e-10)
    assert agreement(program.predict(x).argmax(1), true).accuracy == 1.0


def test_a_cluster_without_data_is_survived():
    x = torch.zeros(6, 2)
    program = GaussianMixture(2, 3)
    with pytest.warns(Warning, match="distinct clusters"):
        program.start_from(x, seed=0)
    assert math.isfinite(program.em(x, progress=False)[-1])
    assert program.log_prob(x).isfinite().all()


# The VAE


@float64
def test_the_mixture_vae_is_a_vae_whose_prior_is_the_mixture():
    """At the same z the sum over clusters is log p(x | z) + log p(z) - log q(z | x), with its gradients."""
    program, x = scattered(zoo.CLUSTERS["GaussianMixtureVAE"].make()), zoo.CLUSTERS["GaussianMixtureVAE"].data(5)
    prior = MixtureOfNormals(2, 3)
    vae = VAE(prior, program.likelihood, program.posterior)
    mu, log_sigma = program.prior.eta(torch.eye(3)).chunk(2, -1)
    with torch.no_grad():
        prior.net.value.copy_(torch.cat([program.label_prior.eta(), mu.flatten(), log_sigma.flatten()]))
    torch.manual_seed(1)
    ours = EnumeratedELBO(Trace_ELBO(), Label("c", torch.eye(3)), 1)(program.model, program.guide)(x=x)
    torch.manual_seed(1)
    theirs = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    assert_close(ours, theirs, rtol=0, atol=1e-10)
    shared = [*program.likelihood.parameters(), *program.posterior.parameters()]
    for a, b in zip(torch.autograd.grad(ours, shared), torch.autograd.grad(theirs, shared), strict=True):
        assert_close(a, b, rtol=0, atol=1e-10)
    drawn = draw(program, {"x": x}, 2, Survey.of(program, {"x": x}))
    z = drawn.drawn.guide_sites["z"]["value"][:, :5]  # that of every class
    expected = vae.likelihood(z).log_prob(x) + prior().log_prob(z) - vae.posterior(x).log_prob(z)
    assert_close(drawn.log_weights, expected, rtol=0, atol=1e-10)
    assert_close(drawn.log_px_z - drawn.kl, expected, rtol=0, atol=1e-10)


@float64
@clusters
def test_the_reference_agrees_with_pyro(entry):
    """At the guide's own latents, hidden clusters and shown ones."""
    program, x = scattered(entry.make()), entry.data(5)
    for batch in ({"x": x}, {"x": x, "c": torch.tensor([0, 1, 2, 0, 1])}):
        trace = poutine.trace(program.guide).get_trace(**batch)
        latents = {name: site["value"] for name, site in trace.nodes.items() if name in ("c", "z")}
        loss = Trace_ELBO().loss(program.model, poutine.replay(program.guide, trace=trace), **batch)
        by_hand = program.reference_elbo(**batch, **latents)
        assert by_hand.shape == (5,)
        assert by_hand.sum().item() == pytest.approx(-loss, abs=1e-9)


def test_prediction_is_at_the_posterior_mean():
    program, x = zoo.CLUSTERS["GaussianMixtureVAE"].make(), zoo.CLUSTERS["GaussianMixtureVAE"].data(5)
    found = program.predict(x)
    assert torch.equal(program.predict(x), found)
    assert_close(found, program.exact_posterior(program.posterior(x).mean).probs)


@covariances
def test_the_mixture_vae_finds_clusters(covariance):
    """Of data that are all in three groups; a VAE is trained first, as its docstring says."""
    torch.manual_seed(0)
    true = torch.arange(3).repeat(100)
    x = (torch.rand(300, 12) < 0.1 + 0.8 * nn.functional.one_hot(true, 3).repeat_interleave(4, 1)).float()
    vae = VAE.mlp(12, 2, (16,))
    fit(vae, x, epochs=40, batch_size=50, lr=1e-2, seed=0, progress=False)
    program = GaussianMixtureVAE(vae.likelihood, vae.posterior, 2, 3, covariance)
    before = evaluate(program, x, 20, seed=0, progress=False).elbo.mean()
    torch.manual_seed(3)
    assert program.start_from(x, seed=0, restarts=2) is program
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3)), "torch's generator is left"
    started = evaluate(program, x, 20, seed=0, progress=False).elbo.mean()
    fit(program, x, epochs=10, batch_size=50, lr=3e-3, seed=0, progress=False)
    result = evaluate(program, x, 20, classes=true, seed=0, progress=False)
    assert before < started < result.elbo.mean()
    assert result.clustering is not None
    assert result.clustering.accuracy > 0.9


# Training without labels


@float64
@pytest.mark.parametrize("name", ["GaussianMixture full", "GaussianMixtureVAE"])
def test_compiled_training_stays_with_uncompiled_training(name):
    entry = zoo.CLUSTERS[name]
    x, found = entry.data(20), []
    for compile in (True, False):
        torch.manual_seed(0)
        program = entry.make()
        fit(program, x, epochs=2, batch_size=10, seed=0, kl_weight=0.5, compile=compile, progress=False)
        found.append(program)
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-10, msg=name)


@float64
def test_a_hidden_label_is_summed_over_or_drawn():
    """Summed over, the loss of the mixture has no noise; drawn, neither, but its gradient has."""
    x, _ = blobs(40)
    start_at = GaussianMixture(3, 4).state_dict()
    found = {}
    for labels, seed in itertools.product(("enumerate", "sample"), (0, 1)):
        program = GaussianMixture(3, 4)
        program.load_state_dict(start_at)
        fit(program, x, labels=labels, epochs=1, batch_size=40, seed=seed, progress=False, elbo=Trace_ELBO(2))
        found[labels, seed] = program.likelihood.net.layers[0].weight.detach()
    assert_close(found["enumerate", 0], found["enumerate", 1], rtol=0, atol=1e-12)
    assert not torch.allclose(found["sample", 0], found["sample", 1], atol=1e-6)


def test_bounds_of_ours_are_refused_where_a_label_is_summed_over():
    with pytest.raises(ValueError, match=r"Expected an ELBO of Pyro's.*'c'; got IWAE_ELBO"):
        fit(GaussianMixture(3, 2), torch.zeros(5, 3), elbo=IWAE_ELBO(3), progress=False)
    with pytest.raises(ValueError, match="got FreeBits_ELBO"):
        fit(GaussianMixtureVAE.mlp(3, 2, 2, (4,)), torch.zeros(5, 3), free_bits=0.1, progress=False)


@float64
def test_shown_clusters_are_observed_in_training():
    x, c = blobs(60)
    program = scattered(GaussianMixture(3, 4))
    before = program.log_prob(x, c).mean().item()
    history = fit(program, {"x": x, "c": c}, epochs=2, batch_size=60, seed=0, progress=False)
    assert history[0]["loss"] == pytest.approx(-before, abs=1e-10)
    assert history[1]["elbo"] == pytest.approx(program.log_prob(x, c).mean().item(), abs=1e-10)


# Agreement with classes


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(3, 3), (4, 2), (2, 4)])
def test_accuracy_is_the_best_over_all_matchings(num_clusters, num_classes):
    g = torch.Generator().manual_seed(num_clusters)
    for _ in range(20):
        found, true = (torch.randint(n, (12,), generator=g) for n in (num_clusters, num_classes))
        found[:num_clusters], true[-num_classes:] = torch.arange(num_clusters), torch.arange(num_classes)
        size = max(num_clusters, num_classes)
        best = max((torch.tensor(p)[found] == true).sum().item() for p in itertools.permutations(range(size)))
        assert agreement(found, true).accuracy == best / 12


def test_agreement_does_not_look_at_numbers():
    found, true = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([7, 7, -3, 5, 5])
    assert agreement(found, true) == agreement(true, found)
    perfect = agreement(found, true)
    assert (perfect.accuracy, perfect.nmi, perfect.ari) == pytest.approx((1, 1, 1))
    # two pairs kept of two, one pair too many: Rand index by hand
    mixed = agreement(torch.tensor([0, 0, 0, 1, 1]), true)
    pairs, expected = 2, 4 * 2 / 10
    assert mixed.ari == pytest.approx((pairs - expected) / ((4 + 2) / 2 - expected))


def test_evaluate_scores_the_clusters():
    x, c = blobs(200, seed=3)
    program = GaussianMixture(3, 4).start_from(x, seed=0)
    program.em(x, progress=False)
    plain = evaluate(program, x, 1, progress=False)
    result = evaluate(program, x, 1, classes=c, batch_size=70, progress=False)
    assert result.clustering == agreement(program.predict(x).argmax(1), c)
    assert torch.equal(result.log_px, plain.log_px)
    assert result.summary()["accuracy"] == result.clustering.accuracy
    assert {"nmi", "ari"} <= result.summary().keys()
    assert f"accuracy {result.clustering.accuracy:.2%}" in str(result)
    assert "accuracy" not in plain.summary()
    assert "clusters" not in str(plain)


# What is refused


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "classes of 5 data; got 4"),
        (torch.zeros(5), "integers"),
        (torch.zeros(5, 1, dtype=torch.int64), r"integers \(N,\)"),
        ([0, 1, 0, 1, 0], "tensor of integers"),
    ],
)
def test_classes_that_do_not_fit_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(GaussianMixture(3, 2), torch.zeros(5, 3), 1, classes=classes, progress=False)


def test_classes_of_a_program_without_clusters_are_refused():
    classes = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a program with a label 'y'.*with classes; got VAE"):
        evaluate(VAE.mlp(3, 2, (4,)), torch.zeros(5, 3), 1, classes=classes, progress=False)
    with pytest.raises(ValueError, match="data that do not show it"):
        evaluate(GaussianMixture(3, 2), {"x": torch.zeros(5, 3), "c": classes}, 1, classes=classes, progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture(3, 0), "num_clusters to be a positive whole number; got 0"),
        (lambda: GaussianMixture(0, 2), "dim to be a positive whole number; got 0"),
        (lambda: GaussianMixture(3, 2, "tied"), "covariance to be one of diagonal, full; got 'tied'"),
        (lambda: GaussianMixture(3, 5).start_from(torch.zeros(4, 3), 0), "a datum for each of 5 clusters.*got 4"),
        (lambda: GaussianMixture(3, 5).em(torch.zeros(4, 3)), "a datum for each of 5 clusters.*got 4"),
        (lambda: GaussianMixture(3, 2).start_from(torch.zeros(9, 4), 0), r"x of shape \(N, 3\); got \(9, 4\)"),
        (lambda: GaussianMixture(3, 2).em(torch.zeros(9)), r"x of shape \(N, 3\); got \(9,\)"),
        (lambda: GaussianMixture(3, 2).em(torch.zeros(9, 3), floor=-1.0), "floor to be a number of at least 0"),
        (lambda: GaussianMixture(3, 2).em(torch.zeros(9, 3), tolerance=math.nan), "tolerance to be a number"),
        (lambda: GaussianMixture(3, 2).em(torch.zeros(9, 3), iterations=0), "iterations to be a positive whole"),
        (lambda: GaussianMixture(3, 2).em(torch.zeros(9, 3), floor=0.0, progress=False), "positive definite"),
        (lambda: GaussianMixture(3, 5).split_and_merge(torch.zeros(4, 3)), "a datum for each of 5 clusters.*got 4"),
        (lambda: GaussianMixtureVAE.mlp(3, 2, 2).start_from(torch.zeros(4, 3), 0, 0), "restarts to be a whole number"),
        (lambda: GaussianMixtureVAE.mlp(3, 0, 2), "num_clusters to be a positive whole number; got 0"),
        (lambda: GaussianMixtureVAE.mlp(3, 5, 2).start_from(torch.zeros(4, 3), 0), "a datum for each of 5 clusters"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
