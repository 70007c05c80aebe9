"""Files: a program's weights and configuration, and the run folder that training can be resumed from."""

import csv
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version as installed_version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pyrovae import files
from pyrovae.configuration import build_for, describe
from pyrovae.files import parsing, printable, sealed, unsealed, write_whole
from pyrovae.files import read_json as read_json
from pyrovae.files import write_json as write_json
from pyrovae.program import LatentModel
from pyrovae.traces import check_arguments

CONFIG, METRICS, WEIGHTS, CHECKPOINT = "config.json", "metrics.csv", "model.safetensors", "checkpoint.pt"
PARTS = {"pyrovae": str, "settings": dict, "history": list, "program": dict, "optimizer": dict, "best": dict,
         "best_epoch": int, "random": list}  # fmt: skip
PARAM = "pyro_params."
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


version = cache(installed_version)  # read once: what is installed may be out of reach, or another, when a run is saved


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
    about["sha256"] = _digest(tensors, about)
    metadata = {"pyrovae": json.dumps(about)}  # one entry: safetensors does not keep the order of several
    content = to_bytes(tensors, metadata)
    write_whole(path, lambda file: file.write_bytes(content))


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of what a file says of itself and of its tensors' names, types, shapes and bytes."""
    about = {key: value for key, value in about.items() if key != "sha256"}
    shapes = {name: [str(value.dtype), *value.shape] for name, value in tensors.items()}
    digest = hashlib.sha256(json.dumps([about, shapes], sort_keys=True).encode())
    for _, value in sorted(tensors.items()):
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: str | Path, program: LatentModel | None = None) -> LatentModel:
    """Read a program written by `save` or left in a run folder by `fit`.

    Nothing in the file is executed: only pyrovae's own classes are built, from their configuration, and none that is
    larger than the file can fill.

    Args:
        path: of the file, or of a run folder.
        program: is filled with the weights and returned; needed for classes and functions of your own.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is truncated, changed, foreign or a pickle (which is not read), for a class that
            is not pyrovae's own and no program to fill, and for weights that do not fit or are not finite; the
            program is then untouched.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"Expected a file of weights; got {path}, which does not exist")
    tensors, about = _read_safetensors(path)
    if program is None:
        program = _build_program(path, about, tensors)
        dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
        if len(dtypes) == 1 and dtypes <= FLOATS:
            program.to(dtypes.pop())
    fill(program, tensors, str(path))
    return program


def fill(program: LatentModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a program, or raise ValueError and leave it as it was."""
    check_weights(program, tensors, source)
    again = {name: first for name, first in _second_names(program).items() if first in tensors}
    tensors = {**tensors, **{name: tensors[first] for name, first in again.items()}}
    for name in _new_params(program, tensors):
        program.pyro_params[name.removeprefix(PARAM)] = nn.Parameter(tensors[name].clone())
    program.load_state_dict(dict(tensors))


