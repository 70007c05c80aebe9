"""The command line: pyrovae train | evaluate | compare | sample."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tyro
from torch.optim import Adam

from pyrovae import checkpoint, models, plots
from pyrovae import data as data_sets
from pyrovae.compare import compare
from pyrovae.compiled import CompileError
from pyrovae.evaluate import Evaluation, evaluate
from pyrovae.fit import fit
from pyrovae.music import write_midi
from pyrovae.options import Compare, Evaluate, Sample, Train, stored_options
from pyrovae.processes import Processes
from pyrovae.program import LatentModel, device_of
from pyrovae.recipes import (
    SEQUENTIAL,
    bound_of,
    check_options,
    has,
    load_splits,
    num_classes,
    of_part,
    program_of,
    rate_of,
    shown,
)
from pyrovae.run import score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAY_CHANGE = (
    "epochs",
    "patience",
    "device",
    "devices",
    "num_nodes",
    "num_particles",
    "resume",
    "out",
)  # of a run that is resumed


def main() -> None:
    """Entry point of the command `pyrovae`."""
    actions = {Train: _train, Evaluate: _evaluate, Compare: _compare, Sample: _sample}
    try:
        command = _parse(sys.argv[1:])
        actions[type(command)](command)
    except (ValueError, FloatingPointError, OSError, CompileError) as error:
        print(f"pyrovae: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\npyrovae: interrupted; a run goes on by: pyrovae train --out FOLDER --resume", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: list[str]) -> Any:
    command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "evaluate": Evaluate, "compare": Compare, "sample": Sample},
        prog="pyrovae",
        description="Deep latent-variable models as Pyro programs. `pyrovae train` alone trains on digits.",
        args=arguments,
    )
    if not isinstance(command, Train) or not command.resume:
        return command
    if command.out is None:
        raise ValueError("Expected --out FOLDER with --resume; got none")
    stored = replace(_stored(command.out), out=command.out, resume=True)
    command = tyro.cli(Train, prog="pyrovae train", args=arguments[1:], default=stored)
    if command.lr_final is not None and command.epochs != stored.epochs:
        raise ValueError(f"Expected --epochs {stored.epochs}, over which --lr-final is reached; got {command.epochs}")
    for name, value in asdict(stored).items():
        if name not in MAY_CHANGE and getattr(command, name) != value:
            raise ValueError(f"Expected {name} to be {value}, as in the run to resume; got {getattr(command, name)}")
    return command


def _stored(run: Path) -> Train:
    """The command that made a run."""
    if not (run / checkpoint.CONFIG).exists():
        raise FileNotFoundError(f"Expected a run folder; got {run}, which has no {checkpoint.CONFIG}")
    config = checkpoint.read_json(run / checkpoint.CONFIG)
    try:
        return stored_options(config["command"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a run made by `pyrovae train`; got {run / checkpoint.CONFIG}, without its command ({error})"
        ) from error


def _train(command: Train) -> None:
    """`pyrovae train`."""
    check_options(command)
    splits = load_splits(command)
    lr, _ = rate_of(command), bound_of(command, len(splits.train))  # before a VAE is trained for its clusters
    processes = Processes.start(command.device, command.devices, command.num_nodes)
    folder = processes.first(lambda: _new_folder(command))
    with _first_alone_prints(processes), ExitStack() as held:
        program, data = program_of(command, splits)
        processes.first(lambda: _begin(command, splits, folder, held))
        print(
            f"{command.data}: {len(splits.train)} training, {len(splits.val)} validation, {len(splits.test)} test data "
            f"of {_values(splits)}, binarization {splits.binarize}\n"
            f"{type(program).__name__} with {sum(p.numel() for p in program.parameters()):,} parameters"
            f"{_families(command)}; writing to {folder}"
        )
        history = fit(
            program,
            **data,
            **bound_of(command, len(data["train"])),
            epochs=command.epochs,
            batch_size=command.batch_size,
            lr=lr,
            optimizer=partial(Adam, weight_decay=command.weight_decay, fused=True) if command.weight_decay else None,
            patience=command.patience,
            grad_clip=command.grad_clip,
            seed=command.seed,
            run_dir=folder,
            resume=command.resume,
            device=command.device,
            precision=command.precision,
            compile=command.compile,
        )
        processes.first(lambda: _show(command, program, splits, folder, history))
        _evaluate(Evaluate(folder, command.num_particles, compile=command.compile), program)
        ladder = tuple(k for k in Compare.num_particles if k < command.num_particles)
        if processes.rank == 0:
            _compare(Compare(folder, (*ladder, command.num_particles)), program)


def _first_alone_prints(processes: Processes) -> AbstractContextManager[Any]:
    return redirect_stdout(None) if processes.rank > 0 else nullcontext()


def _new_folder(command: Train) -> Path:
    """Of the run; it is free, unless the run is resumed."""
    folder = command.out or Path("runs") / f"{Path(command.data).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if not command.resume:
        checkpoint.check_new(folder)
    return folder


def _begin(command: Train, splits: data_sets.Splits, folder: Path, held: ExitStack) -> None:
    """Hold the folder, and write down what is asked of the run."""
    held.enter_context(checkpoint.locked(folder, command.resume))
    if not command.resume:
        _record(command, splits, folder)


def _show(
    command: Train, program: LatentModel, splits: data_sets.Splits, folder: Path, history: list[dict[str, float]]
) -> None:
    """Say what became of the training, and draw its pictures."""
    _record(command, splits, folder)
    best = max(history, key=score)
    seconds = sum(row["seconds"] for row in history)
    error = f", error {best['val_error']:.2%}" if "val_error" in best else ""
    found = f"validation ELBO {best['val_elbo']:.3f}{error}"
    print(f"best epoch {best['epoch']} of {len(history)}, {found}, {seconds:.0f} s\n")
    for name, figure in _pictures(command, program, splits, history).items():
        _draw(figure, folder / f"{name}.png")
    _animate(program, splits, folder)


def _values(splits: data_sets.Splits) -> str:
    """How large a datum is, in words."""
    x = splits.train["x"]
    return f"{x.shape[1]} values" if x.dim() == 2 else f"up to {x.shape[1]} steps of {x.shape[2]} values"


def _families(command: Train) -> str:
    """The families that the model was given, in words."""
    asked = [f"{getattr(command, role)} {role}" for role in ("prior", "posterior", "likelihood") if has(command, role)]
    return "".join(f", {each}" for each in asked)


def _pictures(
    command: Train, program: LatentModel, splits: data_sets.Splits, history: list[dict[str, float]]
) -> dict[str, Figure]:
    test, shape = of_part(command, splits, "test"), splits.shape
    pictures = {"learning_curves": plots.learning_curves(history)}
    few = shown(test.rows(_spread(len(test), 10)))
    if command.model in SEQUENTIAL:
        both = {"test data": few["x"], "reconstructions": program.reconstruct(few)}
        pictures["reconstructions"] = plots.sequences(both, few["lengths"])
        return pictures | {"samples": _samples(command, program, splits)}
    if command.model == "conditional" and command.given != "class":
        pictures["completions"] = plots.completions(program, few, shape, command.given)
    else:
        pictures["samples"] = _samples(command, program, splits)
        pictures["reconstructions"] = plots.reconstructions(program, few, shape)
    if command.model != "mixture":
        site = {"hierarchical": "z1", "draw": "z_1"}.get(command.model, "z")
        pictures["latent_space"] = plots.latent_space(program, shown(test), splits.test.tensors.get("y"), site=site)
    if command.model == "m2":
        pictures["analogies"] = plots.analogies(program, few, shape)
    return pictures


def _samples(command: Train, program: LatentModel, splits: data_sets.Splits, n: int = 64) -> Figure:
    """Draws; of a model of clusters or classes a row for each."""
    import torch

    if command.model in SEQUENTIAL:
        lengths = splits.test["lengths"][:n]
        return plots.sequences({"samples": program.sample(len(lengths), lengths=lengths)}, lengths)
    if command.model in ("mixture", "mixture-vae"):
        return plots.samples(program, command.clusters**2, splits.shape, c=_rows(command.clusters))
    if command.model == "conditional" and command.given == "class":
        classes = num_classes(splits)
        return plots.samples(program, classes**2, splits.shape, c=torch.eye(classes)[_rows(classes)])
    if command.model == "conditional":
        c = shown(of_part(command, splits, "test").rows(_spread(len(splits.test), n)))["c"]
        return plots.samples(program, len(c), None, c=c)
    return plots.samples(program, n, splits.shape)


def _rows(size: int) -> Any:
    """The numbers of the rows of a square."""
    import torch

    return torch.arange(size).repeat_interleave(size)


def _evaluate(command: Evaluate, program: LatentModel | None = None) -> None:
    """`pyrovae evaluate`."""
    program, stored, splits = _open(command.run, program)
    part: data_sets.Data = getattr(splits, command.part)
    clusters = stored.model in ("mixture", "mixture-vae")
    processes = Processes.start(device_of(program) or "cpu", command.devices)
    result = evaluate(
        program,
        of_part(stored, splits, command.part),
        command.num_particles,
        classes=part.tensors.get("y") if clusters else None,
        seed=command.seed,
        precision=command.precision,
        compile=command.compile,
    )
    with _first_alone_prints(processes):
        processes.first(lambda: _report(command, result, _test_error(program, part)))


def _report(command: Evaluate, result: Evaluation, error: dict[str, float]) -> None:
    """Write evaluation.json, and print what is in it."""
    per_datum = {name: getattr(result, name).tolist() for name in ("log_px", "elbo", "standard_error", "ess", "k_hat")}
    content = {"part": command.part, "seed": command.seed, **result.summary(), **error, "per_datum": per_datum}
    checkpoint.write_json(command.run / "evaluation.json", content)
    print(result)
    if error:
        print(
            f"misclassified {error['error']:10.2%} ± {error['error_error']:.2%} by the likeliest class under q(y | x)"
        )
    print(f"written to {command.run / 'evaluation.json'}\n")


def _test_error(program: LatentModel, data: data_sets.Data) -> dict[str, float]:
    """The share of data that a program with a label misclassifies, with its standard error."""
    if not isinstance(program, models.SemiSupervisedVAE):
        return {}
    share = (program.predict(data).argmax(1) != data["y"]).double().mean().item()
    return {"error": share, "error_error": (share * (1 - share) / len(data)) ** 0.5}


def _compare(command: Compare, program: LatentModel | None = None) -> None:
    """`pyrovae compare`."""
    program, stored, splits = _open(command.run, program)
    data = of_part(stored, splits, command.part)
    if command.num_data < 1:
        raise ValueError(f"Expected --num-data to be positive; got {command.num_data}")
    data = data.rows(_spread(len(data), command.num_data))
    comparison = compare(program, data, command.num_particles, seed=command.seed)
    print(comparison)
    _draw(plots.bounds(comparison), command.run / "bounds.png")


def _sample(command: Sample) -> None:
    """`pyrovae sample`."""
    import numpy as np
    import torch

    if command.npy is not None and command.npy.suffix != ".npy":
        raise ValueError(f"Expected --npy to name a .npy file; got {command.npy}")
    if command.n < 1:
        raise ValueError(f"Expected --n to be positive; got {command.n}")
    program, stored, splits = _open(command.run)
    torch.manual_seed(command.seed)
    _draw(_samples(stored, program, splits, command.n), command.run / "samples.png")
    if stored.data == "jsb-chorales":
        _write_midi(program, command)
    _animate(program, splits, command.run, command.n)
    if command.npy is not None:
        given: dict[str, Any] = {}
        if stored.model == "conditional":
            conditions = shown(of_part(stored, splits, "test"))["c"]
            given = {"c": conditions[torch.arange(command.n) % len(conditions)]}
        elif stored.model in SEQUENTIAL:
            given = {"lengths": splits.test["lengths"][torch.arange(command.n) % len(splits.test)]}
        values = program.sample(command.n, **given).numpy()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, values)

        checkpoint.write_whole(command.npy, write)
        print(f"written to {command.npy}")


def _write_midi(program: LatentModel, command: Sample) -> None:
    for i, roll in enumerate(program.sample(min(command.n, 4), lengths=64), 1):
        path = command.run / f"sample-{i}.mid"
        write_midi(roll, path)
        print(f"written to {path}")


def _record(command: Train, splits: data_sets.Splits, folder: Path) -> None:
    """Write the command, and what became of the data, into the run's configuration."""
    path = folder / checkpoint.CONFIG
    config = checkpoint.read_json(path) if path.exists() else {}
    sizes = {part: len(getattr(splits, part)) for part in ("train", "val", "test")}
    data = {"name": splits.name, "binarize": splits.binarize, "shape": splits.shape, **sizes}
    checkpoint.write_json(path, {**config, "command": asdict(command) | {"out": None, "resume": False}, "data": data})


def _open(run: Path, program: LatentModel | None = None) -> tuple[LatentModel, Train, data_sets.Splits]:
    stored = _stored(run)
    return program or checkpoint.load(run), stored, load_splits(stored)


def _spread(length: int, n: int) -> slice:
    """At most n indices, evenly spread: a set may be sorted by label."""
    return slice(0, length, max(1, -(-length // n)))


def _draw(figure: Figure, path: Path) -> None:
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png"))
    print(f"written to {path}")


def _animate(program: LatentModel, splits: data_sets.Splits, folder: Path, n: int = 64) -> None:
    """Write drawing.gif, of a model that draws its images in steps."""
    if not isinstance(program, models.DRAW):
        return
    path = folder / "drawing.gif"
    animation = plots.drawing(program.canvases(n), splits.shape)
    with TemporaryDirectory() as beside:  # the ending tells Pillow the format
        whole = Path(beside) / path.name
        animation.save(whole, writer="pillow")
        checkpoint.write_whole(path, lambda file: file.write_bytes(whole.read_bytes()))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
