"""save and load: what comes back, and what is refused unread."""

import json
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

from pyrovae import VAE, LatentModel, checkpoint, configuration, data_plate, load, log_weights, save
from pyrovae.checkpoint import read_checkpoint, read_json, write_checkpoint, write_json, write_whole
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal, UnitNormal
from pyrovae.configuration import build, build_for, describe
from pyrovae.files import locked


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
    monkeypatch.chdir(tmp_path)
    torch.save({"pyrovae": Hostile()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="Expected a checkpoint of pyrovae"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, int.from_bytes(b"PK", "little")])
def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path, length):
    program = Own()
    for size in range(length):  # of what the metadata hold, until the header has the length
        save_file(program.state_dict(), tmp_path / "f", {"more": "x" * (max(0, length - 300) + size)})
        start = (tmp_path / "f").read_bytes()[:8]
        if int.from_bytes(start, "little") == length:
            break
    assert start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert load(tmp_path / "f", program) is program


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


# --- damage ----------------------------------------------------------------------------------------


def test_a_bit_that_flipped_in_the_weights_is_told(tmp_path):
    save(VAE.mlp(6, 2), tmp_path / "vae")
    raw = bytearray((tmp_path / "vae").read_bytes())
    raw[-1] ^= 1  # the least of some weight, still a good number
    (tmp_path / "vae").write_bytes(raw)
    for program in (None, VAE.mlp(6, 2)):
        with pytest.raises(ValueError, match=r"Expected a safetensors file; got .*vae, .*changed or damaged"):
            load(tmp_path / "vae", program)


def test_a_bit_that_flipped_in_a_tensor_of_a_checkpoint_is_told(tmp_path):
    """Torch does not look at its archives' checksums."""
    content = {"settings": {}, "history": [], "program": {"a": torch.arange(100.0)}, "best": {}, "best_epoch": 0}
    write_checkpoint(tmp_path, {**content, "optimizer": {}, "random": []})
    path = tmp_path / "checkpoint.pt"
    assert torch.equal(read_checkpoint(path)["program"]["a"], torch.arange(100.0))
    assert torch.equal(torch.load(path, weights_only=True)["program"]["a"], torch.arange(100.0)), "torch's own, still"
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.tensor(50.0).numpy().tobytes())] ^= 1
    path.write_bytes(raw)
    assert not torch.equal(torch.load(path, weights_only=True)["program"]["a"], torch.arange(100.0))
    with pytest.raises(ValueError, match=r"Expected a checkpoint of pyrovae; got .*checkpoint.pt.*changed or damaged"):
        read_checkpoint(path)


def test_a_changed_configuration_is_told_and_may_be_meant(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"command": {"seed": 0}})
    text = path.read_text()
    path.write_text(text.replace(": 0", ": 1"))
    with pytest.raises(ValueError, match=r"Expected a JSON file; got .*config.json.*changed or damaged.*take 'sha256'"):
        read_json(path)
    path.write_text(json.dumps({"command": {"seed": 1}}))
    assert read_json(path) == {"command": {"seed": 1}}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    program, other = VAE.mlp(6, 2), VAE.mlp(6, 2)
    before = weights_of(other)
    with torch.no_grad():
        program.likelihood.net.layers[0].bias[1] = bad
    save(program, tmp_path / "vae")
    for given in (None, other):
        with pytest.raises(ValueError, match=r"has likelihood.net.layers.0.bias with values that are not finite"):
            load(tmp_path / "vae", given)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_buffer_that_is_infinite_by_design_is_not_refused(tmp_path):
    program, other = Own(), Own()
    for each in (program, other):
        each.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    save(program, tmp_path / "own")
    assert torch.equal(load(tmp_path / "own", other).net.weight, program.net.weight)


@pytest.mark.parametrize("entry", (zoo.PROGRAMS | zoo.LABELED).values(), ids=zoo.PROGRAMS | zoo.LABELED)
def test_every_program_is_built_without_memory_first(entry):
    """With a tenth of the bounds, so that larger programs come well within them."""
    program = entry.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "CALLS", (100, 10))
        patch.setattr(configuration, "NUMBERS", 10_000)
        built = build_for(describe(program), program.state_dict())
    assert {name: value.shape for name, value in built.named_buffers()} == {
        name: value.shape for name, value in program.named_buffers()
    }
    assert all(value.device.type == "cpu" for value in built.state_dict().values())


@pytest.mark.parametrize(
    ("value", "message"),
    [(10**12, r"sizes of at most 1048576"), (10**6, r"for the \d+ numbers of its file; got one for \d+")],
)
def test_a_configuration_that_asks_for_more_than_the_file_has_is_refused(value, message):
    program = VAE.mlp(6, 2, (5,))
    config = describe(program)
    config["arguments"]["likelihood"]["arguments"]["net"]["arguments"]["hidden"] = [value, 100]
    with pytest.raises(ValueError, match=message):
        build_for(config, program.state_dict())
    config["arguments"]["likelihood"]["arguments"]["net"]["arguments"]["hidden"] = [1] * 10_000
    with pytest.raises(ValueError, match="makes more modules"):
        build_for(config, program.state_dict())


def test_a_folder_is_held_by_one_thread_and_left_empty(tmp_path):
    def other():
        with pytest.raises(BlockingIOError, match=f"another run is going on: '{tmp_path}'"), locked(tmp_path):
            pass
        return True

    with locked(tmp_path), ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result()
        with locked(tmp_path):  # further in, as the command line and fit
            pass
        assert pool.submit(other).result()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_what_a_killed_process_left_half_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.part").write_text("half")
    (tmp_path / ".lock").touch()
    with checkpoint.locked(tmp_path, resume=False):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    (tmp_path / f".checkpoint.pt.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_checkpoint(tmp_path, {"program": {}})
    assert not list(tmp_path.iterdir())


def test_an_average_of_another_shape_is_refused_before_a_fused_step_writes_beyond_it():
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(1000)
    optimizer.step()
    state = optimizer.state_dict()
    checkpoint.restore_optimizer(torch.optim.Adam([weight], fused=True), state)
    state["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"it has exp_avg of shape \(1,\) for \(1000,\)"):
        checkpoint.restore_optimizer(torch.optim.Adam([weight], fused=True), state)
