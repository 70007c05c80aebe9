"""Labels: the objective of labelled and unlabelled data, marginalisation, prediction, and what is refused."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import one_hot as to_one_hot
from torch.testing import assert_close

import pyrovae
from pyrovae import VAE, LatentModel, SemiSupervisedVAE, as_program, checkpoint, data_plate, evaluate, fit, reference
from pyrovae.conditionals import Bernoulli, DiagonalNormal, FullNormal, OneHotCategorical, StandardNormal, one_hot
from pyrovae.data import Data, load, split_labels
from pyrovae.labels import Label, site_of
from pyrovae.nets import MLP, Constant
from pyrovae.supervision import SemiSupervisedELBO, Supervision, log_class
from pyrovae.survey import Survey, draw

CLASSES = 3
everyone = pytest.mark.parametrize("entry", zoo.LABELED.values(), ids=zoo.LABELED)
every_m2 = pytest.mark.parametrize("entry", zoo.M2.values(), ids=zoo.M2)
float64 = pytest.mark.usefixtures("float64")


def labels(n, seed=0):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def scattered(program):
    """The same program with weights that make every term count."""
    for p in program.parameters():
        nn.init.normal_(p, std=0.7)
    return program


def assert_same_gradients(ours: Tensor, by_hand: Tensor, program: LatentModel) -> None:
    parameters = list(program.parameters())
    assert_close(ours, by_hand, rtol=0, atol=1e-10)
    for (name, _), a, b in zip(
        program.named_parameters(),
        torch.autograd.grad(ours, parameters, allow_unused=True, retain_graph=True),
        torch.autograd.grad(by_hand, parameters, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        zero = torch.zeros(())
        assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-10, msg=name)


def labeled_by_hand(program: SemiSupervisedVAE, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    return reference.labeled_elbo(
        x,
        y,
        eps,
        label_logits=torch.zeros(CLASSES),
        posterior_net=program.posterior_net,
        likelihood_net=program.likelihood.eta,
        posterior=program.posterior.by_hand(reference.POSTERIORS)[0],
        likelihood=program.likelihood.by_hand(reference.LIKELIHOODS),
    )


def noise(*shape: int) -> Tensor:
    """What a Pyro program draws for its first Gaussian site after this seed."""
    torch.manual_seed(1)
    return torch.normal(torch.zeros(shape), torch.ones(shape))


# The objective


@every_m2
@float64
def test_the_loss_of_labelled_data_is_that_by_hand(entry):
    program, x, y = scattered(entry.make()), entry.data(5), labels(5)
    eps = noise(5, 2)
    torch.manual_seed(1)
    loss = Trace_ELBO().differentiable_loss(program.model, program.guide, x, y)
    assert_same_gradients(-loss, labeled_by_hand(program, x, one_hot(y, CLASSES), eps).sum(), program)


@every_m2
@float64
def test_the_enumerated_loss_is_the_sum_over_classes_by_hand(entry):
    program, x = scattered(entry.make()), entry.data(5)
    eps = noise(5, 2) if program.factorized else noise(CLASSES, 5, 2)
    elbo = SemiSupervisedELBO(Trace_ELBO(), Label("y", torch.eye(CLASSES)), nesting=1)
    torch.manual_seed(1)
    scales = {"unlabeled": 1.0, "labeled": 0.0, "classes": 0.0}
    loss = elbo.differentiable_loss(program.model, program.guide, {"x": x}, None, scales)
    every = torch.eye(CLASSES).unsqueeze(1).expand(-1, 5, -1)
    each = labeled_by_hand(program, x, every, eps.expand(CLASSES, 5, 2))
    by_hand = reference.unlabeled_elbo(each, program.classifier.eta(x)).sum()
    assert_same_gradients(-loss, by_hand, program)


@float64
def test_the_notes_variant_is_reconstruction_less_two_divergences():
    program, x = scattered(zoo.LABELED["M2 factorized"].make()), zoo.LABELED["M2"].data(4)
    eps = noise(4, 2)
    every = torch.eye(CLASSES).unsqueeze(1).expand(-1, 4, -1)
    eta, logits = program.posterior.eta(x), program.classifier.eta(x)
    z, log_q_z = reference.diagonal_normal(eps, eta)
    q_y = logits.softmax(-1)
    log_px = torch.stack([reference.log_bernoulli(x, program.likelihood.eta(y, z)) for y in every])
    reconstruction = (q_y.T * log_px).sum(0)
    kl_y = (q_y * (q_y * CLASSES).log()).sum(-1)
    expected = reconstruction - (log_q_z - reference.log_standard_normal(z)) - kl_y
    each = labeled_by_hand(program, x, every, eps.expand(CLASSES, 4, 2))
    assert_close(reference.unlabeled_elbo(each, logits), expected, rtol=0, atol=1e-10)


class Mixture(LatentModel):
    """p(y) p(x | y), all known exactly: its losses have no noise."""

    def __init__(self):
        super().__init__()
        self.p_x, self.q_y = Bernoulli.mlp(CLASSES, 4, ()), OneHotCategorical.mlp(4, CLASSES, ())

    def model(self, x=None, y=None):
        with data_plate(x):
            y = pyro.sample(
                "y", dist.OneHotCategorical(torch.ones(CLASSES) / CLASSES), obs=y if y is None else one_hot(y, CLASSES)
            )
            return pyro.sample("x", self.p_x(y), obs=x)

    def guide(self, x, y=None):
        with data_plate(x):
            if y is None:
                pyro.sample("y", self.q_y(x))


@float64
@pytest.mark.parametrize("sizes", [(5, 2, 3, 2), (4, 3, 2, 5), (6, 4, 5, 1), (3, 3, 4, 3)], ids=str)
def test_the_objective_is_unbiased_over_all_minibatches(sizes):
    """Averaged over all pairs of minibatches it is that of all the data, also for the ragged last minibatch."""
    num_unlabeled, batch_size, num_labeled, labeled_batch_size = sizes
    program = scattered(Mixture())
    x, x_l, y = (torch.randn(num_unlabeled + num_labeled, 4) > 0).double(), None, labels(num_labeled)
    x, x_l = x[:num_unlabeled], x[num_unlabeled:]
    alpha = 0.7
    every = torch.eye(CLASSES).unsqueeze(1)
    log_joint = [
        reference.log_bernoulli(part, program.p_x.eta(every)) - math.log(CLASSES) for part in (x, x_l)
    ]  # (C, N)
    by_hand = reference.semi_supervised_objective(
        log_joint[1].gather(0, y.unsqueeze(0)).squeeze(0),
        reference.unlabeled_elbo(log_joint[0], program.q_y.eta(x)),
        one_hot(y, CLASSES),
        program.q_y.eta(x_l),
        alpha,
    )
    with pytest.warns(UserWarning, match="no datum of class") if len(set(y.tolist())) < CLASSES else _no_warning():
        supervision = Supervision(program, Data((x_l, y)), num_unlabeled, labeled_batch_size, alpha)
    elbo = SemiSupervisedELBO(Trace_ELBO(), supervision.label, 1)
    loss = elbo(program.model, program.guide)
    steps = list(supervision.joined(Data(x).batches(batch_size), torch.Generator().manual_seed(0)))
    shares = [num_data / (num_unlabeled + num_labeled) for _, num_data in steps]
    assert sum(shares) == pytest.approx(1)
    assert {len(arguments["labeled"]["y"]) for arguments, _ in steps} == {min(labeled_batch_size, num_labeled)}
    for (arguments, _), share in zip(steps, shares, strict=True):
        b, b_l = len(arguments["unlabeled"]["x"]), len(arguments["labeled"]["y"])
        found = [
            loss({"x": x[list(u)]}, {"x": x_l[list(s)], "y": y[list(s)]}, arguments["scales"]) / share
            for u in itertools.combinations(range(num_unlabeled), b)
            for s in itertools.combinations(range(num_labeled), b_l)
        ]
        assert_same_gradients(torch.stack(found).mean(), by_hand, program)


def _no_warning():
    import warnings

    return warnings.catch_warnings()


@float64
def test_labelled_data_alone_are_weighed_as_supervised_training():
    program, x, y = scattered(Mixture()), (torch.randn(5, 4) > 0).double(), torch.tensor([0, 1, 2, 0, 1])
    supervision = Supervision(program, Data((x, y)), 0, 2, 3.0)
    elbo = SemiSupervisedELBO(Trace_ELBO(), supervision.label, 1)(program.model, program.guide)
    steps = supervision.joined(Data((x, y)).batches(2), torch.Generator())
    found = sum(elbo(**arguments) for arguments, _ in steps)
    log_px = reference.log_bernoulli(x, program.p_x.eta(one_hot(y, CLASSES))) - math.log(CLASSES)
    nothing = torch.zeros(0)
    by_hand = reference.semi_supervised_objective(log_px, nothing, one_hot(y, CLASSES), program.q_y.eta(x), 3.0)
    assert_same_gradients(found, by_hand, program)


@float64
def test_the_classification_term_is_read_from_any_guide():
    """A guide of bare Pyro, with integer classes and a latent before the class."""
    net = nn.Linear(1, CLASSES)

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Categorical(logits=torch.zeros(CLASSES)), obs=y)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], 1e-12))
            if y is None:
                pyro.sample("y", dist.Categorical(logits=net(z.unsqueeze(-1))))

    x, y = torch.randn(6, 1), labels(6)
    found = log_class(model, guide, {"x": x, "y": y}, Label("y", torch.arange(CLASSES)))
    assert_close(found, net(x).log_softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1), atol=1e-10, rtol=0)


# Marginalisation


@everyone
@float64
def test_weights_are_summed_over_the_classes(entry):
    program, x = scattered(entry.make()), entry.data(4)
    survey = Survey.of(program, {"x": x})
    assert survey.label is not None
    assert survey.vectorized
    drawn = draw(program, {"x": x}, 2, survey)
    others = {name: site for name, site in drawn.drawn.guide_sites.items() if name != program.label}
    draws = {name: site["value"].unflatten(1, (CLASSES, 4)) for name, site in others.items()}  # (K, C, N, D)
    log_w, log_q, elbo = torch.zeros(2, CLASSES, 4), torch.zeros(2, CLASSES, 4), torch.zeros(2, 4)
    for k, c, i in itertools.product(range(2), range(CLASSES), range(4)):
        one = {"x": x[i : i + 1], program.label: torch.tensor([c])}
        at = {name: value[k, c, i : i + 1] for name, value in draws.items()}
        model = poutine.trace(poutine.condition(program.model, at)).get_trace(**one)
        guide = poutine.trace(poutine.condition(program.guide, at)).get_trace(**one)
        log_w[k, c, i] = model.log_prob_sum() - guide.log_prob_sum()
        site = site_of(poutine.condition(program.guide, at), program.label, {"x": x[i : i + 1]})
        log_q[k, c, i] = site["fn"].logits[0, c]
        elbo[k, i] += log_q[k, c, i].exp() * (log_w[k, c, i] - log_q[k, c, i])
    assert_close(drawn.log_joint, log_w, rtol=0, atol=1e-10)
    assert_close(drawn.log_weights, log_w.logsumexp(1), rtol=0, atol=1e-10)
    assert_close(drawn.log_px_z - drawn.kl, elbo, rtol=0, atol=1e-10)
    assert_close(log_q.exp().sum(1), torch.ones(2, 4), rtol=0, atol=1e-10)
    shown = pyrovae.log_weights(program, {"x": x, program.label: labels(4)}, 2)
    assert shown.shape == (2, 4)
    assert list(drawn.posterior_means()) == list(others)


@everyone
@float64
def test_compare_takes_data_that_show_the_label_or_hide_it(entry):
    program, x = scattered(entry.make()), entry.data(4)
    for batch in ({"x": x}, {"x": x, program.label: labels(4)}):
        difference = pyrovae.compare(program, batch, 1, elbo_draws=3, seed=0, progress=False).difference
        assert difference is not None
        assert difference < 1e-9


def gaussian_mixture() -> tuple[SemiSupervisedVAE, Tensor, Tensor]:
    """x | y, z ~ N(W (y, z) + b, s^2 I): given the class a linear-Gaussian model, so that log p(x, y) is exact."""
    torch.manual_seed(3)
    program = SemiSupervisedVAE(
        OneHotCategorical(Constant(CLASSES, learned=True)),
        StandardNormal(2),
        DiagonalNormal.mlp(CLASSES + 2, 4, ()),
        OneHotCategorical.mlp(4, CLASSES, ()),
        DiagonalNormal.mlp(4 + CLASSES, 2, ()),
    )
    with torch.no_grad():
        program.label_prior.net.value.copy_(torch.tensor([0.0, 1.0, -0.5]))
        layer = program.likelihood.net.layers[0]
        layer.weight[4:] = 0.0
        layer.bias[4:] = -0.3
        layer.weight[:4] *= 2
        weight, bias = layer.weight[:4].clone(), layer.bias[:4].clone()
        # the posterior's mean given the class, and a width of 1, wider than it is
        w_y, w_z = weight.split([CLASSES, 2], 1)
        mean = torch.linalg.solve(w_z.T @ w_z + math.exp(-0.6) * torch.eye(2), w_z.T)
        guide = program.posterior.net.layers[0]
        guide.weight.copy_(torch.cat([torch.cat([mean, -mean @ w_y], 1), torch.zeros(2, 4 + CLASSES)]))
        guide.bias.copy_(torch.cat([-mean @ bias, torch.zeros(2)]))
    x = program.sample(8)
    prior = torch.tensor([0.0, 1.0, -0.5]).log_softmax(0)
    exact = [
        prior[c] + reference.linear_gaussian_log_prob(x, weight[:, CLASSES:], bias + weight[:, c], torch.tensor(-0.3))
        for c in range(CLASSES)
    ]
    return program, x, torch.stack(exact)


@float64
def test_evaluate_marginalises_the_label_exactly():
    program, x, exact = gaussian_mixture()
    result = evaluate(program, x, 4000, seed=0, progress=False)
    apart = (result.log_px - exact.logsumexp(0)) / result.standard_error
    assert (apart.abs() < 5).all(), "seed 0"
    assert result.standard_error.max() < 0.1
    assert (result.elbo < exact.logsumexp(0)).all()


@float64
@pytest.mark.parametrize("compile", [False, True])
def test_classify_is_the_generative_posterior(compile):
    program, x, exact = gaussian_mixture()
    found = pyrovae.classify(program, x, 20_000, seed=0, compile=compile, progress=False)
    assert found.shape == (8, CLASSES)
    assert_close(found, exact.softmax(0).T, atol=0.02, rtol=0)
    assert not torch.allclose(found, program.predict(x), atol=0.1), "it does not use q(y | x)"


def test_evaluate_compiled_and_not_agree():
    program, x = zoo.LABELED["M2"].make(), zoo.LABELED["M2"].data(30)
    ours, theirs = (
        evaluate(program, x, 3000, seed=0, compile=compile, batch_size=30, chunk_size=3000, progress=False)
        for compile in (True, False)
    )
    assert_close(ours.log_px, theirs.log_px, rtol=0, atol=1e-4)
    assert_close(ours.elbo, theirs.elbo, rtol=0, atol=1e-4)


# Use


@every_m2
def test_predicts_samples_encodes_reconstructs(entry):
    program, x = entry.make(), entry.data(5)
    assert_close(program.predict(x), program.classifier.eta(x).softmax(-1))
    assert_close(program.predict((x, labels(5))), program.predict(x))
    torch.manual_seed(0)
    drawn = program.sample(3, y=2, mean=True)
    torch.manual_seed(0)
    z = torch.normal(torch.zeros(3, 2), torch.ones(3, 2))
    y = one_hot(torch.full((3,), 2), CLASSES)
    assert_close(drawn, program.likelihood(y, z).mean)
    assert_close(program.sample(3, y=labels(3), mean=True).shape, torch.Size([3, 6]))
    mode = to_one_hot(program.predict(x).argmax(1), CLASSES).float()
    codes = program.encode(x, "z")
    expected = program.posterior(x) if program.factorized else program.posterior(x, mode)
    assert_close(codes, expected.mean)
    assert torch.equal(program.encode(x, "y"), mode)
    assert_close(program.reconstruct(x), program.likelihood(mode, codes).mean)


@pytest.mark.parametrize(("name", "compile"), [*((name, False) for name in zoo.LABELED), ("M2", True)])
def test_trains_resumes_saves_loads(name, compile, tmp_path):
    entry = zoo.LABELED[name]
    x, label = entry.data(30), entry.make().label
    labeled, val = ({"x": entry.data(n, seed), label: labels(n, seed)} for n, seed in ((12, 1), (20, 2)))
    settings = {"labeled": labeled, "batch_size": 8, "labeled_batch_size": 5, "seed": 0, "progress": False}
    runs = {}
    for name, epochs in (("whole", (4,)), ("halves", (2, 4))):
        for n in epochs:
            torch.manual_seed(5)
            program = entry.make()
            before = {key: value.clone() for key, value in program.state_dict().items()}
            history = fit(
                program, x, val, epochs=n, run_dir=tmp_path / name, resume=n == 4 and name == "halves",
                compile=compile, **settings,
            )  # fmt: skip
            unchanged = [key for key, value in program.state_dict().items() if torch.equal(value, before[key])]
            assert not unchanged or history[-1]["epoch"] == 4
        runs[name] = program, history
    (whole, history), (halves, again) = runs.values()
    assert {"labeled_elbo", "cross_entropy", "val_error", "elbo"} <= history[-1].keys()
    assert [row["loss"] for row in history] == [row["loss"] for row in again]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    )
    best = min(row["val_error"] for row in history)
    assert ((whole.predict(val).argmax(1) != val[label]).double().mean().item()) == pytest.approx(best)
    pyrovae.save(whole, tmp_path / "a.safetensors")
    assert_close(pyrovae.load(tmp_path / "a.safetensors").predict(x), whole.predict(x))
    assert (tmp_path / "whole" / checkpoint.WEIGHTS).read_bytes() == (
        tmp_path / "halves" / checkpoint.WEIGHTS
    ).read_bytes()


@float64
@pytest.mark.parametrize("labels_are", ["enumerate", "sample"])
def test_compiled_training_stays_with_uncompiled_training(labels_are):
    entry = zoo.LABELED["M2"]
    x, labeled = entry.data(30), (entry.data(12, 1), labels(12, 1))
    found = []
    for compile in (True, False):
        torch.manual_seed(0)
        program = entry.make()
        fit(program, x, labeled=labeled, epochs=5, batch_size=8, seed=0, compile=compile, labels=labels_are,
            progress=False)  # fmt: skip
        found.append(program)
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-10, msg=name)


class Two(LatentModel):
    """p(y) p(a | y) p(b) p(x | a, b): the label acts on one of two latents; classes are integers."""

    def __init__(self):
        super().__init__()
        self.p_a, self.p_x = DiagonalNormal.mlp(2, 2, (8,)), DiagonalNormal.mlp(4, 6, (16,))
        self.q_y, self.q_a = OneHotCategorical.mlp(6, 2, (16,)), DiagonalNormal.mlp(8, 2, (16,))
        self.q_b = DiagonalNormal.mlp(6, 2, (16,))
        self.p_b = StandardNormal(2)

    def model(self, x=None, y=None):
        with data_plate(x):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(2)), obs=y)
            a = pyro.sample("a", self.p_a(torch.eye(2)[y]))
            b = pyro.sample("b", self.p_b())
            return pyro.sample("x", self.p_x(a, b), obs=x)

    def guide(self, x, y=None):
        with data_plate(x):
            if y is None:
                y = pyro.sample("y", dist.Categorical(logits=self.q_y.eta(x)))
            pyro.sample("a", self.q_a(x, torch.eye(2)[y]))
            pyro.sample("b", self.q_b(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_program_of_ones_own_trains_by_the_same_call(wrapped):
    torch.manual_seed(0)
    y = torch.randint(2, (400,))
    x = torch.randn(400, 6) + 2.0 * (2 * y - 1).unsqueeze(1) * torch.tensor([1.0, -1, 1, 0, 0, 0])
    program: LatentModel = Two()
    if wrapped:
        inner = program
        program = as_program(lambda x, y=None: inner.model(x, y), lambda x, y=None: inner.guide(x, y))
    history = fit(
        program, x[20:200], (x[200:], y[200:]), labeled=(x[:20], y[:20]), epochs=30, batch_size=20, lr=5e-3, seed=0,
        progress=False,
    )  # fmt: skip
    assert min(row["val_error"] for row in history) < 0.05
    assert history[-1]["elbo"] > history[0]["elbo"]
    assert program.predict(x).shape == (400, 2)


def test_no_unlabelled_data_is_supervised_training():
    torch.manual_seed(0)
    y = labels(60)
    x = (torch.rand(60, 6) < 0.1 + 0.8 * (to_one_hot(y, CLASSES).repeat(1, 2))).float()
    program = zoo.LABELED["M2"].make()
    history = fit(program, labeled=(x, y), val=(x, y), epochs=40, batch_size=20, lr=1e-2, seed=0, progress=False)
    assert history[-1]["val_error"] < 0.1
    assert "labeled_elbo" not in history[-1]
    labeled = evaluate(program, (x, y), 50, seed=0, progress=False)
    assert history[-1]["elbo"] == pytest.approx(labeled.elbo.mean().item(), abs=1.0)


# Data


def test_split_labels_is_balanced_and_loses_nothing():
    x, y = torch.arange(40.0).unsqueeze(1), torch.arange(40) % 4
    labeled, unlabeled = split_labels((x, y), 3, seed=1)
    assert labeled["y"].bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(labeled["x"].squeeze(1).long() % 4, labeled["y"])
    assert list(unlabeled.tensors) == ["x"]
    assert sorted(torch.cat([labeled["x"], unlabeled["x"]]).flatten().tolist()) == x.flatten().tolist()
    again, other = split_labels((x, y), 3, seed=1)[0], split_labels((x, y), 3, seed=2)[0]
    assert torch.equal(again["x"], labeled["x"])
    assert not torch.equal(other["x"], labeled["x"])


@pytest.mark.parametrize(
    ("data", "per_class", "message"),
    [
        (torch.zeros(4, 2), 1, "integer labels y"),
        ((torch.zeros(4, 2), torch.eye(4)), 1, "integer labels y"),
        ((torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])), 0, "per_class to be a whole number of at least 1; got 0"),
        ((torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])), 2, "at least per_class=2 data of each class; got 1 of 1"),
        ((torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])), 2, "all of them"),
    ],
)
def test_split_labels_refuses(data, per_class, message):
    with pytest.raises(ValueError, match=message):
        split_labels(data, per_class)


def test_endless_minibatches_have_one_size_and_take_all_data_equally_often():
    batches = Data(torch.arange(5.0).unsqueeze(1)).endless(3, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches)["x"] for _ in range(50)]).flatten()
    assert len(seen) == 150
    assert seen.long().bincount().tolist() == [30] * 5


def test_what_is_shown_may_be_made_anew_each_time():
    data = Data(
        (torch.zeros(6, 1), torch.arange(6)), show=lambda batch: {**batch, "x": torch.randn(len(batch["x"]), 1)}
    )
    assert not data.fixed
    first, second = (next(data.rows(slice(4)).to("cpu").batches(4)) for _ in range(2))
    assert first["y"].tolist() == [0, 1, 2, 3]
    assert not torch.equal(first["x"], second["x"])


@float64
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_a_network_of_parts_is_the_network(hidden):
    net = MLP(9, 4, hidden)
    a, b, c = torch.randn(3, 1, 2), torch.randn(5, 4), torch.randn(3)
    whole = torch.cat([a.expand(3, 5, 2), b.expand(3, 5, 4), c.expand(3, 5, 3)], -1)
    assert_close(net.joined(a, b, c), net(whole), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="parents of 9 values"):
        net.joined(a, b)


# What is refused


def m2() -> SemiSupervisedVAE:
    return zoo.LABELED["M2"].make()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), r"labeled\['y'\] among 3 classes; got 3 at index 3"),
        (torch.tensor([0, -1, 2, 1]), "got -1 at index 1"),
        (torch.eye(4)[:, :3], "integers.*argmax"),
        (torch.zeros(4), "integers"),
    ],
)
def test_labels_that_are_none_of_the_classes_are_refused(y, message):
    x = zoo.LABELED["M2"].data(4)
    with pytest.raises(ValueError, match=message):
        fit(m2(), x, labeled=(x, y), epochs=1, progress=False)


def test_validation_labels_that_are_none_of_the_classes_are_refused():
    x = zoo.LABELED["M2"].data(4)
    with pytest.raises(ValueError, match=r"val\['y'\] among 3 classes; got 7 at index 0"):
        fit(m2(), x, (x, torch.tensor([7, 0, 1, 2])), labeled=(x, torch.tensor([0, 1, 2, 0])), progress=False)


class OneHotMixture(Mixture):
    """Takes its labels as one-hot vectors."""

    def model(self, x=None, y=None):
        with data_plate(x):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(CLASSES) / CLASSES), obs=y)
            return pyro.sample("x", self.p_x(y), obs=x)


def test_integers_where_one_hot_vectors_are_expected_are_refused():
    x, y = (torch.randn(4, 4) > 0).float(), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="one-hot"):
        fit(OneHotMixture(), x, labeled=(x, y), progress=False)
    history = fit(OneHotMixture(), x, labeled=(x, one_hot(y, CLASSES)), epochs=1, progress=False)
    assert "cross_entropy" in history[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "labeled to hold labels 'y'; got x"),
        ({"train": None}, "train, or labeled; got neither"),
        ({"supervised_weight": 1.0}, "labeled, data with labels"),
        ({"labeled": True, "supervised_weight": -1.0}, "supervised_weight to be a number of at least 0"),
        ({"labeled": True, "labels": "guess"}, "labels to be one of enumerate, sample"),
        ({"labeled": True, "labeled_batch_size": 0}, "labeled_batch_size to be a positive whole number"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    x, y = zoo.LABELED["M2"].data(4), torch.tensor([0, 1, 2, 0])
    given = {"train": x, "labeled": x} if not arguments else {"train": x, **arguments}
    if given.get("labeled") is True:
        given["labeled"] = (x, y)
    with pytest.raises(ValueError, match=message):
        fit(m2(), progress=False, **given)


def test_a_loader_of_labelled_data_is_refused():
    x, y = zoo.LABELED["M2"].data(4), torch.tensor([0, 1, 2, 0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y))
    with pytest.raises(ValueError, match="in memory; got a DataLoader"):
        fit(m2(), x, labeled=loader, progress=False)


def test_a_class_without_a_label_is_named():
    x = zoo.LABELED["M2"].data(4)
    with pytest.warns(UserWarning, match="no datum of class 1 of 3"):
        fit(m2(), x, labeled=(x, torch.tensor([0, 0, 2, 2])), epochs=1, progress=False)


@pytest.mark.parametrize("call", ["fit", "predict", "classify"])
def test_a_program_without_a_label_is_refused(call):
    program, x = pyrovae.VAE.mlp(4, 2, (3,)), torch.zeros(4, 4)
    calls = {
        "fit": lambda: fit(program, x, labeled=(x, torch.zeros(4, dtype=torch.int64)), progress=False),
        "predict": lambda: program.predict(x),
        "classify": lambda: pyrovae.classify(program, x, progress=False),
    }
    with pytest.raises(ValueError, match=r"a program with a label 'y'.*got VAE"):
        calls[call]()


# M1+M2


def test_m2_learns_on_latents_that_m1_draws_anew():
    """The stacked model of Kingma et al. (2014): 50 labels of digits, and the rest without."""
    digits = load("digits", binarize="dynamic", labels=True)
    torch.manual_seed(0)
    m1 = VAE.mlp(64, 10, (100,))
    fit(m1, digits.train.select("x"), epochs=40, lr=3e-3, seed=0, progress=False)

    def features(part: Data) -> dict[str, Tensor]:
        with torch.no_grad():
            q = m1.posterior(part["x"])
        return {**part.tensors, "x": q.mean, "scale": q.stddev}

    def drawn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"] + batch["scale"] * torch.randn_like(batch["x"])
        return {"x": x} | {key: value for key, value in batch.items() if key == "y"}

    labeled, unlabeled = (Data(features(part), show=drawn) for part in split_labels(digits.train, per_class=5, seed=0))
    test = features(digits.test)
    first, second = (torch.cat([batch["x"] for batch in unlabeled.batches(100)]) for _ in range(2))
    noise = (first - second) / (2**0.5 * unlabeled["scale"])
    assert noise.std().item() == pytest.approx(1.0, abs=5 / (2 * noise.numel()) ** 0.5), "draws are new each time"
    m2 = SemiSupervisedVAE.mlp(10, 10, 2, (50,), likelihood=FullNormal)
    fit(m2, unlabeled, labeled=labeled, epochs=30, lr=5e-3, seed=0, supervised_weight=1400.0, progress=False)
    wrong = m2.predict(test["x"]).argmax(1) != test["y"]
    assert wrong.float().mean() < 0.4, "seed 0; by chance it is 0.9"
