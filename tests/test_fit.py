"""fit: what it optimises and reports, when it stops, what it refuses, and what survives a kill."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyrovae import (
    VAE,
    Compiled,
    CompileError,
    LatentModel,
    LinearGaussian,
    as_program,
    checkpoint,
    data_plate,
    fit,
    reference,
)
from pyrovae.conditionals import Bernoulli, DiagonalNormal, FullNormal, UnitNormal
from pyrovae.data import Data

quiet = partial(fit, progress=False)


def correlated(n, seed=0):
    """x = W z + b + noise in 4 dimensions, W of rank 1."""
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(n, 1, generator=generator), torch.randn(n, 4, generator=generator)
    return z * torch.tensor([2.0, -1.0, 0.5, 0.0]) + torch.tensor([1.0, 0.0, 0.0, -1.0]) + 0.5 * noise


def test_maximum_likelihood_of_the_linear_gaussian_model():
    """With the exact guide SVI climbs log p(x) itself, to the closed form of Tipping and Bishop (1999)."""
    x = correlated(2000)
    program = LinearGaussian(4, 1)
    quiet(program, x, epochs=60, batch_size=200, lr=0.02, seed=0)
    quiet(program, x, epochs=40, batch_size=2000, lr=0.005, seed=0)
    values, _ = torch.linalg.eigh(torch.cov(x.T, correction=0))
    noise = values[:3].mean()
    covariance = torch.cov(x.T, correction=0)
    vector = torch.linalg.eigh(covariance)[1][:, -1]
    fitted = torch.outer(vector, vector) * (values[-1] - noise) + noise * torch.eye(4)
    best = dist.MultivariateNormal(x.mean(0), fitted).log_prob(x).mean().item()
    assert program.log_prob(x).mean().item() == pytest.approx(best, abs=1e-3)
    assert best >= program.log_prob(x).mean().item()


def test_history_is_the_true_elbo_in_its_terms():
    x, val = correlated(50), correlated(20, seed=1)
    program = VAE.mlp(4, 2, (8,), likelihood=UnitNormal)
    history = quiet(program, x, val, epochs=2, lr=1e-9, seed=0)
    row = history[-1]
    assert row["elbo"] == pytest.approx(row["log_px_z"] - row["kl"])
    assert row["val_elbo"] == pytest.approx(row["val_log_px_z"] - row["val_kl"])
    # the weights hardly move, so that every figure estimates the same ELBO of the initial program
    z = torch.randn(4000, 50, 2)
    by_hand = reference.vae_elbo(
        x,
        z,
        posterior_net=program.posterior.eta,
        likelihood_net=program.likelihood.eta,
        likelihood=reference.log_unit_normal,
    )
    error = (by_hand.var(0) / 50**2).sum().sqrt().item()
    assert row["elbo"] == pytest.approx(by_hand.mean().item(), abs=5 * error), "seed 0"
    assert row["loss"] == pytest.approx(-by_hand.mean().item(), abs=5 * error), "seed 0"
    kl = reference.kl_diagonal_standard(program.posterior.eta(x))
    assert row["kl"] == pytest.approx(kl.mean().item(), abs=5 * error), "seed 0"


def test_history_has_the_true_elbo_whatever_is_optimised():
    class Scaled(VAE):
        def model(self, x=None):
            with pyro.poutine.scale(scale=100.0):
                return super().model(x)

        def guide(self, x):
            with pyro.poutine.scale(scale=100.0):
                super().guide(x)

    x = correlated(40)
    torch.manual_seed(0)
    plain = VAE.mlp(4, 2, (8,), likelihood=UnitNormal)
    scaled = Scaled(plain.prior, plain.likelihood, plain.posterior)
    one, other = (quiet(program, x, epochs=1, lr=1e-12, seed=0)[0] for program in (plain, scaled))
    assert other["elbo"] == pytest.approx(one["elbo"], rel=1e-5)
    assert other["loss"] == pytest.approx(100 * one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(num_particles=3), TraceMeanField_ELBO(), Trace_ELBO(2, vectorize_particles=True)]
)
def test_any_elbo_of_pyro_trains(elbo):
    x = correlated(200)
    history = quiet(LinearGaussian(4, 1, DiagonalNormal.mlp(4, 1, ())), x, epochs=15, lr=0.02, elbo=elbo, seed=0)
    assert history[-1]["elbo"] > history[0]["elbo"] + 0.5


def test_best_weights_on_validation_are_kept_and_training_stops_early():
    x, val = correlated(30), correlated(200, seed=1)
    program = VAE.mlp(4, 3, (50, 50), likelihood=DiagonalNormal)
    history = quiet(program, x, val, epochs=300, batch_size=30, lr=0.01, patience=12, seed=0)
    elbos = [row["val_elbo"] for row in history]
    best = elbos.index(max(elbos))
    assert len(history) < 300
    assert len(history) - 1 - best == 12
    again = quiet(program, x, val, epochs=1, lr=1e-12, seed=0)
    assert again[0]["val_elbo"] == pytest.approx(max(elbos), abs=1e-4)


def test_without_validation_the_last_weights_stay():
    x = correlated(30)
    one, two = LinearGaussian(4, 1), LinearGaussian(4, 1)
    two.load_state_dict(one.state_dict())
    quiet(one, x, epochs=3, seed=0)
    loss = Trace_ELBO()(two.model, two.guide)
    optimizer = torch.optim.Adam(two.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_the_norm():
    x = 100 * correlated(30)
    program = LinearGaussian(4, 1)
    before = torch.cat([p.detach().flatten().clone() for p in program.parameters()])
    quiet(program, x, epochs=1, batch_size=30, lr=1.0, grad_clip=0.01, optimizer=torch.optim.SGD, seed=0)
    after = torch.cat([p.detach().flatten() for p in program.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_dataloaders_and_streams_train_as_tensors_do():
    x = correlated(40)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(x)

    results = []
    for data in (DataLoader(TensorDataset(x), batch_size=8), DataLoader(Stream(), batch_size=8)):
        torch.manual_seed(0)
        program = LinearGaussian(4, 1)
        history = quiet(program, data, data, epochs=2, seed=0)
        results.append([*program.parameters(), torch.tensor(history[-1]["val_elbo"])])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_dynamic_binarization_is_new_each_epoch_and_repeats_with_the_seed():
    seen = []

    class Noting(VAE):
        def guide(self, x):
            if self.training:
                seen.append(x.clone())
            super().guide(x)

    grey, epochs = Data(torch.rand(20, 6), dynamic=True), []
    for _ in range(2):
        torch.manual_seed(0)
        quiet(Noting.mlp(6, 2), grey, epochs=2, batch_size=20, seed=7)
        epochs += seen[-2:]  # before them the program was looked at
    first, second, first_again, second_again = epochs
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert torch.cat(epochs).unique().tolist() == [0, 1]


def test_training_leaves_the_random_state_as_plain_loops_do():
    """fit with no seed draws from torch's generator the noise of its steps and nothing else."""
    x = correlated(24)
    loader = DataLoader(TensorDataset(x), batch_size=8)
    program = LinearGaussian(4, 2)
    torch.manual_seed(3)
    quiet(program, loader, loader, epochs=2)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(2):
        for (batch,) in loader:
            program.guide(batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_not_finite_names_the_site_and_keeps_the_last_good_checkpoint(tmp_path, compile):
    class Breaking(VAE):
        """Its guide's scale turns NaN in the third epoch."""

        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("steps", torch.zeros(()))

        def guide(self, x):
            self.steps += self.training
            with data_plate(x):
                mu, log_sigma = self.posterior.eta(x).chunk(2, -1)
                sigma = log_sigma.exp() * torch.where(self.steps > 10, torch.nan, 1.0)
                pyro.sample("z", dist.Normal(mu, sigma).to_event(1))

    x = correlated(40)
    program = Breaking.mlp(4, 2, likelihood=UnitNormal)
    message = r"got a loss of nan in epoch 3: site 'z' of the guide: its value is not finite. The last good checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        quiet(
            program,
            x,
            correlated(10, seed=1),
            epochs=5,
            batch_size=8,
            seed=0,
            run_dir=tmp_path / "run",
            compile=compile,
        )
    saved = checkpoint.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert len(saved["history"]) == 2
    assert all(torch.isfinite(value).all() for value in saved["program"].values())
    best = saved["best"]
    assert all(torch.equal(value, best[name]) for name, value in program.state_dict().items())


