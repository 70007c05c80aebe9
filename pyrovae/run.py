"""A training run: SVI of any program under any Pyro ELBO, on Lightning Fabric."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from pyrovae import checkpoint
from pyrovae.check import warn_of_findings
from pyrovae.conditionals.conditional import networks_in
from pyrovae.data import Batch, Data, num_rows, stream
from pyrovae.draws import Draws, evenly
from pyrovae.labels import without
from pyrovae.objectives import CompiledLoss, accumulate
from pyrovae.program import LatentModel, check_keys
from pyrovae.schedules import Schedule, WeightedELBO
from pyrovae.supervision import EnumeratedELBO, SemiSupervisedELBO, Supervision
from pyrovae.survey import Survey, draw

History = list[dict[str, float]]
SECONDS_BETWEEN_WRITES = 1.0  # so that writing costs short epochs no more than a few per cent
MEASURED = 10_000  # training data whose ELBO is measured after each epoch
MEASURING_SEED = 0  # the same noise each epoch, so that epochs differ by their weights alone


def score(row: dict[str, float]) -> tuple[float, float]:
    """What makes an epoch the best: fewest validation data misclassified, where they have labels, then their ELBO."""
    return -row.get("val_error", 0.0), row["val_elbo"]


class _Loss(nn.Module):
    """Pyro's ELBO in its module form, with the program's parameters for Fabric to see."""

    def __init__(self, program: LatentModel, elbo: ELBO):
        super().__init__()
        self.program = program
        model: Any = program.model  # Pyro's annotation asks for modules; functions serve as well
        guide: Any = program.guide
        self.elbo = elbo(model, guide)

    def forward(self, arguments: dict[str, Any]) -> Tensor:
        return self.elbo(**arguments)


def steps_in(data: Any, batch_size: int) -> int | None:
    """Steps of an epoch, where they are known."""
    if isinstance(data, Data):
        return math.ceil(len(data) / batch_size)
    return None if isinstance(data.dataset, IterableDataset) else len(data)


class Run:
    """What a checkpoint holds, and the steps that change it.

    Args:
        program: a `LatentModel`.
        train, val: `Data` or DataLoaders; `val` may be None.
        labeled: labelled `Data` beside them, or None; `train` may then be None.
        elbo, kl_weight, optimizer: as for `fit`.
        rate: learning rate of each epoch.
        settings: all that a run to be resumed must share.
        folder: of the run, or None.
        device: for Fabric.
    """

    def __init__(
        self,
        program: LatentModel,
        train: Any,
        val: Any,
        labeled: Data | None,
        elbo: ELBO,
        kl_weight: float | Schedule,
        optimizer: Callable[..., torch.optim.Optimizer],
        rate: Callable[[int], float],
        settings: dict[str, Any],
        folder: Path | None,
        device: str,
    ):
        from lightning_fabric import Fabric

        self.fabric = Fabric(accelerator=device, devices=1)
        self.program = program.to(self.fabric.device)
        self.settings, self.folder, self.rate = settings, folder, rate
        train, self.val, self.labeled = (
            data.to(self.fabric.device) if isinstance(data, Data) else data for data in (train, val, labeled)
        )
        self.train: Any = self.labeled if train is None else train
        self.steps = steps_in(self.train, settings["batch_size"]) or 0
        self.survey = self._first_look()
        self.supervision = None
        if self.labeled is not None:
            size, weight = settings["labeled_batch_size"], settings["supervised_weight"]
            self.supervision = Supervision(program, self.labeled, settings["num_train"] or 0, size, weight)
            elbo = SemiSupervisedELBO(elbo, self.supervision.label, self.survey.nesting, settings["labels"])
        elif self.survey.label is not None and settings["labels"] == "enumerate":
            elbo = EnumeratedELBO(elbo, self.survey.label, self.survey.nesting)
        self.kl_weight = None if kl_weight == 1 else kl_weight if callable(kl_weight) else lambda step: kl_weight
        if self.kl_weight is not None:
            elbo = WeightedELBO(elbo)
        parameters = [parameter for parameter in program.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"Expected a program with parameters to train; got none in {type(program).__name__}")
        self.loss, self.optimizer = self.fabric.setup(_Loss(program, elbo), optimizer(parameters, lr=rate(1)))
        with torch.random.fork_rng():  # the order of the data has a generator of its own
            self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        compile = settings["compile"]
        self.compiled = CompiledLoss(elbo, program.model, program.guide, compile) if compile is not False else None
        # what is measured after each epoch: validation labels are hidden from the ELBO
        hidden = Draws(program, self.survey if self.supervision is None else self.supervision.hidden, compile)
        self.parts: dict[str, tuple[Any, Draws]] = {"train": (self.train, hidden)}
        if self.supervision is not None:
            shown = Draws(program, self.supervision.survey, compile)
            self.parts["train" if train is None else "labeled"] = self.labeled, shown
        if self.val is not None:
            self.parts["val"] = self.val, hidden
        self.history: History = []
        self.best_epoch, self.best = 0, {}
        self.kept: dict[str, Any] | None = None
        self.written = 0.0

    def _first_look(self) -> Survey:
        """Run the program once, so that it makes all its parameters; look the data through that are in memory."""
        with torch.random.fork_rng():
            first = next(self._stream(self.train, "train"), None)
        if first is None:
            raise ValueError("Expected train to hold at least one datum; got an empty DataLoader")
        survey = Survey.of(self.program, first, "train")
        for name, data in (("train", self.train), ("val", self.val)):
            if isinstance(data, Data) and data.fixed:
                check_keys(data.tensors, self.program.model, self.program.guide)
                survey.check_support(data.tensors, name)
        warn_of_findings(self.program, first, survey)
        return survey

    def _stream(
        self, data: Any, name: str, batch_size: int | None = None, shuffle: torch.Generator | None = None
    ) -> Iterator[Batch]:
        size = batch_size or self.settings["batch_size"]
        return stream(data, size, shuffle=shuffle, device=self.fabric.device, name=name)

    def to_the_end(self, epochs: int, patience: int | None, progress: bool) -> None:
        """Train up to the last epoch, or until validation has not improved for `patience` epochs."""
        if not self.history:  # one draw for each datum: what is wrong with them shows before hours of training
            for name in self.parts:
                self._measure(name, limit=None)
        if self.folder is not None and not self.history:
            self._write_config()
            self._keep()
            self._write()
        bar = tqdm(total=epochs * self.steps or None, unit=" steps", mininterval=0.5, disable=not progress)
        bar.update(len(self.history) * self.steps)
        try:
            with bar, self.program.modes_kept(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Encountered (NaN|inf)")  # reported below, with the site
                while len(self.history) < epochs and not self._stale(patience):
                    bar.set_description(f"epoch {len(self.history) + 1}/{epochs}")
                    self._epoch(bar)
                    if self.folder is not None:
                        self._keep()
                    if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
                        self._write()
        finally:
            if self.best:
                self.program.load_state_dict(self.best)
            self._write()

    def _stale(self, patience: int | None) -> bool:
        return patience is not None and len(self.history) - self.best_epoch >= patience

    def _epoch(self, bar: tqdm) -> None:
        self.program.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(len(self.history) + 1)
        start, total, seen = time.perf_counter(), 0.0, 0
        batches = self._stream(self.train, "train", shuffle=self.generator)
        weight = None
        for step, (batch, arguments, num_data) in enumerate(self._steps_of(batches), len(self.history) * self.steps):
            if self.kl_weight is not None:
                weight = float(self.kl_weight(step))
                arguments = {"arguments": arguments, "kl_weight": weight}
            total += self._step(batch, arguments)
            seen += num_data
            bar.update()
        row = {"epoch": len(self.history) + 1, "seconds": time.perf_counter() - start, "loss": total / seen}
        row |= {} if weight is None else {"kl_weight": weight}
        self._check_parameters()
        for part in self.parts:
            prefix = "" if part == "train" else f"{part}_"
            row |= {f"{prefix}{name}": value for name, value in self._measure(part).items()}
        if self.supervision is not None:
            row["cross_entropy"] = self.supervision.cross_entropy(MEASURING_SEED)
        self.history.append(row)
        if self.val is not None and not (self.best and score(self.history[self.best_epoch - 1]) >= score(row)):
            self.best_epoch = len(self.history)
            self.best = {name: value.clone() for name, value in self.program.state_dict().items()}
        best = self.history[self.best_epoch - 1]
        shown = [f"ELBO {row['elbo']:.2f}"]
        if self.val is not None:
            shown += [f"val {row['val_elbo']:.2f}"]
            shown += [f"error {row['val_error']:.2%}"] if "val_error" in row else []
            shown += [f"best {best['val_error']:.2%}" if "val_error" in best else f"best {best['val_elbo']:.2f}"]
        bar.set_postfix_str(", ".join(shown))

    def _steps_of(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Any], float]]:
        """Each minibatch with the arguments of the loss, and how many data the step stands for."""
        if self.supervision is None:
            yield from ((batch, batch, num_rows(batch)) for batch in batches)
            return
        for arguments, num_data in self.supervision.joined(batches, self.generator):
            yield arguments["unlabeled"] or arguments["labeled"], arguments, num_data

    def _step(self, batch: Batch, arguments: dict[str, Any]) -> float:
        if not isinstance(self.train, Data) or not self.train.fixed:
            self.survey.check_support(batch, "train")
        noise = torch.get_rng_state()
        self.optimizer.zero_grad()
        try:
            with networks_in(self.settings["precision"]):
                loss, backward = self._loss(arguments)
        except (RuntimeError, ValueError) as error:
            self._check_parameters(error)
            raise
        value = loss.item()
        if not math.isfinite(value):
            torch.set_rng_state(noise)
            with torch.no_grad():
                bad = draw(self.program, batch, 1, self.survey).first_bad() or "no site, when run again"
            raise FloatingPointError(self._complaint(f"a loss of {value}", bad))
        backward()
        if (clip := self.settings["grad_clip"]) is not None:
            self.fabric.clip_gradients(self.loss, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        self.optimizer.step()
        return value

    def _loss(self, arguments: dict[str, Any]) -> tuple[Tensor, Callable[[], None]]:
        """The loss, and what gives the parameters their gradients."""
        if self.compiled is not None:
            loss, variables, grads = self.compiled(**arguments)
            return loss, lambda: accumulate(variables, grads)
        loss = self.loss(arguments)
        return loss, lambda: self.fabric.backward(loss)

    def _check_parameters(self, cause: Exception | None = None) -> None:
        bad = [name for name, p in self.program.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise FloatingPointError(self._complaint("parameters that are not", ", ".join(bad[:5]))) from cause

    def _complaint(self, got: str, where: str) -> str:
        kept = "" if self.folder is None else f". The last good checkpoint is in {self.folder}"
        return f"Expected a finite loss; got {got} in epoch {len(self.history) + 1}: {where}{kept}"

    def _measure(self, part: str, limit: int | None = MEASURED) -> dict[str, float]:
        """ELBO, log p(x | z) and KL with one draw for each datum; of labelled validation data the error, too."""
        data, draws = self.parts[part]
        classes = 1 if draws.survey.label is None else len(draws.survey.label.values)
        limit = None if limit is None else max(1, limit // classes)
        sums, seen, wrong = torch.zeros(3, dtype=torch.float64), 0, None
        with self.program.inference(MEASURING_SEED):
            if part == "train" and isinstance(data, Data) and limit is not None and len(data) > limit:
                data = data.rows(torch.randperm(len(data))[:limit].to(self.fabric.device))
            for batch in self._stream(data, part, evenly(len(data), draws.rows) if isinstance(data, Data) else None):
                if part == "val" and draws.survey.label is not None and self.program.label in batch:
                    if self.supervision is not None:
                        wrong = (wrong or 0) + self.supervision.mistakes(batch, part)
                    batch = without(self.program.label, batch)
                check_keys(batch, self.program.model, self.program.guide)
                draws.survey.check_support(batch, part)
                weights = draws(batch, 1, seen)
                terms = weights.elbo, weights.log_px_z, weights.kl
                sums += torch.stack([term.double().sum().cpu() for term in terms])
                seen += num_rows(batch)
                if part == "train" and seen >= (limit or MEASURED) and not (limit is None and isinstance(data, Data)):
                    break
        if seen == 0:
            raise ValueError(f"Expected {part} to hold at least one datum; got an empty DataLoader")
        names = "elbo", "log_px_z", "kl"
        measured: dict[str, float] = dict(zip(names, (sums / seen).tolist(), strict=True))
        return measured if wrong is None else {**measured, "error": wrong / seen}

    def _write_config(self) -> None:
        assert self.folder is not None
        path = self.folder / checkpoint.CONFIG
        config = checkpoint.read_json(path) if path.exists() else {}
        program = checkpoint.describe(self.program) or type(self.program).__name__
        versions = {"pyrovae": checkpoint.version("pyrovae"), "torch": torch.__version__, "pyro-ppl": pyro.__version__}
        checkpoint.write_json(path, {**config, "program": program, "fit": self.settings, "versions": versions})

    def _keep(self) -> None:
        """Hold the state at the end of an epoch, to be written soon, or when training stops."""
        self.kept = deepcopy(
            {
                "settings": self.settings,
                "history": self.history,
                "program": self.program.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_epoch": self.best_epoch,
                "generator": self.generator.get_state(),
                "random": checkpoint.random_state(),
            }
        )

    def _write(self) -> None:
        """Write best weights, metrics and checkpoint, as of the end of the last epoch, unless that was done."""
        if self.folder is None or self.kept is None:
            return
        if self.kept["history"]:
            weights = self.kept["best"] or self.kept["program"]
            checkpoint.save_weights(self.program, weights, self.folder / checkpoint.WEIGHTS)
            checkpoint.write_metrics(self.folder, self.kept["history"])
        checkpoint.write_checkpoint(self.folder, self.kept)
        self.kept, self.written = None, time.monotonic()

    def resume(self, saved: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            ValueError: where the checkpoint is that of a run with other settings or of another program.
        """
        for name, value in self.settings.items():
            before = saved["settings"].get(name, value)
            if before != value:
                raise ValueError(f"Expected {name}={before}, as the run to resume has; got {value}")
        path = f"{self.folder}/{checkpoint.CHECKPOINT}"
        if saved["best"]:
            checkpoint.check_weights(self.program, saved["best"], path)
        checkpoint.fill(self.program, saved["program"], path)
        with checkpoint.parsing(path, "a checkpoint of this run"):
            checkpoint.restore_optimizer(self.optimizer, saved["optimizer"])
            self.history, self.best_epoch = saved["history"], saved["best_epoch"]
            self.best = {name: value.to(self.fabric.device) for name, value in saved["best"].items()}
            self.generator.set_state(saved["generator"])
            checkpoint.restore_random_state(saved["random"])