def check_weights(program: LatentModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError where weights do not fit a program, or are not finite and not a buffer that has always been."""
    check_arguments(program)
    own = program.state_dict()
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"Expected the weights of a {type(program).__name__}; got {source}, which has others than tensors"
        )
    again = {name: first for name, first in _second_names(program).items() if first in tensors}
    problems = [
        f"has {name} other than {first}, which are one"
        for name, first in again.items()
        if not torch.equal(tensors.get(name, tensors[first]), tensors[first])
    ]
    tensors = {**tensors, **{name: tensors[first] for name, first in again.items()}}
    new = _new_params(program, tensors)
    problems += [f"lacks {name}" for name in own.keys() - tensors.keys()]
    problems += [f"has {printable(name)} too" for name in tensors.keys() - own.keys() - new]
    problems += [
        f"has {name} of shape {tuple(tensors[name].shape)} in the place of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems += [
        f"has {name} of {tensors[name].dtype} in the place of {value.dtype}"
        for name, value in own.items()
        if name in tensors and (tensors[name].dtype in FLOATS) != (value.dtype in FLOATS)
    ]
    fixed = {name for name, value in program.named_buffers() if not _is_finite(value)}
    problems += [
        f"has {printable(name)} with values that are not finite"
        for name, value in tensors.items()
        if name not in fixed and not _is_finite(value)
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"Expected the weights of a {type(program).__name__}; got {source}, which {shown}")


def _is_finite(value: Tensor) -> bool:
    return value.dtype not in FLOATS or bool(torch.isfinite(value).all())


def _new_params(program: LatentModel, tensors: Mapping[str, Tensor]) -> set[str]:
    """Values of `pyro.param` that the program has not met yet, since it has not run."""
    params = program.pyro_params
    return {
        name
        for name in tensors
        if name.startswith(PARAM) and (key := name.removeprefix(PARAM)) not in params
        if key and "." not in key and not hasattr(params, key) and tensors[name].dtype in FLOATS
    }


def _second_names(program: nn.Module) -> dict[str, str]:
    """The names under which a tensor of the program comes again, as one shared by two networks, with its first."""
    first: dict[int, str] = {}
    everywhere = program.named_parameters(remove_duplicate=False), program.named_buffers(remove_duplicate=False)
    return {name: first[id(t)] for name, t in chain(*everywhere) if first.setdefault(id(t), name) != name}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what pyrovae says of them, where it wrote the file."""
    with path.open("rb") as file:
        start = file.read(9)  # the length of a header, which may look like anything, and its first brace
    if start[8:] != b"{" and start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"Expected a safetensors file; got {path}, which is a pickle or an archive. It was not read")
    with parsing(path, "a safetensors file"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("pyrovae", "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"its metadata hold a {type(about).__name__}, no object")
        if "sha256" in about and about["sha256"] != _digest(tensors, about):
            raise ValueError("it was changed or damaged after it was written")
    return tensors, about


def _build_program(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LatentModel:
    if "config" not in about:
        raise ValueError(f"Expected a file written by pyrovae, or program=...; got {path}, which has no configuration")
    with parsing(path, "a configuration of pyrovae's own classes"):
        program = None if about["config"] is None else build_for(about["config"], tensors)
    if not isinstance(program, LatentModel):
        raise ValueError(
            f"Expected program=..., to be filled with the weights; got none, and {path} holds those of "
            f"{printable(repr(about.get('program')))}, which is not made of pyrovae's own classes alone"
        )
    return program


# --- run folders -----------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, resume: bool) -> Iterator[None]:
    """Hold a run folder, which is made for a new run, for this run alone; what a killed one left half is removed.

    Raises:
        BlockingIOError: where another run is going on in the folder.
        FileExistsError, FileNotFoundError: as `check_folder`.
    """
    check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        files.remove_leftovers(folder)
        yield


def open_run(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, or None where a new run may begin in the folder, which is then made.

    Raises:
        FileExistsError, FileNotFoundError: as `check_folder`; for weights to be resumed without a checkpoint.
        ValueError: for a checkpoint that is truncated, changed or foreign.
    """
    check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    if resume and (folder / CHECKPOINT).exists():
        return read_checkpoint(folder / CHECKPOINT)
    if resume and (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"Expected {CHECKPOINT} in the run to resume; got {folder}, with weights alone")
    return None


def check_folder(folder: Path, resume: bool) -> None:
    """Whether a run may begin, or go on, in a folder.

    Raises:
        FileExistsError: where it has anything but a configuration in it, and is not to be resumed.
        FileNotFoundError: where a run that does not exist is to be resumed.
    """
    if not resume:
        check_new(folder)
    elif not folder.is_dir():
        raise FileNotFoundError(f"Expected run_dir to be a run to resume; got {folder}, which does not exist")


def check_new(folder: Path) -> None:
    """Raises FileExistsError where the folder has anything but a configuration in it."""
    if folder.exists() and (not folder.is_dir() or not all(map(_may_be_there, folder.iterdir()))):
        raise FileExistsError(
            f"Expected run_dir to be a new or empty folder; got {folder}, which is not. "
            "To go on with a run: resume=True"
        )


def _may_be_there(path: Path) -> bool:
    """What a run that has not written yet may have left."""
    return path.name in (CONFIG, files.LOCK) or files.is_leftover(path)


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """All that resuming needs: tensors and plain values alone, sealed."""
    buffer = io.BytesIO()  # torch reports a disk that is full as a RuntimeError
    torch.save({**content, "pyrovae": version("pyrovae")}, buffer)
    write_whole(folder / CHECKPOINT, lambda file: file.write_bytes(sealed(buffer.getbuffer())))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote; nothing in the file is executed, nor unpacked to more than its size.

    Raises:
        ValueError: for a file that is truncated, changed or foreign.
    """
    with parsing(path, "a checkpoint of pyrovae"):
        raw = unsealed(path.read_bytes())
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        _check_stored(content)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in PARTS.items()):
        raise ValueError(f"Expected a checkpoint of pyrovae; got {path}, which is another program's")
    history = content["history"]
    rows = all(
        isinstance(row, dict) and all(isinstance(value, int | float) for value in row.values()) for row in history
    )
    plain = all(value is None or isinstance(value, str | int | float | list) for value in content["settings"].values())
    if not rows or not plain or not 0 <= content["best_epoch"] <= len(history):
        raise ValueError(f"Expected a checkpoint of pyrovae; got {path}, whose history or settings are none")
    return content


def _check_stored(content: Any) -> None:
    """Raises ValueError for a tensor that claims more numbers than are stored."""
    if isinstance(content, Tensor):
        whole = content.layout is torch.strided and content.device.type == "cpu"
        if not whole or content.numel() * content.element_size() > content.untyped_storage().nbytes():
            raise ValueError(f"it has a tensor of shape {tuple(content.shape)}, which is not stored")
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            _check_stored(value)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer its state back.

    Raises:
        ValueError: for options of another kind, and averages of another shape than their parameters', over whose end a
            fused step would write.
    """
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        other = [name for name, value in own.items() if name != "params" and not _alike(saved[name], value)]
        if other or own.keys() != saved.keys():
            raise ValueError(f"it has other options of the optimizer: {', '.join(map(str, other or saved))}")
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            for name, value in optimizer.state.get(parameter, {}).items():
                if value.shape != (() if name == "step" else parameter.shape):
                    raise ValueError(f"it has {name} of shape {tuple(value.shape)} for {tuple(parameter.shape)}")


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) or {type(one), type(other)} == {int, float}


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
    if not 0 <= position <= len(keys):  # which NumPy believes
        raise ValueError(f"it has the state of a generator at {position} of {len(keys)}")
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