@pytest.mark.usefixtures("float64")
def test_compiled_training_stays_with_uncompiled_training():
    """200 steps with a ragged last minibatch and clipped gradients: the same noise, the same weights."""
    x, states, histories = correlated(50).double(), [], []
    for compile in (False, True):
        torch.manual_seed(1)
        program = VAE.mlp(4, 2, (5,), likelihood=UnitNormal)
        options = {"epochs": 50, "batch_size": 15, "grad_clip": 20.0, "lr": 1e-2, "seed": 0}
        histories.append(quiet(program, x, x[:20], compile=compile, **options))
        states.append(program.state_dict())
    for name, value in states[0].items():
        assert_close(states[1][name], value, rtol=1e-9, atol=1e-9, msg=name)
    for one, other in zip(*histories, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-9)


def test_ten_epochs_with_a_ragged_minibatch_are_traced_twice(monkeypatch):
    """The loss for each of two shapes, the measured draws for each of two data sets; no more in later epochs."""
    traced = []
    trace = Compiled._trace
    monkeypatch.setattr(Compiled, "_trace", lambda self, *args: (traced.append(self), trace(self, *args))[1])
    monkeypatch.setattr("pyrovae.draws.WORTH_COMPILING", 1)
    x = correlated(50)
    quiet(VAE.mlp(4, 2, (5,), likelihood=UnitNormal), x, x[:20], epochs=10, batch_size=15, compile=True)
    assert sorted(traced.count(one) for one in set(traced)) == [2, 2]


