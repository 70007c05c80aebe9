"""The command line, run as a user runs it."""

import json
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import pyrovae
from pyrovae import evaluate, load
from pyrovae.cli import _spread, main
from pyrovae.data import load as load_data
from pyrovae.options import Train
from pyrovae.recipes import LIKELIHOODS, rate_of

SMALL = ["--epochs", "2", "--hidden", "20", "--z-dim", "2", "--num-particles", "20"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pyrovae", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "train", *SMALL, "--out", folder)
    return folder


def test_train_leaves_all_that_a_run_folder_holds(trained):
    names = {path.name for path in trained.iterdir()}
    pictures = {"learning_curves.png", "samples.png", "reconstructions.png", "latent_space.png", "bounds.png"}
    assert names == pictures | {"config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "evaluation.json"}
    assert all((trained / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    config = json.loads((trained / "config.json").read_text())
    assert config["command"]["binarize"] == "auto"
    assert config["data"] == {"name": "digits", "binarize": "dynamic", "shape": [1, 8, 8], "train": 1437, "val": 180,
                              "test": 180}  # fmt: skip
    assert config["fit"]["batch_size"] == 100
    assert config["program"]["class"] == "VAE"
    assert len((trained / "metrics.csv").read_text().splitlines()) == 3


def test_the_written_evaluation_is_that_of_the_library(trained):
    written = json.loads((trained / "evaluation.json").read_text())
    test = load_data("digits", "dynamic").test
    result = evaluate(load(trained), test, 20, seed=0, progress=False)
    assert written["log_px"] == pytest.approx(result.summary()["log_px"], rel=1e-6)
    assert written["per_datum"]["log_px"] == pytest.approx(result.log_px.tolist(), rel=1e-5)
    assert written["per_datum"]["k_hat"][0] is None, "too few particles to tell"


@pytest.mark.parametrize(
    "options",
    [
        ("--posterior", "iaf", "--kl-warmup", "1"),
        ("--posterior", "planar", "--prior", "mixture", "--free-bits", "0.1", "1"),
        ("--prior", "vamp", "--bound", "dreg", "--draws", "3"),
        ("--prior", "real-nvp", "--bound", "stl", "--likelihood", "continuous"),
    ],
    ids=lambda options: " ".join(options),
)
def test_flows_priors_and_bounds(options, monkeypatch, tmp_path):
    run(monkeypatch, "train", *SMALL, *options, "--out", tmp_path / "run")
    program = load(tmp_path / "run")
    assert torch.isfinite(evaluate(program, program.sample(5), 5, progress=False).log_px).all()
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "train", "--out", tmp_path / "run", "--resume", "--epochs", "3")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


MODELS = {
    "auxiliary": (),
    "hierarchical": ("--layers", "4", "3", "--guide", "ladder", "--kl-warmup", "1"),
    "draw": ("--glimpses", "2", "--units", "8", "--write-size", "3"),
    "conditional": (),
    "conditional of a quadrant": ("--given", "bottom-left"),
    "m2": ("--labels", "20"),
    "mixture-vae": ("--clusters", "4", "--pretrain", "1"),
    "mixture": ("--covariance", "full", "--clusters", "5"),
    "linear-gaussian": (),
    "deep-markov": ("--rnn", "4", "--weight-decay", "0.1"),
    "linear-state-space": (),
    "hidden-markov": ("--states", "3"),
}
SEQUENTIAL = ("deep-markov", "linear-state-space", "hidden-markov")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_resumes_and_is_measured(name, monkeypatch, tmp_path):
    out = tmp_path / "run"
    sizes = {"hierarchical": SMALL[:4] + SMALL[6:], "mixture": SMALL[:2] + SMALL[6:],
             "linear-gaussian": SMALL[:2] + SMALL[4:], "linear-state-space": SMALL[:2] + SMALL[4:],
             "hidden-markov": SMALL[:2] + SMALL[6:], "draw": SMALL[:2] + SMALL[4:]}  # fmt: skip
    options, size = MODELS[name], 48 if "quadrant" in name else 64
    if name in SEQUENTIAL:
        options, size = (*options, "--data", sequences_file(tmp_path)), 3
    run(monkeypatch, "train", "--model", name.split()[0], *sizes.get(name, SMALL), *options, "--out", out)
    result = json.loads((out / "evaluation.json").read_text())
    assert all(value is not None for value in result["per_datum"]["log_px"])
    assert ("nmi" in result) == name.startswith("mixture")
    run(monkeypatch, "train", "--out", out, "--resume", "--epochs", "3")
    assert len((out / "metrics.csv").read_text().splitlines()) == 4
    if name == "draw":
        (out / "drawing.gif").unlink()
    run(monkeypatch, "sample", out, "--n", "4", "--npy", tmp_path / "x.npy")
    assert (out / "drawing.gif").exists() == (name == "draw")
    drawn = np.load(tmp_path / "x.npy")
    assert (len(drawn), drawn.shape[-1]) == (4, size)


def sequences_file(folder):
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(0, 2, (60, 5, 3)).astype(np.float32), rng.integers(1, 6, 60)
    lengths[[0, -1]] = 5
    np.savez(folder / "sequences.npz", x=x, lengths=np.where(np.arange(60) % 5 == 0, 5, lengths))
    return folder / "sequences.npz"


def test_every_model_of_the_library_has_a_name():
    offered = set(get_args(get_type_hints(Train)["model"]))
    assert offered == {"vae"} | {name.split()[0] for name in MODELS}
    public = [c for c in vars(pyrovae.models).values() if isinstance(c, type) and issubclass(c, pyrovae.LatentModel)]
    assert len(public) == len(offered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "mixture", "--posterior", "iaf"), "Expected --posterior with --model vae or .*; got iaf with"),
        (("--layers", "5", "5"), r"Expected --layers with --model hierarchical alone; got \(5, 5\) with --model vae"),
        (("--model", "hidden-markov"), "Expected --data of sequences, as jsb-chorales, .* hidden-markov; got digits"),
        (("--model", "deep-markov", "--rnn", "0"), "Expected --rnn to be positive; got 0"),
        (("--states", "3"), "Expected --states with --model hidden-markov alone; got 3 with --model vae"),
        (("--model", "hierarchical", "--layers", "0"), "Expected --layers to be positive; got 0"),
        (("--model", "mixture", "--clusters", "2000"), "datum for each of 2000 clusters, or more; got 1437"),
        (
            ("--model", "mixture-vae", "--bound", "iwae"),
            "Expected --bound with --model vae or .*; got iwae with --model mixture-vae",
        ),
        (("--model", "mixture", "--z-dim", "3"), "Expected --z-dim with --model vae or .*; got 3 with --model mixture"),
        (("--model", "m2", "--prior", "vamp"), "Expected another --prior with --model m2"),
        (("--glimpses", "3"), "Expected --glimpses with --model draw alone; got 3 with --model vae"),
        (("--model", "draw", "--write-size", "0"), "Expected --write-size to be positive; got 0"),
    ],
)
def test_options_that_do_not_go_together(options, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "train", *options, "--out", tmp_path / "run")
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_evaluate_compare_and_sample(trained, monkeypatch, capsys, tmp_path):
    run(monkeypatch, "evaluate", trained, "--num-particles", "30", "--part", "val")
    assert "K = 30" in capsys.readouterr().out
    assert json.loads((trained / "evaluation.json").read_text())["part"] == "val"
    run(monkeypatch, "compare", trained, "--num-particles", "1", "20", "--num-data", "50")
    out = capsys.readouterr().out
    for line in ("reference ELBO", "Trace_ELBO", "bound, K = 1 ", "bound, K = 20", "differ by at most"):
        assert line in out
    run(monkeypatch, "sample", trained, "--n", "9", "--npy", tmp_path / "x.npy")
    values = np.load(tmp_path / "x.npy")
    assert values.shape == (9, 64)
    assert set(np.unique(values)) == {0, 1}


