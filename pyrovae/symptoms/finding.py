"""A finding, and how a program is run aside."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import pyro
import torch

from pyrovae.noise import forked
from pyrovae.program import LatentModel

SEED = 0


@dataclass(frozen=True)
class Finding:
    """What is wrong with a program.

    Attributes:
        check: the name of the check that found it.
        site: the sample site, parameter or module that it is about; None where there is no one of them.
        message: what was found, why it matters and what to change.
        failed: whether an error stood in the way of the check, which the message then shows.
    """

    check: str
    site: str | None
    message: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def own_error(error: Exception) -> str:
    """A program's error, whole, for a finding's message."""
    return "Its own error:\n" + "".join(traceback.format_exception(error)).rstrip()


@contextmanager
def aside(program: LatentModel, training: bool = False) -> Iterator[None]:
    """Run a program in its scope with noise of its own; weights, modes and torch's random state are put back."""
    before = {name: value.detach().clone() for name, value in _tensors(program)}
    with forked(SEED), program.modes_kept(), program.scope(), pyro.validation_enabled(False):
        program.train(training)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in _tensors(program):
                    if name in before:
                        value.copy_(before[name])


def _tensors(program: LatentModel) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(program.named_parameters(), program.named_buffers())
