"""Sequences: exact likelihoods, exact posteriors, padding that counts for nothing."""

import itertools

import pyro
import pytest
import torch
import zoo
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae import (
    DeepMarkovModel,
    HiddenMarkovModel,
    LinearGaussianStateSpace,
    evaluate,
    fit,
    log_weights,
    pad,
    reference,
)
from pyrovae.conditionals import Bernoulli, DiagonalNormal, MarkovChain, OneHotCategorical, RecurrentPosterior
from pyrovae.data import Data
from pyrovae.nets import BackwardRNN, Combiner, GatedTransition
from pyrovae.sequences import trim

LENGTHS = torch.tensor([5, 1, 3, 5])


def sequences(seed=0, binary=False):
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.get_default_dtype())
    return {"x": (x > 0).to(x.dtype) if binary else x, "lengths": LENGTHS}


def scattered(program, scale=0.3, seed=1):
    """The program with all parameters away from what they begin with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in program.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return program


def dense_joint(program, num_steps):
    """Mean and covariance of z and x of all steps, by unrolling the chain as one linear map of its noise."""
    parts = program._by_hand()
    d, a, c = program.z_dim, parts["transition"], parts["emission"]
    z_of_noise = torch.zeros(num_steps * d, num_steps * d, dtype=torch.float64)
    for t, s in itertools.product(range(num_steps), repeat=2):
        if s <= t:
            z_of_noise[t * d : t * d + d, s * d : s * d + d] = torch.linalg.matrix_power(a, t - s)
    noise = torch.block_diag(parts["initial_covariance"], *[parts["transition_covariance"]] * (num_steps - 1))
    cov_z = z_of_noise @ noise @ z_of_noise.T
    mean_z = torch.cat([torch.linalg.matrix_power(a, t) @ parts["initial_mean"] for t in range(num_steps)])
    emission = torch.block_diag(*[c] * num_steps)
    cov_x = emission @ cov_z @ emission.T + torch.block_diag(*[parts["emission_covariance"]] * num_steps)
    return mean_z, cov_z, emission @ mean_z + parts["bias"].repeat(num_steps), cov_x, emission


@pytest.mark.usefixtures("float64")
def test_kalman_filter_and_smoother_are_the_dense_gaussian():
    program, batch = scattered(LinearGaussianStateSpace(3, 2)), sequences()
    log_px, (mean, covariance) = program.log_prob(**batch), program.smooth(**batch)
    for i, n in enumerate(LENGTHS.tolist()):
        mean_z, cov_z, mean_x, cov_x, emission = dense_joint(program, n)
        x = batch["x"][i, :n].flatten()
        assert_close(log_px[i], MultivariateNormal(mean_x, cov_x).log_prob(x), rtol=0, atol=1e-10)
        gain = torch.linalg.solve(cov_x, emission @ cov_z).T
        assert_close(mean[i, :n].flatten(), mean_z + gain @ (x - mean_x), rtol=0, atol=1e-10)
        posterior = cov_z - gain @ emission @ cov_z
        for t in range(n):
            assert_close(covariance[i, t], posterior[2 * t : 2 * t + 2, 2 * t : 2 * t + 2], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_forward_and_backward_are_the_sum_over_all_paths():
    program, batch = scattered(HiddenMarkovModel.linear(3, 3), 1.0), sequences(binary=True)
    log_px, marginals = program.log_prob(**batch), program.smooth(**batch)
    log_initial, log_transition, log_likelihood = program._log_probs(batch["x"])
    for i, n in enumerate(LENGTHS.tolist()):
        paths = torch.tensor(list(itertools.product(range(3), repeat=n)))
        log_joint = log_initial[paths[:, 0]] + log_likelihood[i, range(n), paths].sum(1)
        log_joint += log_transition[paths[:, :-1], paths[:, 1:]].sum(1)
        assert_close(log_px[i], log_joint.logsumexp(0), rtol=0, atol=1e-10)
        states = nn.functional.one_hot(paths, 3).double()
        expected = (log_joint.softmax(0)[:, None, None] * states).sum(0)
        assert_close(marginals[i, :n], expected, rtol=0, atol=1e-10)
        assert not marginals[i, n:].any()
        by_hand = reference.hidden_markov_log_joint(
            states.unsqueeze(1), log_initial, log_transition, log_likelihood[i : i + 1, :n], LENGTHS[i : i + 1]
        )
        assert_close(by_hand[:, 0], log_joint, rtol=0, atol=1e-10)


EXACT = {
    "LinearGaussianStateSpace": lambda: scattered(LinearGaussianStateSpace(3, 2)),
    "HiddenMarkovModel": lambda: scattered(HiddenMarkovModel.linear(3, 3, DiagonalNormal), 1.0),
}
exact = pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)


@exact
@pytest.mark.usefixtures("float64")
def test_with_the_exact_posterior_every_weight_is_the_likelihood(make):
    program, batch = make(), sequences()
    assert_close(log_weights(program, batch, 7), program.log_prob(**batch).expand(7, 4), rtol=0, atol=1e-10)


@exact
@pytest.mark.usefixtures("float64")
def test_draws_of_the_exact_posterior_have_its_moments(make):
    program, batch = make(), sequences()
    with torch.no_grad():
        draws = program.exact_posterior(**batch).sample(torch.Size([4000]))
        smoothed = program.smooth(**batch)
    mean = smoothed[0] if isinstance(smoothed, tuple) else smoothed
    real = torch.arange(5) < LENGTHS.unsqueeze(1)
    covariance = smoothed[1] if isinstance(smoothed, tuple) else torch.diag_embed(mean * (1 - mean))
    error = (covariance.diagonal(dim1=-2, dim2=-1)[real] / 4000).sqrt()
    assert ((draws.mean(0)[real] - mean[real]).abs() < 5 * error).all(), "seed 0"


@pytest.mark.usefixtures("float64")
def test_hidden_markov_gradient_is_that_of_the_likelihood_in_expectation():
    """Fisher's identity, E_p(z|x)[grad log p(x, z)] = grad log p(x): what lets the exact guide pass none."""
    program, batch = EXACT["HiddenMarkovModel"](), sequences()
    parameters = list(program.parameters())
    truth = torch.autograd.grad(program.log_prob(**batch).sum(), parameters)
    draws = []
    with pyro.validation_enabled(False):
        for _ in range(400):
            loss = Trace_ELBO().differentiable_loss(program.model, program.guide, **batch)
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss, parameters)]))
    draws, truth = torch.stack(draws), torch.cat([g.flatten() for g in truth])
    assert ((draws.mean(0) - truth).abs() < 5 * draws.std(0) / 400**0.5 + 1e-12).all(), "seed 0"


