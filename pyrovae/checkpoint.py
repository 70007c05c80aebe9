"""Files: a program's weights and configuration, and the run folder that training can be resumed from."""

import csv
import inspect
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pyrovae import conditionals, models, nets
from pyrovae.program import LatentModel
from pyrovae.traces import check_arguments

CONFIG, METRICS, WEIGHTS, CHECKPOINT = "config.json", "metrics.csv", "model.safetensors", "checkpoint.pt"


def save(program: LatentModel, path: str | Path) -> None:
    """Write weights and, for pyrovae's own classes, the configuration, into one safetensors file.

    The file is written beside its final name, flushed and then renamed: there is never half a file.

    Args:
        program: a `LatentModel`.
        path: of the file.

    Raises:
        ValueError: for what is not a `LatentModel`.
        OSError: where the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pyrovae import VAE, load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(VAE.mlp(64, 2), f"{folder}/vae.safetensors")
        ...     type(load(f"{folder}/vae.safetensors")).__name__
        'VAE'
    """
    check_arguments(program)
    save_weights(program, program.state_dict(), Path(path))


def save_weights(program: LatentModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights that the program had, with its configuration."""
    again = _second_names(program)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items() if name not in again}
    about = {"version": version("pyrovae"), "program": type(program).__name__, "config": describe(program)}
    metadata = {"pyrovae": json.dumps(about)}  # one entry: safetensors does not keep the order of several
    write_whole(path, lambda file: file.write_bytes(to_bytes(tensors, metadata)))


def load(path: str | Path, program: LatentModel | None = None) -> LatentModel:
    """Read a program written by `save` or left in a run folder by `fit`.

    Nothing in the file is executed: only pyrovae's own classes are built, from their configuration.

    Args:
        path: of the file, or of a run folder.
        program: is filled with the weights and returned; needed for classes and functions of your own.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is truncated, foreign or a pickle (which is not read), for a class that is not
            pyrovae's own and no program to fill, and for weights that do not fit; the program is then untouched.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"Expected a file of weights; got {path}, which does not exist")
    tensors, metadata = _read_safetensors(path)
    if program is None:
        program = _build_program(path, metadata)
        dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
        if len(dtypes) == 1:
            program.to(dtypes.pop())
    fill(program, tensors, str(path))
    return program


def fill(program: LatentModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a program, or raise ValueError and leave it as it was."""
    check_arguments(program)
    own = program.state_dict()
    again = {name: first for name, first in _second_names(program).items() if first in tensors}
    problems = [
        f"has {name} other than {first}, which are one"
        for name, first in again.items()
        if not torch.equal(tensors.get(name, tensors[first]), tensors[first])
    ]
    tensors = {**tensors, **{name: tensors[first] for name, first in again.items()}}
    # pyro.param values that the program has not met yet, since it has not run
    new = {name: value for name, value in tensors.items() if name.startswith("pyro_params.") and name not in own}
    problems += [f"lacks {name}" for name in own.keys() - tensors.keys()]
    problems += [f"has {name} too" for name in tensors.keys() - own.keys() - new.keys()]
    problems += [
        f"has {name} of shape {tuple(tensors[name].shape)} in the place of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"Expected the weights of a {type(program).__name__}; got {source}, which {shown}")
    for name, value in new.items():
        program.pyro_params[name.removeprefix("pyro_params.")] = nn.Parameter(value.clone())
    program.load_state_dict(dict(tensors))


def _second_names(program: nn.Module) -> dict[str, str]:
    """The names under which a tensor of the program comes again, as one shared by two networks, with its first."""
    first: dict[int, str] = {}
    everywhere = program.named_parameters(remove_duplicate=False), program.named_buffers(remove_duplicate=False)
    return {name: first[id(t)] for name, t in chain(*everywhere) if first.setdefault(id(t), name) != name}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"Expected a safetensors file; got {path}, which is a pickle or an archive. It was not read")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"Expected a safetensors file; got {path}, which is truncated or foreign: {error}") from error


def _build_program(path: Path, metadata: Mapping[str, str]) -> LatentModel:
    if "pyrovae" not in metadata:
        raise ValueError(f"Expected a file written by pyrovae, or program=...; got {path}, which has no configuration")
    try:
        about = json.loads(metadata["pyrovae"])
        program = None if about["config"] is None else build(about["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"Expected a configuration of pyrovae's own classes in {path}; got {error}") from error
    if not isinstance(program, LatentModel):
        raise ValueError(
            f"Expected program=..., to be filled with the weights; got none, and {path} holds those of "
            f"{about.get('program')!r}, which is not made of pyrovae's own classes alone"
        )
    return program


# --- configuration ---------------------------------------------------------------------------------
# Every class keeps each argument of its constructor under the argument's own name, so that it can be read back.


def _own_classes() -> dict[str, type[nn.Module]]:
    return {
        name: value
        for room in (nets, conditionals, models)
        for name, value in vars(room).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("pyrovae.")
    }


def describe(value: Any) -> Any:
    """A module of pyrovae's own classes as JSON: `{"class": ..., "arguments": {...}}`; None for any other.

    A module that comes again, as a posterior that a prior shares, is `{"shared": "prior.posterior"}`, its first place.

    Example:
        >>> from pyrovae.conditionals import UnitNormal
        >>> from pyrovae.nets import MLP
        >>> describe(UnitNormal(MLP(2, 3, hidden=())))["arguments"]["net"]["arguments"]["out_dim"]
        3
    """
    try:
        return _describe(value, "", {})
    except LookupError:
        return None


def _describe(value: Any, place: str, seen: dict[int, str]) -> Any:
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_describe(item, f"{place}.{i}", seen) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return {"shared": seen[id(value)]}
    name = type(value).__name__
    if _own_classes().get(name) is not type(value):
        raise LookupError(name)
    seen[id(value)] = place.removeprefix(".")
    arguments = inspect.signature(type(value)).parameters
    return {"class": name, "arguments": {a: _describe(getattr(value, a), f"{place}.{a}", seen) for a in arguments}}


def build(config: Any) -> Any:
    """The module that `describe` described, newly initialised.

    Raises:
        ValueError: for a class that is not pyrovae's own, or a shared module that is in no place before.
    """
    return _build(config, "", {})


def _build(config: Any, place: str, built: dict[str, nn.Module]) -> Any:
    if isinstance(config, list):
        return [_build(item, f"{place}.{i}", built) for i, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if "shared" in config:
        if config["shared"] not in built:
            raise ValueError(f"Expected a module that is shared to be described before; got {config['shared']!r}")
        return built[config["shared"]]
    classes = _own_classes()
    if config.get("class") not in classes:
        raise ValueError(f"Expected one of pyrovae's own classes; got {config.get('class')!r}")
    arguments = {name: _build(value, f"{place}.{name}", built) for name, value in config["arguments"].items()}
    module = built[place.removeprefix(".")] = classes[config["class"]](**arguments)
    return module


# --- run folders -----------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its final name, flush it to the disk, then rename it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in the way of `write_whole`; what is not finite, and so no JSON, becomes null."""
    write_whole(path, lambda file: file.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no object")
    except ValueError as error:
        raise ValueError(f"Expected a JSON file; got {path}: {error}") from error
    return content


def open_run(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, or None where a new run may begin in the folder, which is then made.

    Raises:
        FileExistsError: where the folder has anything but a configuration in it, and it is not to be resumed.
        FileNotFoundError: where a run that does not exist is to be resumed.
        ValueError: for a checkpoint that is truncated or foreign.
    """
    if resume:
        if not folder.is_dir():
            raise FileNotFoundError(f"Expected run_dir to be a run to resume; got {folder}, which does not exist")
        if (folder / CHECKPOINT).exists():
            return read_checkpoint(folder / CHECKPOINT)
        if (folder / WEIGHTS).exists():
            raise FileNotFoundError(f"Expected {CHECKPOINT} in the run to resume; got {folder}, with weights alone")
        return None
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return None


def check_new(folder: Path) -> None:
    """Raises FileExistsError where the folder has anything but a configuration in it."""
    if folder.exists() and (not folder.is_dir() or any(path.name != CONFIG for path in folder.iterdir())):
        raise FileExistsError(
            f"Expected run_dir to be a new or empty folder; got {folder}, which is not. "
            "To go on with a run: resume=True"
        )


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """All that resuming needs: tensors and plain values alone."""
    content = {**content, "pyrovae": version("pyrovae")}
    write_whole(folder / CHECKPOINT, lambda file: torch.save(content, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote; nothing in the file is executed.

    Raises:
        ValueError: for a file that is truncated or foreign.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"Expected a checkpoint of pyrovae; got {path}, truncated or foreign: {reason}") from error
    if not isinstance(content, dict) or not {"pyrovae", "settings", "history", "program", "random"} <= content.keys():
        raise ValueError(f"Expected a checkpoint of pyrovae; got {path}, which is another program's")
    return content


def random_state() -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put torch's, NumPy's and Python's generators where they were when the checkpoint was written."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    random.setstate(state["python"])


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """The history as metrics.csv, a row for each epoch."""

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(history[0]) if history else ["epoch"])
            writer.writeheader()
            writer.writerows(history)

    write_whole(folder / METRICS, write)
