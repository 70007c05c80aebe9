"""LatentModel, data_plate, as_program: foreign programs, scopes, and the generic uses of a program."""

import functools
import types
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.testing import assert_close

from pyrovae import VAE, LatentModel, as_program, data_plate, evaluate, fit, load, save
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal
from pyrovae.survey import Survey


class ForeignVAE(nn.Module):
    """In the manner of Pyro's own example: pyro.module, functional networks, a model that returns the means."""

    def __init__(self, x_dim=12, z_dim=3):
        super().__init__()
        self.z_dim = z_dim
        self.encoder_hidden, self.encoder_mu = nn.Linear(x_dim, 8), nn.Linear(8, z_dim)
        self.encoder_scale, self.decoder = nn.Linear(8, z_dim), nn.Sequential(nn.Linear(z_dim, 8), nn.Tanh())
        self.decoder_out = nn.Linear(8, x_dim)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        pyro.module("decoder_out", self.decoder_out)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            probs = torch.sigmoid(self.decoder_out(self.decoder(z)))
            pyro.sample("obs", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=x.reshape(-1, 12))
            return probs

    def guide(self, x):
        for name in ("encoder_hidden", "encoder_mu", "encoder_scale"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", x.shape[0]):
            hidden = torch.tanh(self.encoder_hidden(x.reshape(-1, 12)))
            pyro.sample("latent", dist.Normal(self.encoder_mu(hidden), self.encoder_scale(hidden).exp()).to_event(1))


def conjugate(start=0.7):
    """z ~ N(0, 1), x | z ~ N(z, 1), with a pyro.param in each function; the exact scale of the guide is sqrt(1/2)."""

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", lambda: torch.tensor(start), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    return model, guide


def binary(n, x_dim=12, seed=0):
    return torch.bernoulli(torch.full((n, x_dim), 0.4), generator=torch.Generator().manual_seed(seed))


def test_foreign_program_goes_through_unchanged(tmp_path):
    vae = ForeignVAE()
    program = as_program(vae.model, vae.guide)
    x = binary(60, 1).expand(60, 12).contiguous()  # all zeros or all ones: log p(x) may rise to about -log 2
    before = evaluate(program, x, 100, seed=0, progress=False)
    before_weights = [p.detach().clone() for p in vae.parameters()]
    history = fit(program, x, x[:20], epochs=40, lr=2e-2, seed=0, progress=False)
    assert history[-1]["val_elbo"] > history[0]["val_elbo"] + 3
    assert not any(torch.equal(p, q) for p, q in zip(before_weights, vae.parameters(), strict=True))
    after = evaluate(program, x, 100, seed=0, progress=False)
    assert after.log_px.mean() > before.log_px.mean() + 3
    assert program.sample(7, like=x).unique().tolist() == [0, 1]
    assert program.encode(x).shape == (60, 3)
    with program.scope():
        probs = poutine.condition(vae.model, {"latent": program.encode(x)})(x)
    assert_close(program.reconstruct(x), probs.detach())
    save(program, tmp_path / "weights")
    other = ForeignVAE()
    load(tmp_path / "weights", as_program(other.model, other.guide))
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters(), strict=True))
    assert not dict(pyro.get_param_store())


@pytest.mark.usefixtures("float64")
def test_log_px_of_a_foreign_program_is_the_exact_one():
    model, guide = conjugate(start=0.5**0.5)
    x = torch.tensor([-1.0, 0.0, 3.0])
    result = evaluate(as_program(model, guide), x, 3, progress=False)
    assert_close(result.log_px, dist.Normal(0.0, 2**0.5).log_prob(x))


def test_fit_finds_pyro_params_and_their_constraints():
    program = as_program(*conjugate())
    x = 1 + 2**0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    fit(program, x, epochs=60, batch_size=400, lr=0.02, seed=0, progress=False)
    assert set(program.pyro_params) == {"shift", "scale"}
    assert program.pyro_params["scale"].exp().item() == pytest.approx(0.5**0.5, abs=0.03)
    # d ELBO / d shift = mean(x - E_q[z] - shift), and E_q[z] = x / 2
    assert program.pyro_params["shift"].item() == pytest.approx(x.mean().item() / 2, abs=0.05)


def test_same_names_in_two_programs_and_neither_touches_the_other():
    first, second = as_program(*conjugate(0.7)), as_program(*conjugate(0.2))
    x = torch.randn(50)
    fit(first, x, epochs=1, progress=False)
    fit(second, x, epochs=1, lr=1e-9, progress=False)
    assert second.pyro_params["scale"].exp().item() == pytest.approx(0.2, abs=1e-6)
    held = {name: p.clone() for name, p in first.named_parameters()}
    fit(second, x, epochs=3, progress=False)
    assert all(torch.equal(p, held[name]) for name, p in first.named_parameters())
    assert not dict(pyro.get_param_store())


