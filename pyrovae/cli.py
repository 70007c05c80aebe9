"""The command line: pyrovae train | evaluate | compare | sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pyrovae import checkpoint, conditionals, models, plots, sources
from pyrovae import data as data_sets
from pyrovae.bounds import IWAE_ELBO, STL_ELBO
from pyrovae.compare import compare
from pyrovae.compiled import CompileError
from pyrovae.evaluate import evaluate
from pyrovae.fit import fit
from pyrovae.options import Compare, Evaluate, Sample, Train
from pyrovae.program import LatentModel
from pyrovae.run import score
from pyrovae.schedules import Linear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIKELIHOODS = {
    "bernoulli": conditionals.Bernoulli,
    "unit-normal": conditionals.UnitNormal,
    "normal": conditionals.DiagonalNormal,
    "floor-normal": conditionals.FloorNormal,
    "continuous": conditionals.ContinuousBernoulli,
    "logistics": conditionals.DiscretizedLogisticMixture,
}
POSTERIORS = {
    "diagonal": conditionals.DiagonalNormal,
    "full": conditionals.FullNormal,
    "iaf": conditionals.InverseAutoregressiveFlow,
    "planar": conditionals.PlanarFlow,
    "householder": conditionals.HouseholderFlow,
    "spline": conditionals.NeuralSplineFlow,
}
PRIORS: dict[str, Callable[[int], conditionals.Conditional]] = {
    "standard": conditionals.StandardNormal,
    "mixture": conditionals.MixtureOfNormals,
    "real-nvp": conditionals.RealNVP.root,
    "maf": conditionals.MaskedAutoregressiveFlow.root,
    "autoregressive": conditionals.AutoregressivePrior,
}
MAY_CHANGE = ("epochs", "patience", "device", "num_particles", "resume", "out")  # of a run that is resumed


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
        stored = config["command"]
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return Train(**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected a run made by `pyrovae train`; got {run}, without its command ({error})") from error


def _train(command: Train) -> None:
    """`pyrovae train`."""
    splits = _splits(command)
    _check_sizes(command)
    program, data = _program(command, splits)
    folder = command.out or Path("runs") / f"{Path(command.data).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    checkpoint.open_run(folder, command.resume)
    if not command.resume:
        _record(command, splits, folder)
    print(
        f"{command.data}: {len(splits.train)} training, {len(splits.val)} validation, {len(splits.test)} test data of "
        f"{splits.train['x'].shape[1]} values, binarization {splits.binarize}\n"
        f"{type(program).__name__} with {sum(p.numel() for p in program.parameters()):,} parameters, "
        f"{command.prior} prior, {command.posterior} posterior, {command.likelihood} likelihood; writing to {folder}"
    )
    history = fit(
        program,
        **data,
        **_bound(command, len(data["train"])),
        epochs=command.epochs,
        batch_size=command.batch_size,
        lr=_rate(command),
        patience=command.patience,
        grad_clip=command.grad_clip,
        seed=command.seed,
        run_dir=folder,
        resume=command.resume,
        device=command.device,
        precision=command.precision,
        compile=command.compile,
    )
    _record(command, splits, folder)
    best = max(history, key=score)
    seconds = sum(row["seconds"] for row in history)
    error = f", error {best['val_error']:.2%}" if "val_error" in best else ""
    found = f"validation ELBO {best['val_elbo']:.3f}{error}"
    print(f"best epoch {best['epoch']} of {len(history)}, {found}, {seconds:.0f} s\n")
    for name, figure in _pictures(program, splits, history).items():
        _draw(figure, folder / f"{name}.png")
    _evaluate(Evaluate(folder, command.num_particles, compile=command.compile), program)
    ladder = tuple(k for k in Compare.num_particles if k < command.num_particles)
    _compare(Compare(folder, (*ladder, command.num_particles)), program)


def _program(command: Train, splits: data_sets.Splits) -> tuple[LatentModel, dict[str, Any]]:
    """The program at its first weights, and the data that `fit` takes for it."""
    import torch

    torch.manual_seed(command.seed)
    x_dim = splits.train["x"].shape[1]
    families = {"likelihood": LIKELIHOODS[command.likelihood], "posterior": POSTERIORS[command.posterior]}
    if command.model == "m2":
        classes = int(splits.train["y"].max()) + 1
        labeled, train = data_sets.split_labels(splits.train, command.labels // classes, command.seed)
        data = {"train": train, "val": splits.val, "labeled": labeled, "supervised_weight": command.supervised_weight}
        program = models.SemiSupervisedVAE.mlp(x_dim, classes, command.z_dim, command.hidden, **families)
    else:
        data = {"train": splits.train.select("x"), "val": splits.val.select("x")}
        program = models.VAE.mlp(x_dim, command.z_dim, command.hidden, **families)
    program.likelihood.start_at(splits.train["x"].mean(0))
    program.prior = _prior(command, program.posterior, splits.train)
    return program, data


def _prior(command: Train, posterior: conditionals.Conditional, train: data_sets.Data) -> conditionals.Conditional:
    if command.prior != "vamp":
        return PRIORS[command.prior](command.z_dim)
    if command.model == "m2":
        raise ValueError("Expected another --prior with --model m2, whose q(z | x, y) takes a label; got vamp")
    import torch

    x = train["x"][torch.randperm(len(train))[:500]]
    unit_interval = bool(((x >= 0) & (x <= 1)).all())
    return conditionals.VampPrior(posterior, x.shape[1], len(x), unit_interval).start_from(x)


def _bound(command: Train, num_train: int) -> dict[str, Any]:
    """The bound, as arguments of `fit`."""
    if command.draws < 1 or command.kl_warmup < 0:
        raise ValueError(
            f"Expected --draws of at least 1 and --kl-warmup of at least 0; got {command.draws}, {command.kl_warmup}"
        )
    bounds = {
        "elbo": lambda: None,
        "iwae": lambda: IWAE_ELBO(command.draws),
        "dreg": lambda: IWAE_ELBO(command.draws, "dreg"),
        "stl": lambda: STL_ELBO(command.draws),
    }
    steps = command.kl_warmup * -(-num_train // command.batch_size)
    return {
        "elbo": bounds[command.bound](),
        "kl_weight": Linear(steps) if steps else 1.0,
        "free_bits": command.free_bits,
    }


def _pictures(program: LatentModel, splits: data_sets.Splits, history: list[dict[str, float]]) -> dict[str, Figure]:
    test, shape = splits.test, splits.shape
    few = test.rows(_spread(len(test), 10))
    pictures = {
        "learning_curves": plots.learning_curves(history),
        "samples": plots.samples(program, 64, shape),
        "reconstructions": plots.reconstructions(program, few["x"], shape),
        "latent_space": plots.latent_space(program, test["x"], test.tensors.get("y"), site="z"),
    }
    if isinstance(program, models.SemiSupervisedVAE):
        pictures["analogies"] = plots.analogies(program, few, shape)
    return pictures


def _evaluate(command: Evaluate, program: LatentModel | None = None) -> None:
    """`pyrovae evaluate`."""
    program, splits = _open(command.run, program)
    data = getattr(splits, command.part).select("x")
    result = evaluate(
        program,
        data,
        command.num_particles,
        seed=command.seed,
        precision=command.precision,
        compile=command.compile,
    )
    error = _test_error(program, getattr(splits, command.part))
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
    program, splits = _open(command.run, program)
    data = getattr(splits, command.part).select("x")
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
    program, splits = _open(command.run)
    torch.manual_seed(command.seed)
    _draw(plots.samples(program, command.n, splits.shape), command.run / "samples.png")
    if command.npy is not None:
        values = program.sample(command.n).numpy()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, values)

        checkpoint.write_whole(command.npy, write)
        print(f"written to {command.npy}")


def _record(command: Train, splits: data_sets.Splits, folder: Path) -> None:
    """Write the command, and what became of the data, into the run's configuration."""
    path = folder / checkpoint.CONFIG
    config = checkpoint.read_json(path) if path.exists() else {}
    sizes = {part: len(getattr(splits, part)) for part in ("train", "val", "test")}
    data = {"name": splits.name, "binarize": splits.binarize, "shape": splits.shape, **sizes}
    checkpoint.write_json(path, {**config, "command": asdict(command) | {"out": None, "resume": False}, "data": data})


