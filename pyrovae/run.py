"""A training run: SVI of any program under any Pyro ELBO, in one process or several."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sized
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
from pyrovae.batches import Batch, Data, stream
from pyrovae.check import warn_of_findings
from pyrovae.conditionals.conditional import networks_in
from pyrovae.draws import Draws
from pyrovae.measure import SEED, Part, check_any
from pyrovae.noise import draw_seed, forked
from pyrovae.objectives import CompiledLoss, accumulate
from pyrovae.processes import Processes, in_step, shares
from pyrovae.program import LatentModel, check_keys
from pyrovae.schedules import Schedule, WeightedELBO
from pyrovae.supervision import EnumeratedELBO, SemiSupervisedELBO, Supervision
from pyrovae.survey import Survey, draw

History = list[dict[str, float]]
SECONDS_BETWEEN_WRITES = 1.0  # so that writing costs short epochs no more than a few per cent


def score(row: dict[str, float]) -> tuple[float, float]:
    """What makes an epoch the best: fewest validation data misclassified, where they have labels, then their ELBO."""
    return -row.get("val_error", 0.0), row["val_elbo"]


def steps_in(data: Any, batch_size: int) -> int | None:
    """Steps of an epoch, where they are known."""
    if isinstance(data, Data):
        return math.ceil(len(data) / batch_size)
    return None if isinstance(data.dataset, IterableDataset) and not isinstance(data.dataset, Sized) else len(data)


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
        processes: that share the work.
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
        processes: Processes,
    ):
        self.processes = processes
        self.program = program.to(processes.device)
        self.settings, self.folder, self.rate = settings, folder, rate
        train, self.val, self.labeled = (
            data.to(processes.device) if isinstance(data, Data) else data for data in (train, val, labeled)
        )
        self.train: Any = self.labeled if train is None else train
        held = {"train": train, "val": self.val, "labeled": self.labeled}
        processes.check_same(
            settings=settings, **{name: data.tensors for name, data in held.items() if isinstance(data, Data)}
        )
        self.steps = steps_in(self.train, settings["batch_size"]) or 0
        self.survey = processes.together(self._first_look)
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
        self.parameters = [parameter for parameter in program.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError(f"Expected a program with parameters to train; got none in {type(program).__name__}")
        model: Any = program.model  # Pyro's annotation asks for modules; functions serve as well
        guide: Any = program.guide
        self.loss, self.optimizer = elbo(model, guide), optimizer(self.parameters, lr=rate(1))
        with forked():  # the order of the data has a generator of its own
            seed = processes.seed()
        self.generator = torch.Generator().manual_seed(seed)
        processes.agree(program)
        if processes.rank > 0:
            torch.manual_seed(seed + processes.rank)  # noise of its own
        compile = settings["compile"]
        self.compiled = CompiledLoss(elbo, program.model, program.guide, compile) if compile is not False else None
        # what is measured after each epoch: validation labels are hidden from the ELBO
        hidden = Draws(program, self.survey if self.supervision is None else self.supervision.hidden, compile)
        parts: dict[str, tuple[Any, Draws]] = {"train": (self.train, hidden)}
        if self.supervision is not None:
            shown = Draws(program, self.supervision.survey, compile)
            parts["train" if train is None else "labeled"] = self.labeled, shown
        if self.val is not None:
            parts["val"] = self.val, hidden
        self.parts = [Part(name, program, *found, self.supervision, processes) for name, found in parts.items()]
        self.history: History = []
        self.best_epoch, self.best = 0, {}
        self.kept: dict[str, Any] | None = None
        self.written = 0.0

    def _first_look(self) -> Survey:
        """Run the program once, so that it makes all its parameters; look the data through that are in memory."""
        with forked():
            first = next(self._stream(self.train, "train"), None)
        if first is None:
            raise ValueError("Expected train to hold at least one datum; got an empty DataLoader")
        survey = Survey.of(self.program, first, "train")
        for name, data in (("train", self.train), ("val", self.val)):
            if isinstance(data, Data) and data.fixed:
                check_keys(data.tensors, self.program.model, self.program.guide)
                survey.check_support(data.tensors, name)
        if self.processes.rank == 0:
            warn_of_findings(self.program, first, survey)
        return survey

    def _stream(
        self, data: Any, name: str, batch_size: int | None = None, shuffle: torch.Generator | None = None
    ) -> Iterator[Batch]:
        size = batch_size or self.settings["batch_size"]
        return stream(data, size, shuffle=shuffle, device=self.processes.device, name=name)

    def to_the_end(self, epochs: int, patience: int | None, progress: bool) -> None:
        """Train up to the last epoch, or until validation has not improved for `patience` epochs."""
        if not self.history:  # one draw for each datum: what is wrong with them shows before hours of training
            for part in self.parts:
                part.figures(limit=None)
        if self.folder is not None and not self.history:
            if self.processes.rank == 0:
                self._write_config()
            self._keep()
            self._write()
        shown = progress and self.processes.rank == 0
        bar = tqdm(total=epochs * self.steps or None, unit=" steps", mininterval=0.5, disable=not shown)
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
        weight = None
        for step, (batch, arguments, num_data) in enumerate(self._steps_of(), len(self.history) * self.steps):
            if self.kl_weight is not None:
                weight = float(self.kl_weight(step))
            total += self._step(batch, arguments, weight)
            seen += num_data
            bar.update()
        self.processes.agree(self.program)  # what the optimizer does not move, as running means of a batch norm
        check_any("train", seen)
        row = {"epoch": len(self.history) + 1, "seconds": time.perf_counter() - start, "loss": total / seen}
        row |= {} if weight is None else {"kl_weight": weight}
        self._check_parameters()
        for part in self.parts:
            prefix = "" if part.name == "train" else f"{part.name}_"
            row |= {f"{prefix}{name}": value for name, value in part.figures().items()}
        if self.supervision is not None:
            row["cross_entropy"] = self.supervision.cross_entropy(SEED)
        row = self.processes.first(lambda: row)
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

    def _steps_of(self) -> Iterator[tuple[Batch | None, Any, float]]:
        """For each step of an epoch the minibatch and the arguments of the loss that this process has of it.

        Both are None where it has nothing of the step. Beside them: how many data the step of all processes stands for.
        """
        batches: Any = self._stream(self.train, "train", shuffle=self.generator)
        batches = in_step(batches, self.train, self.processes)
        if self.supervision is None:
            yield from ((batch, batch, rows) for batch, rows in shares(batches, self.train, self.processes))
            return
        for arguments, num_data in self.supervision.joined((batch for batch, _ in batches), self.generator):
            parts = {name: self.processes.share(arguments[name]) for name in ("unlabeled", "labeled")}
            batch = parts["unlabeled"] or parts["labeled"]
            yield batch, batch and {**arguments, **parts}, num_data

    def _step(self, batch: Batch | None, arguments: Any, kl_weight: float | None) -> float:
        """One step of the optimizer; its loss, a sum over the data of all processes."""
        noise = torch.get_rng_state()
        self.optimizer.zero_grad()
        own = 0.0
        if batch is not None:
            if not isinstance(self.train, Data) or not self.train.fixed:
                self.survey.check_support(batch, "train")
            own = self._add_gradients(
                arguments if kl_weight is None else {"arguments": arguments, "kl_weight": kl_weight}
            )
        value = self.processes.sum_gradients(self.parameters, own)
        if not math.isfinite(value):
            sites = self.processes.gather(lambda: None if math.isfinite(own) else self._bad_site(batch, noise))
            where = next(filter(None, sites), "no site, when run again")
            raise FloatingPointError(self._complaint(f"a loss of {value}", where))
        if (clip := self.settings["grad_clip"]) is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        return value

    def _add_gradients(self, arguments: dict[str, Any]) -> float:
        """The loss; where it is finite, the parameters have its gradients."""
        try:
            with networks_in(self.settings["precision"]):
                loss, backward = self._loss(arguments)
        except (RuntimeError, ValueError) as error:
            self._check_parameters(error)
            raise
        value = loss.item()
        if math.isfinite(value):
            backward()
        return value

    def _loss(self, arguments: dict[str, Any]) -> tuple[Tensor, Callable[[], None]]:
        """The loss, and what gives the parameters their gradients."""
        if self.compiled is not None:
            loss, variables, grads = self.compiled(**arguments)
            return loss, lambda: accumulate(variables, grads)
        loss = self.loss(**arguments)
        return loss, loss.backward

    def _bad_site(self, batch: Any, noise: Tensor) -> str | None:
        """The site whose log-probability is not finite, when the last minibatch is drawn again."""
        torch.set_rng_state(noise)
        with torch.no_grad():
            return draw(self.program, batch, 1, self.survey).first_bad()

    def _check_parameters(self, cause: Exception | None = None) -> None:
        bad = [name for name, p in self.program.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise FloatingPointError(self._complaint("parameters that are not", ", ".join(bad[:5]))) from cause

    def _complaint(self, got: str, where: str) -> str:
        kept = "" if self.folder is None else f". The last good checkpoint is in {self.folder}"
        return f"Expected a finite loss; got {got} in epoch {len(self.history) + 1}: {where}{kept}"

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
                "random": self.processes.gather(checkpoint.random_state),
            }
        )

    def _write(self) -> None:
        """Write best weights, metrics and checkpoint, as of the end of the last epoch, unless that was done."""
        if self.folder is None or self.kept is None or self.processes.rank > 0:
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
            self.best = {name: value.to(self.processes.device) for name, value in saved["best"].items()}
            self.generator.set_state(saved["generator"])
            if self.processes.rank < len(saved["random"]):
                checkpoint.restore_random_state(saved["random"][self.processes.rank])
                return
        # more processes than before
        torch.manual_seed(draw_seed(self.generator.clone_state()) + self.processes.rank)
