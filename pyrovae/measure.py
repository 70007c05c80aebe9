"""What is measured of a program after each epoch of its training."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from pyrovae.batches import Batch, Data, num_rows, stream
from pyrovae.draws import Draws, evenly
from pyrovae.labels import without
from pyrovae.noise import numbered
from pyrovae.processes import Processes, is_sharded
from pyrovae.program import LatentModel, check_keys
from pyrovae.supervision import Supervision

MEASURED = 10_000  # training data whose ELBO is measured after each epoch
SEED = 0  # the same noise each epoch, so that epochs differ by their weights alone


def check_any(part: str, seen: float) -> None:
    """Raises ValueError where a part of the data gave none."""
    if seen == 0:
        raise ValueError(
            f"Expected {part} to hold at least one datum each time that it is read; got an empty DataLoader. "
            "A stream that can be read but once is cut into epochs by data.in_epochs"
        )


@dataclass(frozen=True)
class Part:
    """Data of a training run, on which the program is measured.

    Attributes:
        name: train, val or labeled.
        program: a `LatentModel`.
        data: a `Data` or a DataLoader.
        draws: of the program, for these data.
        supervision: of the run, or None.
        processes: that share the work. Noise belongs to each part of the data, so that the figures are the same in any
            number of processes.
    """

    name: str
    program: LatentModel
    data: "Data | DataLoader"
    draws: Draws
    supervision: Supervision | None
    processes: Processes

    def figures(self, limit: int | None = MEASURED) -> dict[str, float]:
        """ELBO, log p(x | z) and KL with one draw for each datum; of labelled validation data the error, too.

        Args:
            limit: training data, at most; None for all of those in memory.

        Raises:
            ValueError: for an empty DataLoader, data outside the support of the likelihood.
            FloatingPointError: where a weight is not finite, naming the site.
        """
        found = self.processes.gather(lambda: self._sums(limit))
        *sums, num_data, mistakes, has_classes = torch.tensor(found, dtype=torch.float64).sum(0).tolist()
        check_any(self.name, num_data)
        figures = {name: total / num_data for name, total in zip(("elbo", "log_px_z", "kl"), sums, strict=True)}
        return {**figures, "error": mistakes / num_data} if has_classes else figures

    def _sums(self, limit: int | None) -> list[float]:
        """Over this process's data: sums of ELBO, log p(x | z) and KL; data; mistakes; minibatches with classes."""
        sums, num_data, mistakes = torch.zeros(3, dtype=torch.float64), 0, []
        with self.program.inference(SEED):
            for first, batch in self._own_batches(limit):
                label = self.draws.survey.label
                if self.name == "val" and label is not None and label.name in batch:
                    if self.supervision is not None:
                        mistakes.append(self.supervision.mistakes(batch, self.name))
                    batch = without(label.name, batch)
                check_keys(batch, self.program.model, self.program.guide)
                self.draws.survey.check_support(batch, self.name)
                weights = self.draws(batch, 1, first)
                terms = weights.elbo, weights.log_px_z, weights.kl
                sums += torch.stack([term.double().sum().cpu() for term in terms])
                num_data += num_rows(batch)
        return [*sums.tolist(), num_data, sum(mistakes), len(mistakes)]

    def _own_batches(self, limit: int | None) -> Iterator[tuple[int, Batch]]:
        """Minibatches that this process measures, each with the number of its first datum."""
        data, size = self.data, None
        classes = 1 if self.draws.survey.label is None else len(self.draws.survey.label.values)
        most = None if self.name != "train" or limit is None else max(1, limit // classes)
        if isinstance(data, Data):
            if most is not None and len(data) > most:
                data = data.rows(torch.randperm(len(data))[:most].to(self.processes.device))
            size, most = evenly(len(data), self.draws.rows), None
        elif self.name == "train":
            most = most or MEASURED
        passed = 0
        for i, batch in numbered(stream(data, size, device=self.processes.device, name=self.name), SEED):
            if is_sharded(data) or i % self.processes.size == self.processes.rank:
                yield passed, batch
            passed += num_rows(batch)
            if most is not None and passed >= most:
                break