def test_compiled_training_resumes_to_the_same_weights(tmp_path):
    x, weights = correlated(50), []
    for epochs in ((4,), (2, 4)):
        for i, until in enumerate(epochs):
            torch.manual_seed(1)
            program = VAE.mlp(4, 2, (5,), likelihood=UnitNormal)
            options = {"epochs": until, "batch_size": 25, "seed": 0, "compile": True}
            quiet(program, x, x[:20], run_dir=tmp_path / str(epochs), resume=i > 0, **options)
        weights.append(torch.cat([p.flatten() for p in program.parameters()]))
    assert torch.equal(*weights)


def test_what_cannot_be_compiled_says_so_or_trains_uncompiled():
    class Choosing(VAE):
        def guide(self, x):
            if x.mean() > 0:
                super().guide(x)

    x = correlated(40).abs()
    with pytest.raises(
        CompileError, match=r"value of a tensor as a number.*test_fit.py:\d+: if x.mean\(\) > 0.*compile=False"
    ):
        quiet(Choosing.mlp(4, 2, (5,), likelihood=UnitNormal), x, epochs=1, compile=True)
    with pytest.warns(UserWarning, match="Goes on uncompiled"):
        history = quiet(Choosing.mlp(4, 2, (5,), likelihood=UnitNormal), x, epochs=30, compile="auto", seed=0)
    assert history[-1]["elbo"] > history[0]["elbo"]


def test_a_step_that_ruins_the_parameters_is_never_checkpointed(tmp_path):
    program = VAE.mlp(4, 1, likelihood=UnitNormal)
    with pytest.raises(FloatingPointError, match=r"in epoch 1: (site 'z' of the guide|likelihood.net)"):
        quiet(
            program, correlated(40), epochs=3, batch_size=10, lr=1e30, optimizer=torch.optim.SGD, run_dir=tmp_path / "r"
        )
    assert checkpoint.read_checkpoint(tmp_path / "r" / "checkpoint.pt")["history"] == []


# --- killed and resumed ----------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from pyrovae import VAE, data, fit
torch.set_num_threads(1)
folder, resume = sys.argv[1], len(sys.argv) > 2
digits = data.load("digits", binarize="dynamic")
torch.manual_seed(1)
fit(VAE.mlp(64, 4, (50,)), digits.train, digits.val, epochs=4, batch_size=4, seed=0, run_dir=folder, resume=resume,
    progress=False)