def test_two_modules_of_one_name_train_side_by_side():
    torch.manual_seed(0)
    vaes = [ForeignVAE(), ForeignVAE()]
    programs = [as_program(vae.model, vae.guide) for vae in vaes]
    alone = ForeignVAE()
    alone.load_state_dict(vaes[1].state_dict())
    x = binary(40)
    for _ in range(3):
        for i, program in enumerate(programs):
            fit(program, x, epochs=1, seed=i, progress=False)
    for _ in range(3):
        fit(as_program(alone.model, alone.guide), x, epochs=1, seed=1, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(vaes[1].parameters(), alone.parameters(), strict=True))


def test_after_plain_svi_the_stored_values_are_asked_for():
    model, guide = conjugate(0.3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    x = torch.randn(20)
    for _ in range(50):
        svi.step(x)
    trained = pyro.param("scale").item()
    assert trained > 0.35
    ignoring = as_program(model, guide)
    with pytest.warns(UserWarning, match=r"pyro.param 'scale'.*params="):
        ignoring.encode(x)
    assert ignoring.pyro_params["scale"].exp().item() == pytest.approx(0.3)
    program = as_program(model, guide, params=pyro.get_param_store())
    evaluate(program, x, 2, progress=False)
    assert program.pyro_params["scale"].exp().item() == pytest.approx(trained)
    assert pyro.param("scale").item() == trained


def test_loaded_pyro_params_meet_their_constraints(tmp_path):
    x = torch.randn(20)
    program = as_program(*conjugate(0.7))
    fit(program, x, epochs=5, seed=0, progress=False)
    save(program, tmp_path / "weights")
    loaded = load(tmp_path / "weights", as_program(*conjugate(0.1)))
    results = [evaluate(p, x, 10, seed=0, progress=False).log_px for p in (program, loaded)]
    assert torch.equal(*results)


class WithPyroParam(LatentModel):
    """A LatentModel that itself uses pyro.param, and a PyroModule within."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 2)
        self.net.bias = PyroParam(torch.ones(2), constraint=dist.constraints.positive)

    def model(self, x=None):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.net(z), scale).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def test_pyro_param_and_pyro_module_inside_a_latent_model():
    programs = [WithPyroParam(), WithPyroParam()]
    x = torch.randn(30, 2)
    kept = {name: p.clone() for name, p in programs[1].named_parameters()}
    fit(programs[0], x, epochs=2, progress=False)
    assert set(dict(programs[0].named_parameters())) == {"net.weight", "net.bias_unconstrained", "pyro_params.scale"}
    assert all(torch.equal(p, kept[name]) for name, p in programs[1].named_parameters())
    assert not dict(pyro.get_param_store())


def test_networks_are_found_where_functions_refer_to_them():
    closed_over = nn.BatchNorm1d(2)

    class Holder:
        def __init__(self):
            self.held = nn.Linear(2, 2)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.held(x), 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(closed_over(z), 1.0).to_event(1), obs=x)

    program = as_program(model, Holder().guide)
    assert set(program.nets) == {"closed_over", "held"}
    seen = closed_over.running_mean.clone()
    evaluate(program, torch.randn(6, 2), 4, progress=False)
    assert torch.equal(closed_over.running_mean, seen), "evaluation is in eval mode"
    fit(program, torch.randn(6, 2), epochs=1, progress=False)
    assert not torch.equal(closed_over.running_mean, seen)


@pytest.mark.usefixtures("float64")
def test_another_name_for_the_plate_is_told():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.tensor([0.5, 2.0])
    result = evaluate(as_program(model, guide, plate="rows"), x, 2, progress=False)
    assert_close(result.log_px, dist.Normal(0.0, 2**0.5).log_prob(x))
    with pytest.raises(ValueError, match=r"site 'z' inside the plate 'data'"):
        evaluate(as_program(model, guide), x, 2, progress=False)


def test_a_program_that_does_not_broadcast_is_evaluated_row_by_row():
    """Networks that fold leading dimensions get each datum repeated for each particle: the result is the same."""
    weight = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])

    def model(x, fold=True):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            both = torch.cat([z, torch.zeros(len(x), 1)], -1) if fold else z  # fails on (K, N, 2)
            pyro.sample("x", dist.Normal(both[..., :2] @ weight, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.randn(5, 2)
    folding = as_program(model, guide)
    broadcasting = as_program(lambda x: model(x, fold=False), guide)
    assert not Survey.of(folding, {"x": x}).vectorized
    assert Survey.of(broadcasting, {"x": x}).vectorized
    a, b = (evaluate(program, x, 2000, seed=0, progress=False) for program in (folding, broadcasting))
    error = (a.standard_error**2 + b.standard_error**2).sqrt()
    assert ((a.log_px - b.log_px).abs() < 5 * error).all(), "seed 0"


def test_silently_mixing_networks_are_not_trusted_with_particles():
    """BatchNorm1d on (K, N, D) with N = D takes data for features and raises nothing; it must be seen."""
    norm = nn.BatchNorm1d(2).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -1.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(norm(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + norm.running_mean / 2, 0.5**0.5).to_event(1))

    x = torch.randn(2, 2)
    assert not Survey.of(as_program(model, guide), {"x": x}).vectorized
    exact = dist.Normal(-norm.running_mean, 2**0.5).to_event(1).log_prob(x)
    result = evaluate(as_program(model, guide), x, 5, progress=False)
    assert_close(result.log_px, exact.double(), rtol=1e-4, atol=1e-4)


class TwoLevel(LatentModel):
    """The example of the design: p(z2) p(z1 | z2) p(x | z1), guide q(z1 | x) q(z2 | z1)."""

    def __init__(self):
        super().__init__()
        self.p_z2, self.p_z1 = StandardNormal(2), DiagonalNormal.mlp(2, 3, hidden=(5,))
        self.p_x = Bernoulli.mlp(3, 6, hidden=(5,))
        self.q_z1, self.q_z2 = DiagonalNormal.mlp(6, 3, hidden=(5,)), DiagonalNormal.mlp(3, 2, hidden=(5,))

    def model(self, x=None):
        with data_plate(x):
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            return pyro.sample("x", self.p_x(z1), obs=x)

    def guide(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))


def test_a_structure_of_ones_own():
    program, x = TwoLevel(), binary(40, 6)
    fit(program, x, binary(10, 6, seed=1), epochs=2, progress=False)
    result = evaluate(program, x, 50, progress=False)
    assert set(result.active_units) == {"z1", "z2"}
    assert (result.log_px > result.elbo).all()
    assert program.sample(4).shape == (4, 6)
    z1 = program.encode(x, site="z1")
    assert_close(z1, program.q_z1(x).mean.detach())
    assert_close(program.encode(x, site="z2"), program.q_z2(z1).mean.detach())
    assert_close(program.reconstruct(x), program.p_x(z1).mean.detach())
    with pytest.raises(ValueError, match=r"Expected site to be one of z1, z2; got None"):
        program.encode(x)


def test_discrete_latents_are_exact_and_encoded_by_their_mode():
    class Mixture(LatentModel):
        """c ~ Categorical(0.3, 0.7), x ~ N(mu_c, 1), with the exact posterior of c as guide."""

        log_pi, mu = torch.tensor([0.3, 0.7]).log(), torch.tensor([-2.0, 2.0])

        def joint(self, x):
            return self.log_pi + dist.Normal(self.mu, 1.0).log_prob(x.unsqueeze(-1))

        def model(self, x=None):
            with data_plate(x):
                c = pyro.sample("c", dist.Categorical(logits=self.log_pi))
                return pyro.sample("x", dist.Normal(self.mu[c], 1.0), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("c", dist.Categorical(logits=self.joint(x)))

    x = torch.tensor([-3.0, -0.2, 0.1, 2.5])
    result = evaluate(Mixture(), x, 30, progress=False)
    assert_close(result.log_px, Mixture().joint(x).logsumexp(-1).double())
    assert Mixture().encode(x).tolist() == Mixture().joint(x).argmax(-1).tolist() == [0, 1, 1, 1]


@pytest.mark.usefixtures("float64")
def test_several_observed_variables_are_arguments():
    class Labelled(LatentModel):
        def model(self, x=None, y=None):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                y = pyro.sample("y", dist.Normal(z, 1.0), obs=y)
                return pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

        def guide(self, x, y):
            with data_plate(x):
                pyro.sample("z", dist.Normal((x - y + y) / 3, 3**-0.5))

    x, y = torch.randn(4), torch.randn(4)
    # given z: y ~ N(z, 1), x - y ~ N(z, 1); so the posterior of z is N((y + x - y) / 3, 1/3), the guide's
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([y, x - y], -1))
    for batch in ((x, y), {"x": x, "y": y}):
        assert_close(evaluate(Labelled(), batch, 2, progress=False).log_px, exact)
    torch.manual_seed(0)
    given = Labelled().sample(5000, y=torch.full((5000,), 2.0))
    # y is held fixed, what comes before it is drawn as ever: x = z + 2 + noise
    assert given.mean().item() == pytest.approx(2, abs=5 * (2 / 5000) ** 0.5), "seed 0"


def test_modes_and_random_state_are_put_back():
    program = VAE.mlp(6, 2)
    program.likelihood.eval()
    x = binary(5, 6)
    modes = [module.training for module in program.modules()]
    state = torch.get_rng_state()
    evaluate(program, x, 3, seed=1, progress=False)
    fit(program, x, epochs=1, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in program.modules()] == modes
    assert all(p.grad is None or p.requires_grad for p in program.parameters())
    with pytest.raises(RuntimeError, match="stop"), program.inference():
        raise RuntimeError("stop")
    assert [module.training for module in program.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.sample(0), "Expected n to be a whole number of at least 1; got 0"),
        (lambda p, x: p.encode(x, site="w"), "Expected site to be one of z; got 'w'"),
        (lambda p, x: p.encode("x"), "Expected x to be a tensor"),
        (lambda p, x: p.encode((x, x)), r"Expected a batch for guide\(x: .*; got x, y"),
        (lambda p, x: p.reconstruct({"w": x}), r"Expected a batch for model\(x: .*; got w"),
        (lambda p, x: p.encode(x[:, :5]), r"Expected the network's input to have shape \(\*, 6\); got \(5, 5\)"),
        (lambda p, x: as_program(1, p.guide), "Expected model to be a function; got int"),
        (lambda p, x: evaluate(p.model, x), "Expected program to be a LatentModel; got method.*as_program"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(VAE.mlp(6, 2), binary(5, 6))


def test_a_model_that_needs_data_says_so():
    vae = ForeignVAE()
    with pytest.raises(
        ValueError, match=r"Expected like=a batch, or as conditions x=\.\.\., for the model needs x; got none"
    ):
        as_program(vae.model, vae.guide).sample(3)


def test_a_model_that_returns_something_else_says_so():
    class Silent(VAE):
        def model(self, x=None):
            super().model(x)

    for mean in (False, True):
        with pytest.raises(ValueError, match="Expected one data site, whose value the model returns; got none"):
            Silent.mlp(6, 2).sample(2, mean=mean)


def test_data_plate_is_the_bare_plate():
    x = binary(3, 6)
    with data_plate(x), warnings.catch_warnings():
        assert pyro.sample("z", dist.Normal(0.0, 1.0)).shape == (3,)
    with data_plate(None):
        assert pyro.sample("z", dist.Normal(0.0, 1.0)).shape == ()
    frame = poutine.trace(lambda: VAE.mlp(6, 2).guide(x)).get_trace().nodes["z"]["cond_indep_stack"][0]
    assert (frame.name, frame.dim, frame.size) == ("data", -1, 3)


def hidden_network_programs():
    """The same network, reached in the ways that people reach it."""

    def programs(net, refer):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(refer()(z), 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

        return model, guide

    class Callable:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function(x)

    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    namespace, listed, keyed = types.SimpleNamespace(net=net), [net], {"net": net}

    def helper():
        return net

    model, guide = programs(net, lambda: namespace.net)
    yield "namespace", model, guide, net
    yield "list", *programs(net, lambda: listed[0]), net
    yield "dict", *programs(net, lambda: keyed["net"]), net
    yield "helper", *programs(net, lambda: helper()), net
    yield "handler", poutine.scale(model, scale=2.0), guide, net
    yield "callable object", Callable(model), guide, net
    yield "partial", functools.partial(model), guide, net


@pytest.mark.parametrize(("name", "model", "guide", "net"), list(hidden_network_programs()))
def test_networks_are_found_wherever_they_are_kept(name, model, guide, net):
    program = as_program(model, guide)
    assert list(program.nets.values()) == [net]
    assert sum(key.endswith("running_mean") for key in program.state_dict()) == 1
    seen = net[1].running_mean.clone()
    evaluate(program, torch.randn(6, 2), 4, progress=False)
    assert torch.equal(net[1].running_mean, seen)


def test_a_network_that_is_not_found_is_told():
    class Opaque:
        __slots__ = ("net",)

    opaque = Opaque()
    opaque.net = nn.Linear(2, 2)

    def model(x):
        pyro.module("hidden", opaque.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(opaque.net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    program, x, before = as_program(model, guide), torch.randn(20, 2), opaque.net.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"'hidden\$\$\$\w+' was met by pyro.module alone"):
        fit(program, x, epochs=1, progress=False)
    assert not torch.equal(opaque.net.weight, before), "trained all the same"


def test_the_readmes_own_loops_train():
    x = binary(20, 6)
    for loop in ("SVI", "module form"):
        program = VAE.mlp(6, 2)
        before = [p.detach().clone() for p in program.parameters()]
        if loop == "SVI":

            def model(x, program=program):
                pyro.module("program", program)
                return program.model(x)

            SVI(model, program.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
        else:
            Trace_ELBO()(program.model, program.guide)(x).backward()
            torch.optim.Adam(program.parameters()).step()
        assert not any(torch.equal(p, q) for p, q in zip(before, program.parameters(), strict=True))