def recurrent(family):
    dim = 3 if family is OneHotCategorical else 2
    return RecurrentPosterior(BackwardRNN(3, 8, "gru"), family.mlp(dim + 8, dim, ()), dim)


INEXACT = {
    "LinearGaussianStateSpace": lambda: scattered(LinearGaussianStateSpace(3, 2, recurrent(DiagonalNormal)), 0.1),
    "HiddenMarkovModel": lambda: scattered(
        HiddenMarkovModel(3, DiagonalNormal.mlp(3, 3, ()), recurrent(OneHotCategorical)), 0.1
    ),
}


@pytest.mark.parametrize("make", INEXACT.values(), ids=INEXACT)
def test_importance_sampling_over_whole_sequences_finds_the_likelihood(make):
    """Every sequence within 5 of its standard errors, K = 4000, with a guide that is learned and not exact."""
    program, lengths = make(), torch.arange(300) % 5 + 1
    for name, p in program.named_parameters():
        p.requires_grad_(name.startswith("posterior"))
    batch = {"x": program.sample(300, lengths=lengths), "lengths": lengths}
    fit(program, batch, epochs=100, batch_size=50, lr=1e-2, seed=0, progress=False)
    few = {key: value[:50] for key, value in batch.items()}
    result = evaluate(program, few, 4000, seed=0, progress=False)
    truth = program.log_prob(**few).double()
    assert ((result.log_px - truth).abs() < 5 * result.standard_error).all(), "seed 0"
    assert result.standard_error.median() > 0.002, "the guide is exact: nothing is tested"
    assert result.k_hat.nanmedian() < 0.7
    assert (result.elbo - truth).mean() < -0.02