def test_resume_goes_on_with_the_runs_own_settings(trained, monkeypatch, tmp_path):
    whole = tmp_path / "whole"
    run(monkeypatch, "train", *SMALL, "--epochs", "4", "--out", whole)
    half = tmp_path / "half"
    run(monkeypatch, "train", *SMALL, "--out", half)
    run(monkeypatch, "train", "--out", half, "--resume", "--epochs", "4")
    assert (whole / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    assert json.loads((half / "config.json").read_text())["command"]["epochs"] == 4


def test_the_rate_falls_geometrically_and_its_horizon_is_kept(monkeypatch, capsys, tmp_path):
    rate = rate_of(Train(lr=1e-2, lr_final=1e-4, epochs=5))
    assert [rate(epoch) for epoch in range(1, 6)] == pytest.approx([1e-2, 10**-2.5, 1e-3, 10**-3.5, 1e-4])
    run(monkeypatch, "train", *SMALL, "--lr-final", "1e-4", "--out", tmp_path / "r")
    with pytest.raises(SystemExit):
        run(monkeypatch, "train", "--out", tmp_path / "r", "--resume", "--epochs", "9")
    assert "Expected --epochs 2, over which --lr-final is reached; got 9" in capsys.readouterr().err
    assert json.loads((tmp_path / "r" / "config.json").read_text())["command"]["epochs"] == 2


def test_what_is_compared_is_spread_over_the_data():
    assert list(range(100))[_spread(100, 10)] == list(range(0, 100, 10))
    assert len(list(range(101))[_spread(101, 10)]) <= 10
    assert list(range(7))[_spread(7, 10)] == list(range(7))


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_family_trains_on_ones_own_file(posterior, likelihood, monkeypatch, tmp_path, capsys):
    rows = np.random.default_rng(0).integers(0, 256, (50, 6)).astype(np.float32) / 255
    np.save(tmp_path / "own.npy", rows)
    options = ["--posterior", posterior, "--likelihood", likelihood, "--data", tmp_path / "own.npy"]
    run(monkeypatch, "train", *SMALL, *options, "--out", tmp_path / "run")
    out = capsys.readouterr().out
    assert ("binarization dynamic" in out) == (likelihood == "bernoulli")
    program = load(tmp_path / "run")
    assert type(program.posterior).__name__ == {"diagonal": "DiagonalNormal", "full": "FullNormal"}[posterior]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "digts"], "Expected a data set.*got 'digts'; did you mean 'digits'"),
        (["train", "--binarize", "none"], "Expected train.*support of site 'x'.*Binarize grey values"),
        (["train", "--z-dim", "0"], "Expected --z-dim to be positive; got 0"),
        (["train", "--hidden", "3", "-1"], "Expected --hidden to be positive; got -1"),
        (["train", "--num-particles", "0"], "Expected --num-particles to be positive; got 0"),
        (["train", "--lr", "-1"], "Expected lr to be a positive number; got -1.0"),
        (["train", "--out", "RUN"], "Expected run_dir to be a new or empty folder"),
        (["train", "--resume"], "Expected --out FOLDER with --resume; got none"),
        (["train", "--resume", "--out", "nowhere"], "Expected a run folder; got nowhere, which has no config.json"),
        (
            ["train", "--resume", "--out", "RUN", "--lr", "0.5"],
            "Expected lr to be 0.001, as in the run to resume; got 0.5",
        ),
        (["sample", "RUN", "--npy", "RUN/model.safetensors"], "Expected --npy to name a .npy file; got "),
        (["compare", "RUN", "--num-data", "0"], "Expected --num-data to be positive; got 0"),
        (["train", "--lr-final", "-1"], "Expected --lr and --lr-final to be positive; got 0.001 and -1.0"),
        (["train", "--device", "cuda"], "Expected device to be one that is here; got 'cuda'"),
        (["evaluate", "nowhere"], "Expected a run folder; got nowhere"),
        (["evaluate", "RUN", "--num-particles", "0"], "num_particles to be a whole number of at least 1; got 0"),
        (["compare", "RUN", "--num-particles", "0"], "num_particles to be a whole number of at least 1; got 0"),
        (["sample", "RUN", "--n", "0"], "Expected --n to be positive; got 0"),
        (["train", "--data", "binarized-mnist"], "Expected PYROVAE_DATA to name a folder; got '/nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, trained, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYROVAE_DATA", "/nowhere")
    held = (trained / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *[word.replace("RUN", str(trained)) for word in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pyrovae: error: ")
    assert re.search(message, error), error
    assert (trained / "model.safetensors").read_bytes() == held


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--epoch", "3"], ["train", "--likelihood", "gauss"], []])
def test_a_typo_is_explained(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    shown = "".join(capsys.readouterr())
    assert stop.value.code in (0, 2)
    assert any(word in shown for word in ("train, evaluate", "--epochs", "bernoulli", "usage"))


def test_the_command_is_installed_and_seeds_nothing_outside():
    out = subprocess.run([sys.executable, "-m", "pyrovae.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in out.stdout for verb in ("train", "evaluate", "compare", "sample"))
    assert torch.initial_seed() == 0


def test_m2_trains_on_few_labels_and_prints_its_error(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "m2"
    run(monkeypatch, "train", "--model", "m2", "--labels", "20", *SMALL, "--out", folder)
    out = capsys.readouterr().out
    assert re.search(r"misclassified +\d+\.\d\d% ± \d+\.\d\d%", out)
    assert "reference and Trace_ELBO, at the same latents, differ by at most" in out
    assert (folder / "analogies.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((folder / "config.json").read_text())
    assert (config["program"]["class"], config["fit"]["num_labeled"]) == ("SemiSupervisedVAE", 20)
    test = load_data("digits", "dynamic", labels=True).test
    share = (load(folder).predict(test).argmax(1) != test["y"]).double().mean().item()
    assert json.loads((folder / "evaluation.json").read_text())["error"] == pytest.approx(share)
    run(monkeypatch, "train", "--out", folder, "--resume", "--epochs", "3")
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


def test_m2_needs_labels(monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((30, 4), np.uint8))
    for arguments, message in (
        (["--data", tmp_path / "x.npy"], "a data set with labels"),
        (["--labels", "0"], "--labels to be positive"),
        (["--labels", "5"], "per_class to be a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "train", "--model", "m2", *arguments, "--out", tmp_path / "r")
        assert message in capsys.readouterr().err