"""


def start(folder, *extra):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", SCRIPT, str(folder), *extra])


def test_killed_in_the_middle_of_an_epoch_and_resumed_ends_with_the_same_weights(tmp_path):
    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:  # the header and two epochs
        assert killed.poll() is None
        time.sleep(0.005)
    time.sleep(0.2)  # an epoch of 360 steps takes longer
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    epochs = metrics.read_text().count("\n") - 1
    assert epochs < 4, "killed before its end"
    assert start(tmp_path / "killed", "resume").wait() == 0
    assert whole.wait() == 0
    weights = [(tmp_path / run / checkpoint.WEIGHTS).read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]
    first, second = (checkpoint.read_checkpoint(tmp_path / run / checkpoint.CHECKPOINT) for run in ("whole", "killed"))
    for part in ("program", "best"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    assert [row["val_elbo"] for row in first["history"]] == [row["val_elbo"] for row in second["history"]]
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_run_that_ended_early_resumes_to_nothing_more(tmp_path):
    x, val = correlated(30), correlated(50, seed=1)
    options = {"batch_size": 30, "lr": 0.05, "patience": 2, "seed": 0, "run_dir": tmp_path / "r"}
    program = VAE.mlp(4, 3, (50,), likelihood=DiagonalNormal)
    history = quiet(program, x, val, epochs=200, **options)
    again = VAE.mlp(4, 3, (50,), likelihood=DiagonalNormal)
    assert quiet(again, x, val, epochs=200, resume=True, **options) == history
    assert all(torch.equal(p, q) for p, q in zip(program.parameters(), again.parameters(), strict=True))


def test_sigterm_ends_training_at_the_last_whole_epoch(tmp_path):
    """As an exception does; then the run goes on to the same end, and the signal is what it was."""
    x, weights = correlated(30), []

    def terminating(epoch):
        if epoch == 4:
            signal.raise_signal(signal.SIGTERM)
        return 0.01

    for run, rate, resume in (("whole", lambda _: 0.01, False), ("cut", terminating, False), ("cut", None, True)):
        torch.manual_seed(1)
        program = LinearGaussian(4, 1)
        options = {"epochs": 6, "seed": 0, "run_dir": tmp_path / run, "resume": resume}
        if run == "cut":
            rate = rate or (lambda _: 0.01)
            rate.__name__ = "<lambda>"
        if rate is terminating:
            with pytest.raises(SystemExit) as ended:
                quiet(program, x, lr=rate, **options)
            assert ended.value.code == 128 + signal.SIGTERM
            assert len(checkpoint.read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["history"]) == 3
        else:
            quiet(program, x, lr=rate, **options)
            weights.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert torch.equal(*weights)


def test_a_full_disk_leaves_the_best_weights_in_the_program_and_the_old_files(tmp_path, monkeypatch):
    x, val, weights = correlated(30), correlated(20, seed=1), []
    monkeypatch.setattr("pyrovae.run.SECONDS_BETWEEN_WRITES", -1)
    for run, epochs in (("short", 3), ("full", 9)):
        torch.manual_seed(1)
        program = LinearGaussian(4, 1)

        def rate(epoch, run=run):
            if run == "full" and epoch == 4:  # from now on, the disk is full
                (tmp_path / run / f".model.safetensors.{os.getpid()}.part").symlink_to("/dev/full")
                monkeypatch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)
            return 1e-9 if epoch > 3 else 0.01  # the third is the best

        options = {"epochs": epochs, "lr": rate, "seed": 0, "run_dir": tmp_path / run}
        if run == "short":
            quiet(program, x, val, **options)
        else:
            with pytest.raises(OSError, match=r"No space left on device: '.*model.safetensors'"):
                quiet(program, x, val, **options)
        weights.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
    monkeypatch.undo()
    assert_close(*weights, rtol=0, atol=1e-6)
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("short", "full")]
    assert files[0] == files[1]


def test_a_folder_in_which_a_run_is_going_on_is_refused(tmp_path):
    def nested(epoch):
        if epoch == 2:
            with ThreadPoolExecutor(1) as pool, pytest.raises(BlockingIOError, match="another run is going on"):
                pool.submit(quiet, vae(), X, epochs=1, run_dir=tmp_path / "r", resume=True).result()
        return 0.01

    assert len(quiet(vae(), X, epochs=2, run_dir=tmp_path / "r", lr=nested)) == 2


# --- bad input -------------------------------------------------------------------------------------

X = torch.zeros(20, 4)


def lopsided(model_site, guide_site):
    def model(x):
        pyro.param("a", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample(model_site, dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(guide_site, dist.Normal(x, 1.0).to_event(1))

    return as_program(model, guide)


class NothingToLearn(LatentModel):
    def model(self, x=None):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def vae():
    return VAE.mlp(4, 2, (5,), likelihood=Bernoulli)


BAD = {
    "NaN": (vae, X / 0, {}, r"Expected finite values in train\['x'\]; got nan"),
    "NaN in val": (vae, X, {"val": X / 0}, r"Expected finite values in val\['x'\]; got nan"),
    "grey": (vae, X + 0.25, {}, r"train\['x'\] within the support of site 'x', \{0, 1\}; got 0.25.*Binarize"),
    "grey in a later batch": (vae, torch.cat([X, X + 0.25]), {"batch_size": 20}, r"train\['x'\].*got 0.25"),
    "grey in a DataLoader": (vae, DataLoader(torch.cat([X, X + 0.25]), 20), {}, r"train\['x'\].*got 0.25"),
    "grey in val": (vae, X, {"val": X + 0.25}, r"val\['x'\] within the support"),
    "size": (vae, torch.zeros(20, 5), {}, r"shape \(\*, 4\); got \(20, 5\)"),
    "empty": (vae, X[:0], {}, r"Expected train to hold at least one datum"),
    "epochs": (vae, X, {"epochs": 0}, r"Expected epochs to be a positive whole number; got 0"),
    "batch size": (vae, X, {"batch_size": -1}, r"Expected batch_size to be a positive whole number; got -1"),
    "rate": (vae, X, {"lr": float("nan")}, r"Expected lr to be a positive number; got nan"),
    "clip": (vae, X, {"grad_clip": 0.0}, r"Expected grad_clip to be a positive number; got 0.0"),
    "patience": (vae, X, {"patience": 3}, r"Expected val with patience"),
    "device": (vae, X, {"device": "tpux"}, r"Expected device to be one of auto, cpu, cuda, mps; got 'tpux'"),
    "precision": (vae, X, {"precision": "8"}, r"Expected precision to be one of 32-true, bf16-mixed; got '8'"),
    "compile": (vae, X, {"compile": "yes"}, r"Expected compile to be True, False or 'auto'; got 'yes'"),
    "elbo": (vae, X, {"elbo": Trace_ELBO}, r"Expected elbo to be a pyro.infer.ELBO with a differentiable_loss"),
    "optimizer": (vae, X, {"optimizer": 3}, r"Expected optimizer to be a class or function of torch.optim; got int"),
    "half an epoch": (vae, X, {"epochs": 2.5}, r"Expected epochs to be a positive whole number; got 2.5"),
    "val of another size": (vae, X, {"val": torch.zeros(5, 3)}, r"shape \(\*, 4\); got \(5, 3\)"),
    "val of another name": (vae, X, {"val": {"w": X}}, r"Expected a batch for model\(x: .*; got w"),
    "empty val": (vae, X, {"val": DataLoader(X, 30, drop_last=True)}, r"Expected val to hold at least one datum"),
    "resume what": (vae, X, {"resume": True}, r"Expected run_dir with resume=True; got None"),
    "lacking latent": (lambda: lopsided("z", "w"), X, {}, r"the guide lacks z: the model lacks w"),
    "no parameters": (NothingToLearn, X, {}, r"Expected a program with parameters to train; got none"),
    "not a program": (lambda: torch.nn.Linear(2, 2), X, {}, r"Expected program to be a LatentModel; got Linear"),
}


@pytest.mark.parametrize(("make", "x", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, x, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(make(), x, **{"epochs": 1, **options})


def test_run_folders_that_exist_or_do_not(tmp_path):
    quiet(vae(), X, epochs=1, run_dir=tmp_path / "run")
    held = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match=r"Expected run_dir to be a new or empty folder; got .*run.*resume=True"):
        quiet(vae(), X, epochs=1, run_dir=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == held
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        quiet(vae(), X, epochs=1, run_dir=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"Expected run_dir to be a run to resume; got .*nowhere"):
        quiet(vae(), X, epochs=1, run_dir=tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resuming_with_other_settings_or_another_program_is_refused(tmp_path):
    quiet(vae(), X, epochs=1, run_dir=tmp_path / "r", seed=0)
    with pytest.raises(ValueError, match=r"Expected lr=0.001, as the run to resume has; got 0.1"):
        quiet(vae(), X, epochs=2, run_dir=tmp_path / "r", seed=0, resume=True, lr=0.1)
    with pytest.raises(ValueError, match=r"Expected num_train=20, as the run to resume has; got 19"):
        quiet(vae(), X[:19], epochs=2, run_dir=tmp_path / "r", seed=0, resume=True)
    with pytest.raises(ValueError, match=r"Expected the weights of a VAE; got .*checkpoint.pt, which"):
        quiet(VAE.mlp(4, 3, (5,)), X, epochs=2, run_dir=tmp_path / "r", seed=0, resume=True)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint at all"])
def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path, spoil):
    quiet(vae(), X, epochs=1, run_dir=tmp_path / "r", seed=0)
    path = tmp_path / "r" / "checkpoint.pt"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"Expected a checkpoint of pyrovae; got .*checkpoint.pt, truncated or foreign"
    ):
        quiet(vae(), X, epochs=2, run_dir=tmp_path / "r", seed=0, resume=True)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    quiet(vae(), X, epochs=1, run_dir=tmp_path / "r", seed=0)
    torch.save({"epoch": 3}, tmp_path / "r" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"which is another program's"):
        quiet(vae(), X, epochs=2, run_dir=tmp_path / "r", seed=0, resume=True)


def test_weights_without_a_checkpoint_are_not_overwritten_by_resuming(tmp_path):
    quiet(vae(), X, epochs=1, run_dir=tmp_path / "r", seed=0)
    (tmp_path / "r" / "checkpoint.pt").unlink()
    held = (tmp_path / "r" / "model.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"Expected checkpoint.pt in the run to resume; got .*weights alone"):
        quiet(vae(), X, epochs=2, run_dir=tmp_path / "r", seed=0, resume=True)
    assert (tmp_path / "r" / "model.safetensors").read_bytes() == held


def test_the_rate_of_each_epoch_is_the_one_that_is_given():
    x, program = correlated(30), LinearGaussian(4, 1)
    steps, before = [], program.bias.detach().clone()
    seen = []

    def rate(epoch):
        steps.append((program.bias.detach() - before).norm().item())
        seen.append(epoch)
        return 1.0 if epoch == 2 else 1e-9

    quiet(program, x, epochs=3, batch_size=30, lr=rate, optimizer=torch.optim.SGD, grad_clip=0.01, seed=0)
    assert seen[-3:] == [1, 2, 3]
    assert steps[-2] < 1e-6 < 1e-5 < steps[-1], "nothing moves in the first epoch, much in the second"


@pytest.mark.parametrize("posterior", [DiagonalNormal, FullNormal])
def test_bfloat16_is_for_networks_alone(posterior):
    dtypes = set()

    class Noting(VAE):
        def guide(self, x):
            q = self.posterior(x)
            if self.training:
                dtypes.update({q.mean.dtype, q.rsample().dtype, q.log_prob(q.mean).dtype})
            super().guide(x)

    torch.manual_seed(0)
    program = Noting.mlp(4, 2, likelihood=UnitNormal, posterior=posterior)
    inner = []
    program.posterior.net.layers[0].register_forward_hook(
        lambda module, x, y: inner.append(y.dtype) if program.training else None
    )
    history = quiet(program, correlated(100), epochs=5, batch_size=10, seed=0, precision="bf16-mixed")
    assert set(inner[-50:]) == {torch.bfloat16}, "in all steps, after a look at the program"
    assert dtypes == {torch.float32}
    assert {p.dtype for p in program.parameters()} == {torch.float32}
    assert history[-1]["elbo"] > history[0]["elbo"] + 0.5


def test_initial_values_that_come_from_data_come_from_the_first_minibatch():
    def model(x):
        shift = pyro.param("shift", lambda: x.mean(0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = correlated(50)
    program = as_program(model, guide)
    quiet(program, DataLoader(x, 50), epochs=1, lr=1e-9)
    assert_close(program.pyro_params["shift"].detach(), x.mean(0), rtol=1e-4, atol=1e-5)


def test_parameters_for_each_datum_are_refused_with_the_reason():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(len(x), 4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"Expected a program that runs on any number of data|Shape mismatch"):
        quiet(as_program(model, guide), correlated(20), epochs=1)