@pytest.mark.parametrize("name", [name for name, entry in zoo.PROGRAMS.items() if entry.num_steps])
def test_padding_counts_for_nothing(name):
    """Sequences padded with garbage give the numbers of unpadded ones, to the last bit."""
    entry = zoo.PROGRAMS[name]
    program, batch = entry.make(), entry.batch(4)
    batch["lengths"] = torch.tensor([3, 2, 3, 1])
    bare = trim(batch)
    assert bare["x"].shape[1] == 3
    beyond = torch.arange(9) >= batch["lengths"].unsqueeze(1)
    garbage = torch.where(beyond.unsqueeze(-1), 1e3 * torch.randn(4, 9, 3), batch["x"].repeat(1, 2, 1)[:, :9])
    padded = {"x": garbage, "lengths": batch["lengths"]}
    alone = {"x": torch.where(beyond[:, :3].unsqueeze(-1), 0.0, bare["x"]), "lengths": batch["lengths"]}
    first, second = (evaluate(program, b, 50, seed=1, progress=False).log_px for b in (padded, alone))
    assert torch.equal(first, second)
    zeroed = padded | {"x": garbage.masked_fill(beyond.unsqueeze(-1), 0)}
    with torch.no_grad(), pyro.validation_enabled(False):
        losses = []
        for each in (padded, zeroed):  # the program itself, to which no one has zeroed anything
            torch.manual_seed(2)
            losses.append(Trace_ELBO().differentiable_loss(program.model, program.guide, **each))
    assert torch.equal(*losses)


