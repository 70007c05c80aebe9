"""Draws of K particles for each of N data, in chunks that fit into memory; compiled, where that is asked for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch, as_data, count, num_rows, stream
from pyrovae.compiled import Compile, Compiled
from pyrovae.noise import draw_seed, numbered
from pyrovae.processes import Processes, is_sharded
from pyrovae.program import LatentModel, device_of
from pyrovae.sequences import trim
from pyrovae.survey import Enumerated, Survey, draw

NUMBERS_AT_ONCE = 2**21  # in the widest tensor that a chunk makes; 8 MiB, which a cache holds
WORTH_COMPILING = NUMBERS_AT_ONCE // 2


def evenly(total: int, most: int) -> int:
    """The size of parts, `most` at most, that cut `total` into as few as possible, as equal as possible."""
    return math.ceil(total / math.ceil(total / most))


@dataclass(frozen=True)
class Weights:
    """What is measured of K draws for each of N data; nats.

    Attributes:
        log_weights: log p(x, z_k) - log q(z_k | x), `(K, N)`; a label is summed over.
        log_px_z: log p(x | z_k), `(K, N)`; of a label the expectation under the guide.
        kl: log q(z_k | x) - log p(z_k), `(K, N)`; likewise.
        means: E_q[z | x] of each latent site, `(N, D)`.
        log_joint: log sum_k p(x, y, z_k) / q(z_k | x, y) for each class of a label, `(C, N)`; None without a label.
    """

    log_weights: Tensor
    log_px_z: Tensor
    kl: Tensor
    means: dict[str, Tensor]
    log_joint: Tensor | None

    @property
    def elbo(self) -> Tensor:
        """log p(x | z_k) - KL, one-draw estimates of the ELBO, `(K, N)`."""
        return self.log_px_z - self.kl


class Draws:
    """Draws latents of a program and weighs them; the caller has entered the program's scope.

    Args:
        program: a `LatentModel`.
        survey: what is known of it.
        compile: run large draws as a compiled graph, one for each shape; "auto": where that is possible.

    Attributes:
        rows: how many draws, of all data together, fit into memory at once.
    """

    def __init__(self, program: LatentModel, survey: Survey, compile: Compile = False):
        self.program, self.survey = program, survey
        self.rows = max(1, NUMBERS_AT_ONCE // survey.numbers)
        watch = program.model, program.guide
        self.is_compiled = compile is not False
        self.compiled = Compiled(self._weigh, watch, compile) if self.is_compiled else self._weigh

    def __call__(self, batch: Batch, num_particles: int, first: int = 0) -> Weights:
        """Weigh K draws for each datum.

        Args:
            batch: data, `(N, ...)` each.
            num_particles: K.
            first: number of the first datum, for errors.

        Raises:
            ValueError: where observed values lie outside the support of their site.
            FloatingPointError: where a weight is NaN or infinite, naming the datum and the site.
        """
        large = num_particles * num_rows(batch) * self.survey.numbers >= WORTH_COMPILING
        noise = torch.get_rng_state()
        sound, *found = (self.compiled if large else self._weigh)(batch, num_particles)
        if not bool(sound):
            torch.set_rng_state(noise)
            self._complain(batch, num_particles, first)
        return Weights(*found)

    def _weigh(self, batch: Batch, num_particles: int) -> tuple[Any, ...]:
        drawn = draw(self.program, batch, num_particles, self.survey)
        log_w = drawn.log_weights
        sound = drawn.supported() & (log_w < torch.inf).all()  # false for NaN, too
        log_joint = drawn.log_joint.logsumexp(0) if isinstance(drawn, Enumerated) else None
        return sound, log_w, drawn.log_px_z, drawn.kl, drawn.posterior_means(), log_joint

    def _complain(self, batch: Batch, num_particles: int, first: int) -> None:
        drawn = draw(self.program, batch, num_particles, self.survey)
        drawn.check_support()
        bad = ~(drawn.log_weights < torch.inf)
        where = bad.any(0).nonzero()
        datum, found = (
            ("", "none, when drawn again")
            if len(where) == 0
            else (f" at datum {first + int(where[0])}", f"{drawn.log_weights[bad][0].item()}")
        )
        raise FloatingPointError(f"Expected finite log-weights; got {found}{datum}: {drawn.first_bad()}")


@dataclass(frozen=True)
class Plan:
    """How N data and K particles are cut into chunks that fit into memory."""

    draws: Draws
    num_particles: int
    batches: Iterator[Batch]
    num_data: int | None
    batch_size: int
    chunk_size: int
    seed: int
    processes: Processes
    sharded: bool

    @staticmethod
    def of(
        program: LatentModel,
        data: Any,
        num_particles: int,
        batch_size: int | None = None,
        chunk_size: int | None = None,
        compile: Compile = False,
        processes: Processes | None = None,
    ) -> "Plan":
        """Look the program through and choose sizes; None chooses by memory.

        Several processes share the chunks of data, and enter with one random state. The caller forks it: each chunk
        has noise of its own, whoever draws it.

        Raises:
            ValueError: for sizes below 1, an empty DataLoader, or a program that does not fit its data.
        """
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size is not None:
                check_whole(**{name: size})
        data, seed = as_data(data), draw_seed()
        batches = stream(data, device=device_of(program))
        first = next(batches, None)
        if first is None:
            raise ValueError("Expected data to hold at least one datum; got an empty DataLoader")
        survey = Survey.of(program, first)
        draws = Draws(program, survey, compile)
        chunk_size = min(num_particles, chunk_size or evenly(num_particles, draws.rows))
        batch_size = batch_size or evenly(num_rows(first), max(1, draws.rows // chunk_size))
        shared = processes or Processes(), is_sharded(data)
        return Plan(draws, num_particles, chain([first], batches), count(data), batch_size, chunk_size, seed, *shared)

    def parts(self, title: str, progress: bool) -> Iterator[tuple[int, Batch]]:
        """This process's chunks of data in order, each with the number of its first datum."""
        rank, size = self.processes.rank, self.processes.size
        hidden = not progress or rank > 0
        with tqdm(total=self.num_data, unit=" data", desc=title, mininterval=0.5, disable=hidden) as bar:
            for i, (first, part) in numbered(self._all_parts(), self.seed):
                if self.sharded or i % size == rank:
                    yield first, part if self.draws.is_compiled else trim(part)
                bar.update(num_rows(part))

    def _all_parts(self) -> Iterator[tuple[int, Batch]]:
        done = 0
        for batch in self.batches:
            self.draws.survey.check_support(batch, "data")
            for start in range(0, num_rows(batch), self.batch_size):
                part = {key: value[start : start + self.batch_size] for key, value in batch.items()}
                yield done + start, part
            done += num_rows(batch)

    def weights(self, first: int, part: Batch) -> Iterator[Weights]:
        """Chunks of particles for a chunk of data, K in all."""
        for start in range(0, self.num_particles, self.chunk_size):
            yield self.draws(part, min(self.chunk_size, self.num_particles - start), first)
