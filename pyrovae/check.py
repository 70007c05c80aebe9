"""`check`: what is wrong with a program, told before hours of training on it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro

from pyrovae.batches import Batch, as_data, num_rows, stream
from pyrovae.noise import forked
from pyrovae.program import LatentModel, check_keys
from pyrovae.survey import Survey
from pyrovae.symptoms.dependence import gradients, independence, reads_data, reads_latents
from pyrovae.symptoms.finding import Finding, aside, own_error
from pyrovae.symptoms.measures import bounds, broadcasting, compiling, densities, scales
from pyrovae.symptoms.structure import latents, plates, runs, values
from pyrovae.traces import check_arguments, traced

ROWS = 6  # data on which a program is looked at
MANY = 256  # where data differ, and classes may be rare
STRUCTURE = {"runs": runs, "latents": latents, "plate": plates, "values": values}
CHEAP = {
    "scales": scales,
    "guide": reads_data,
    "likelihood": reads_latents,
    "gradients": gradients,
    "independence": independence,
}
ON_MANY = "guide", "gradients"
OTHERS = {"densities": densities, "broadcasting": broadcasting, "compiling": compiling, "bounds": bounds}


@dataclass(frozen=True)
class Report:
    """What `check` has found.

    Attributes:
        findings: what is wrong; empty for a sound program.
        checks: for each check what it asks for, and whether it was passed; None where it could not be made.
    """

    findings: list[Finding]
    checks: dict[str, tuple[str, bool | None]]

    def __str__(self) -> str:
        lines = []
        for name, (asked, passed) in self.checks.items():
            mark = {True: "ok", False: "FOUND", None: "not looked at"}[passed]
            lines.append(f"{name:<13} {mark:<14} {asked}")
        lines += [f"\n{finding}" for finding in self.findings]
        return "\n".join(lines)


def check(program: LatentModel, data: Any, *, strict: bool = False) -> Report:
    """Tell what is wrong with a program.

    It is run on a few data, many times, each time from the same noise; its weights, its mode and torch's random
    state are as before after it. What needs a sound structure is looked at only where that is sound. `fit` makes the
    cheap half of it (scales, what depends on what) on the first data, and warns.

    Args:
        program: a `LatentModel`.
        data: a tensor `(N, D)`, a batch, a `Data` or a torch `DataLoader`; its first data are used.
        strict: raise an error where anything is found.

    Returns:
        A report; printed, it lists the checks and each finding with why it matters and what to change.

    Raises:
        ValueError: for bad data; with `strict` for any finding, with the whole report.

    Example:
        >>> import torch
        >>> from pyrovae import VAE, check
        >>> check(VAE.mlp(8, 2, (5,)), torch.zeros(10, 8)).findings
        []
    """
    check_arguments(program)
    with forked():
        first = next(stream(as_data(data), name="data"), None)
    if first is None:
        raise ValueError("Expected data to hold at least one datum; got an empty DataLoader")
    check_keys(first, program.model, program.guide)
    device = next((p.device for p in program.parameters()), None)
    first = {key: value.to(device) for key, value in first.items()}
    few, many = _spread(first, ROWS), _spread(first, MANY)
    _first_run(program, few)
    found: dict[str, list[Finding]] = {}
    for name, symptom in STRUCTURE.items():
        if not any(found.values()):
            found[name] = _looked_at(name, symptom, program, few)
    if not any(found.values()):
        with aside(program):
            survey = Survey.of(program, few)
        for name, symptom in {**CHEAP, **OTHERS}.items():
            found[name] = _looked_at(name, symptom, program, many if name in ON_MANY else few, survey)
    every = STRUCTURE | CHEAP | OTHERS
    findings = [finding for each in found.values() for finding in each]
    wrong = {finding.check for finding in findings}
    checks = {
        name: (_title(symptom), name not in wrong if name in found or name in wrong else None)
        for name, symptom in every.items()
    }
    report = Report(findings, checks)
    if strict and findings:
        raise ValueError(f"Expected a sound program; got {len(findings)} findings\n{report}")
    return report


def _title(symptom: Callable[..., Any]) -> str:
    return (symptom.__doc__ or "").splitlines()[0].rstrip(".")


def _looked_at(name: str, symptom: Callable[..., Iterator[Finding]], *args: Any) -> list[Finding]:
    """What a check finds; an error on the way is a finding, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(symptom(*args))
    except Exception as error:
        return [Finding(name, None, f"the program fails while this is looked at. {own_error(error)}", failed=True)]


def warn_of_findings(program: LatentModel, batch: Batch, survey: Survey) -> None:
    """The cheap half of `check`, on the first data: a warning for each finding, and none where a look itself fails."""
    for name, symptom in CHEAP.items():
        for finding in _looked_at(name, symptom, program, _spread(batch, MANY if name in ON_MANY else ROWS), survey):
            if not finding.failed:
                warnings.warn(f"{finding}. `check(program, data)` looks further", stacklevel=5)


def _spread(batch: Batch, n: int) -> Batch:
    """At most n data, evenly spread: a set may be sorted by class."""
    step = max(1, num_rows(batch) // n)
    return {key: value[::step][:n] for key, value in batch.items()}


def _first_run(program: LatentModel, batch: Batch) -> None:
    """Make what parameters and lazy networks it makes, as if training had begun; whether it runs is looked at after."""
    with suppress(Exception), forked(), program.inference(), pyro.validation_enabled(False):
        traced(program, batch)
