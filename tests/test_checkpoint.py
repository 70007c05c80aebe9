"""save and load: what comes back, and what is refused unread."""

import json
import os
import pickle
import struct

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyrovae import VAE, LatentModel, data_plate, load, log_weights, save
from pyrovae.checkpoint import read_json, write_json, write_whole
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal, UnitNormal
from pyrovae.configuration import build, describe


class Own(LatentModel):
    """A class that is not pyrovae's."""

    def __init__(self, units=3):
        super().__init__()
        self.net = nn.Linear(2, units)

    def model(self, x=None):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[..., :2], 1.0).to_event(1))


def weights_of(program):
    return {name: value.clone() for name, value in program.state_dict().items()}


def test_what_is_saved_comes_back_with_the_same_weights_and_density(tmp_path):
    vae = VAE.mlp(6, 2, (5, 4), posterior=UnitNormal).double()
    save(vae, tmp_path / "vae")
    loaded = load(tmp_path / "vae")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))
    x = torch.zeros(3, 6, dtype=torch.float64)
    torch.manual_seed(0)
    log_w = log_weights(vae, x, 4)
    torch.manual_seed(0)
    assert torch.equal(log_w, log_weights(loaded, x, 4))


def test_the_file_is_safetensors_with_a_readable_configuration(tmp_path):
    vae = VAE.mlp(6, 2, (5,))
    save(vae, tmp_path / "vae")
    tensors = load_file(tmp_path / "vae")
    assert tensors.keys() == vae.state_dict().keys()
    raw = (tmp_path / "vae").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    about = json.loads(header["__metadata__"]["pyrovae"])
    assert about["config"] == describe(vae)
    assert about["config"]["arguments"]["likelihood"]["arguments"]["net"]["arguments"]["hidden"] == [5]


def test_saving_again_gives_the_same_bytes(tmp_path):
    vae = VAE.mlp(6, 2)
    for name in ("a", "b"):
        save(vae, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_ones_own_class_is_filled(tmp_path):
    program, other = Own(), Own()
    save(program, tmp_path / "own")
    assert load(tmp_path / "own", other) is other
    assert torch.equal(program.net.weight, other.net.weight)
    with pytest.raises(
        ValueError, match=r"Expected program=.* holds those of 'Own', which is not made of pyrovae's own"
    ):
        load(tmp_path / "own")


def test_a_foreign_network_inside_makes_it_ones_own(tmp_path):
    vae = VAE(StandardNormal(2), Bernoulli(nn.Linear(2, 6)), DiagonalNormal.mlp(6, 2))
    assert describe(vae) is None
    save(vae, tmp_path / "vae")
    with pytest.raises(ValueError, match=r"Expected program="):
        load(tmp_path / "vae")


def test_shared_parameters_are_saved_and_stay_shared(tmp_path):
    def tied():
        vae = VAE.mlp(6, 6, ())
        vae.likelihood = Bernoulli(vae.likelihood.net)
        vae.posterior.net.second = vae.likelihood.net
        return vae

    vae, other = tied(), tied()
    save(vae, tmp_path / "vae")
    load(tmp_path / "vae", other)
    assert torch.equal(vae.likelihood.net.layers[0].weight, other.likelihood.net.layers[0].weight)
    assert other.posterior.net.second is other.likelihood.net


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: Own(4), r"net.bias of shape \(3,\) in the place of \(4,\)"),
        (lambda: VAE.mlp(6, 2), r"has net.bias too"),
    ],
)
def test_weights_that_do_not_fit_leave_the_program_untouched(tmp_path, program, message):
    save(Own(), tmp_path / "own")
    program = program()
    before = weights_of(program)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "own", program)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(pickle.dumps(Hostile())),
    lambda path: torch.save({"weights": Hostile()}, path),
    lambda path: torch.save(VAE.mlp(6, 2).state_dict(), path),
])  # fmt: skip
def test_a_pickle_is_refused_unread(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"Expected a safetensors file; got .*weights, which is a pickle.*not read"):
        load(tmp_path / "weights")
    assert not (tmp_path / "executed").exists()


def test_a_hostile_checkpoint_is_not_executed(tmp_path, monkeypatch):
    from pyrovae.checkpoint import read_checkpoint

    monkeypatch.chdir(tmp_path)
    torch.save({"pyrovae": Hostile()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="Expected a checkpoint of pyrovae"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("cut", [0, 3, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    save(VAE.mlp(6, 2), tmp_path / "vae")
    raw = (tmp_path / "vae").read_bytes()
    (tmp_path / "vae").write_bytes(raw[:cut])
    with pytest.raises(ValueError, match=r"Expected a safetensors file; got .*truncated or foreign"):
        load(tmp_path / "vae")


@pytest.mark.parametrize(
    "config",
    [
        {"class": "os.system", "arguments": {"command": "touch executed"}},
        {"class": "Linear", "arguments": {"in_features": 2, "out_features": 2}},
        {"class": "VAE", "arguments": {"nothing": 1}},
        {"class": "VAE"},
        {"class": "MLP", "arguments": {"in_dim": "2", "out_dim": 2}},
        ["VAE"],
    ],
)
def test_a_hostile_configuration_builds_nothing_but_pyrovaes_classes(tmp_path, config):
    save_file({"a": torch.zeros(1)}, tmp_path / "f", {"pyrovae": json.dumps({"config": config, "program": "VAE"})})
    with pytest.raises(ValueError, match=r"Expected (a configuration of pyrovae's own classes|program=)"):
        load(tmp_path / "f")


def test_a_foreign_safetensors_file_fills_a_program_that_is_given(tmp_path):
    program = Own()
    save_file({"net.weight": torch.ones(3, 2), "net.bias": torch.ones(3)}, tmp_path / "f")
    with pytest.raises(ValueError, match=r"which has no configuration"):
        load(tmp_path / "f")
    assert torch.equal(load(tmp_path / "f", program).net.bias, torch.ones(3))


def test_missing_files_and_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a file of weights; got .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors, which does not exist"):
        load(tmp_path)
    with pytest.raises(ValueError, match="Expected program to be a LatentModel; got Linear"):
        save(nn.Linear(2, 2), tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "f", {"a": [1.5, float("nan")], "b": float("inf")})
    content = {"a": [1.5, None], "b": None}
    assert json.loads((tmp_path / "f").read_text()).items() > content.items()
    assert read_json(tmp_path / "f") == content


def test_build_makes_what_describe_described():
    config = describe(VAE.mlp(6, 2, (3,), activation="relu"))
    assert build(config).likelihood.net.activation == "relu"
    assert describe(build(json.loads(json.dumps(config)))) == config