def _rate(command: Train) -> float | Callable[[int], float]:
    first, last = command.lr, command.lr_final
    if last is None:
        return first
    if min(first, last) <= 0:
        raise ValueError(f"Expected --lr and --lr-final to be positive; got {first} and {last}")

    def geometric(epoch: int) -> float:
        return first * (last / first) ** ((epoch - 1) / max(1, command.epochs - 1))

    return geometric


def _splits(command: Train) -> data_sets.Splits:
    binarize = command.binarize
    if binarize == "auto":
        grey = command.likelihood == "bernoulli" and command.data != "binarized-mnist"
        binarize = "dynamic" if grey else "none"
    return data_sets.load(
        command.data, binarize, labels=command.model == "m2" or command.data in sources.LABELLED, seed=command.seed
    )


def _check_sizes(command: Train) -> None:
    for name in ("z_dim", "hidden", "num_particles", "labels"):
        value = getattr(command, name)
        smallest = min(value, default=1) if isinstance(value, tuple) else value
        if smallest < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be positive; got {smallest}")


def _open(run: Path, program: LatentModel | None = None) -> tuple[LatentModel, data_sets.Splits]:
    splits = _splits(_stored(run))
    return program or checkpoint.load(run), splits


def _spread(length: int, n: int) -> slice:
    """At most n indices, evenly spread: a set may be sorted by label."""
    return slice(0, length, max(1, -(-length // n)))


def _draw(figure: Figure, path: Path) -> None:
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