def test_training_on_trimmed_minibatches_is_training_on_padded_ones():
    entry = zoo.PROGRAMS["DeepMarkovModel"]
    batch = entry.batch(12)
    batch["x"] = nn.functional.pad(batch["x"], (0, 0, 0, 4))
    torch.manual_seed(0)
    programs = entry.make(), entry.make()
    programs[1].load_state_dict(programs[0].state_dict())
    for program, show in zip(programs, (None, trim), strict=True):
        fit(program, Data(batch, show=show), epochs=1, batch_size=12, seed=0, progress=False)
    for p, q in zip(*(program.parameters() for program in programs), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_a_chains_density_is_the_same_for_its_own_draw_and_for_a_copy():
    program = scattered(zoo.PROGRAMS["DeepMarkovModel"].make())
    batch = sequences(binary=True)
    for chain in (program.posterior(**batch), program.posterior(**batch).expand((2, 4))):
        z = chain.rsample()
        assert_close(chain.log_prob(z), chain.log_prob(z.clone()), rtol=0, atol=1e-12)
        assert z.shape == (*chain.batch_shape, 5, 5)
    discrete = INEXACT["HiddenMarkovModel"]().posterior(**batch)
    z = discrete.sample()
    assert_close(discrete.log_prob(z), discrete.log_prob(z.clone()), rtol=0, atol=1e-12)
    assert discrete.log_prob(z).requires_grad, "the score function has no gradient"
    one = MarkovChain(chain.initial, chain.transition, LENGTHS.clamp(max=1), 1)
    z = one.sample()
    assert_close(one.log_prob(z.clone()), chain.initial.log_prob(z[..., 0, :]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cell", ["relu", "tanh", "gru"])
def test_backward_rnn_reads_each_sequence_alone_from_its_end(cell):
    torch.manual_seed(0)
    net, x = scattered(BackwardRNN(3, 4, cell)), sequences()["x"].requires_grad_()
    out = net(x, LENGTHS)
    kind = nn.GRUCell(3, 4) if cell == "gru" else nn.RNNCell(3, 4, nonlinearity=cell)
    kind.load_state_dict({name.removesuffix("_l0"): p for name, p in net.rnn.named_parameters()})
    for i, n in enumerate(LENGTHS.tolist()):
        h = net.end.unsqueeze(0)
        for t in reversed(range(n)):
            h = kind(x[i : i + 1, t], h)
            assert_close(out[i, t], h[0], rtol=0, atol=1e-12)
    (seen,) = torch.autograd.grad(out[LENGTHS > 1, 1].sum(), x)
    assert not seen[:, 0].any(), "h_2 knows of x_1"
    assert not seen[2, 3:].any(), "what lies beyond an end is seen"
    assert cell == "relu" or seen[0, 1:].abs().sum(1).all()


@pytest.mark.usefixtures("float64")
def test_gated_transition_and_combiner_are_the_papers():
    net, z = scattered(GatedTransition(3, 4)), torch.randn(5, 3, dtype=torch.float64)

    def perceptron(mlp):
        first, _, last = mlp.layers
        return (z @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias

    gate, change = perceptron(net.gate).sigmoid(), perceptron(net.change)
    mu = (1 - gate) * (z @ net.stay.weight.T + net.stay.bias) + gate * change
    sigma = (1 + (change.clamp(min=0) @ net.scale.weight.T + net.scale.bias).exp()).log()
    assert_close(net(z), torch.cat([mu, sigma.log()], 1), rtol=0, atol=1e-12)
    combiner, h = scattered(Combiner(3, 4, 6)), torch.randn(5, 4, dtype=torch.float64)
    hidden = ((z @ combiner.state.weight.T + combiner.state.bias).tanh() + h) / 2
    expected = hidden @ combiner.out.weight.T + combiner.out.bias
    assert_close(combiner(torch.cat([z, h], 1)), expected, rtol=0, atol=1e-12)
    fresh = GatedTransition(3, 4)(z)[:, 3:]
    assert_close(fresh, torch.zeros_like(fresh), rtol=0, atol=1e-7)
    with torch.no_grad():
        net.scale.bias.fill_(-200.0)
    assert torch.isfinite(net(z)).all()


def test_samples_end_where_their_lengths_say():
    torch.manual_seed(0)
    for program in (DeepMarkovModel.mlp(3, 2, (4,), rnn_dim=4), *(make() for make in EXACT.values())):
        x = program.sample(3, lengths=torch.tensor([4, 1, 2]))
        assert x.shape == (3, 4, 3)
        assert not x[1, 1:].any()
        assert not x[2, 2:].any()
        assert program.sample(2, lengths=6, mean=True).shape == (2, 6, 3)


def test_per_step_figures_are_totals_over_totals():
    program, batch = EXACT["LinearGaussianStateSpace"](), sequences()
    result = evaluate(program, batch, 10, seed=0, progress=False)
    truth = program.log_prob(**batch).double()
    assert_close(result.summary()["log_px_per_step"], (truth.sum() / LENGTHS.sum()).item(), rtol=1e-5, atol=0)
    residual = truth - truth.sum() / LENGTHS.sum() * LENGTHS
    error = (residual.var() / 4).sqrt() / LENGTHS.double().mean()
    assert_close(result.summary()["log_px_per_step_error"], error.item(), rtol=1e-4, atol=0)
    bits = -result.summary()["log_px_per_step"] / (3 * torch.tensor(2.0).log().item())
    assert_close(result.summary()["bits_per_dim"], bits, rtol=1e-6, atol=0)
    assert "per time step" in str(result)
    plain = evaluate(zoo.PROGRAMS["LinearGaussian exact"].make(), torch.zeros(3, 4), 10, progress=False)
    assert "log_px_per_step" not in plain.summary()


def test_pad_and_trim():
    batch = pad([torch.ones(2, 3), torch.ones(4, 3)])
    assert batch["x"].sum() == 18
    assert not batch["x"][0, 2:].any()
    longer = {"x": nn.functional.pad(batch["x"], (0, 0, 0, 3)), "lengths": batch["lengths"]}
    assert torch.equal(trim(longer)["x"], batch["x"])
    assert trim({"x": torch.zeros(2, 3)})["x"].shape == (2, 3)


X, Y = torch.zeros(2, 4, 3), torch.zeros(2)
BAD = {
    "a sequence of length 0": ({"x": X, "lengths": torch.tensor([4, 0])}, "from 1 to 4, the steps of x; got 0 at 1"),
    "a length beyond the tensor": ({"x": X, "lengths": torch.tensor([5, 4])}, "from 1 to 4, the steps of x; got 5"),
    "lengths that are no whole numbers": ({"x": X, "lengths": Y}, r"whole numbers \(N,\); got torch.float32"),
    "lengths as a matrix": ({"x": X, "lengths": torch.ones(2, 1).long()}, r"whole numbers \(N,\); got torch.int64"),
    "too few lengths": ({"x": X, "lengths": torch.tensor([4])}, "one common first dimension"),
    "no lengths": (X, "lengths"),
    "vectors": ({"x": X[:, 0], "lengths": torch.tensor([1, 1])}, r"sequences \(N, T, X\)"),
    "features of another size": ({"x": torch.zeros(2, 4, 5), "lengths": torch.tensor([4, 4])}, "3"),
    "not a number": ({"x": X / 0, "lengths": torch.tensor([4, 4])}, "finite values"),
}


@pytest.mark.parametrize("name", [name for name, entry in zoo.PROGRAMS.items() if entry.num_steps])
@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_sequences_are_refused(name, data, message):
    program = zoo.PROGRAMS[name].make()
    for verb in (lambda: evaluate(program, data, 2, progress=False), lambda: fit(program, data, progress=False)):
        with pytest.raises(ValueError, match=message):
            verb()


BAD_CALLS = {
    "no sequences": (lambda: pad([]), "at least one; got none"),
    "an empty sequence": (lambda: pad([torch.zeros(2, 3), torch.zeros(0, 3)]), r"got \(0, 3\) at index 1"),
    "features of unequal size": (lambda: pad([torch.zeros(2, 3), torch.zeros(2, 4)]), r"\(T, 3\).*got \(2, 4\)"),
    "no latents": (lambda: DeepMarkovModel.mlp(3, 0), "z_dim"),
    "no states": (lambda: HiddenMarkovModel.linear(3, 0), "num_states"),
    "no cell": (lambda: BackwardRNN(3, 4, "lstm"), "cell to be one of relu, tanh, gru; got 'lstm'"),
    "no steps": (lambda: LinearGaussianStateSpace(3, 2).sample(2, lengths=0), "lengths of at least 1; got 0"),
    "no lengths to draw": (lambda: LinearGaussianStateSpace(3, 2).sample(2), "lengths"),
    "lengths of another number": (lambda: LinearGaussianStateSpace(3, 2).sample(2, lengths=LENGTHS), "n=2 rows"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_values_that_are_not_binary_are_found_in_every_sequence():
    x = torch.zeros(5, 4, 3)
    x[4, 1, 2] = 0.5
    data = {"x": x, "lengths": torch.full((5,), 4)}
    with pytest.raises(ValueError, match=r"within the support of site 'x', \{0, 1\}; got 0.5"):
        evaluate(HiddenMarkovModel.linear(3, 2, Bernoulli), data, 2, progress=False)
