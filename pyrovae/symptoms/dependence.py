"""What depends on what in a program: weights on data, latents on data, data on latents, the loss on parameters."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyrovae.batches import Batch, num_rows
from pyrovae.labels import without
from pyrovae.program import LatentModel, check_keys
from pyrovae.survey import Survey
from pyrovae.symptoms.finding import SEED, Finding, aside
from pyrovae.traces import sample_sites, site_log_prob, traced

JITTER = 0.05  # in the place of zeros, lest a layer that begins there pass for one that no gradient reaches


def independence(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """A datum's log-weight depends on that datum alone."""
    n = num_rows(batch)
    other = next((i for i in range(1, n) if any(not torch.equal(v[i], v[0]) for v in batch.values())), None)
    if other is None or n < 3:
        return
    another = {key: value[other : other + 1] for key, value in batch.items()}
    changes = [  # the first datum, and what must not move by it; and all others
        ({key: torch.cat([another[key], value[1:]]) for key, value in batch.items()}, slice(1, None)),
        ({key: torch.cat([value[:1], *[another[key]] * (n - 1)]) for key, value in batch.items()}, slice(1)),
    ]
    for training in (False, True):
        site = _moved(program, batch, changes, survey, training)
        if site is None:
            continue
        norms = [
            name for name, module in program.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        cause = "what is computed over the batch"
        if training and norms:
            cause = f"the batch normalization of {', '.join(norms[:3])}, in training mode"
        yield Finding(
            "independence",
            norms[0] if training and norms else site,
            f"other data in the batch change a datum's log-probability at site {site!r}, by {cause}: the loss is then "
            "no sum over data, and no bound on each one's log p(x). Compute over the last dimension alone"
            + (", as nn.LayerNorm does" if norms else ""),
        )
        return


def _moved(
    program: LatentModel, batch: Batch, changes: list[tuple[Batch, slice]], survey: Survey, training: bool
) -> str | None:
    """The first site at which other data move the log-probabilities of those that are kept, the latents being fixed."""
    with aside(program, training), torch.no_grad():
        latents, _ = traced(program, batch)

    def log_probs(rows: Batch) -> list[tuple[str, Tensor]]:
        with aside(program, training), torch.no_grad():
            sites = [site for trace in traced(program, rows, latents=latents) for site in sample_sites(trace).values()]
            return [(s["name"], site_log_prob(program, s, 1, num_rows(rows), survey.nesting)) for s in sites]

    before = log_probs(batch)
    for changed, kept in changes:
        for (name, one), (_, another) in zip(before, log_probs(changed), strict=True):
            if not torch.allclose(one[:, kept], another[:, kept], rtol=1e-5, atol=1e-6, equal_nan=True):
                return name
    return None


def reads_data(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """Every latent of the guide depends on the data."""
    others = {key: value.roll(1, 0) for key, value in batch.items()}
    if all(torch.equal(value, others[key]) for key, value in batch.items()):
        return
    same = _drawn_alike(program, batch, others, jitter=False)
    moved = set(same)
    with suppress(Exception):  # weights may have to be zero
        moved -= set(_drawn_alike(program, batch, others, jitter=True) if same else ())
    for name in [name for name in same if name not in moved]:
        yield Finding(
            "guide",
            name,
            f"the guide draws {name!r} in the same way whatever the data: q is no posterior then, and learns no more "
            "than the prior. Let its parameters be a function of the data",
        )


def _drawn_alike(program: LatentModel, batch: Batch, others: Batch, jitter: bool) -> list[str]:
    """The latents whose draws and log-probabilities other data do not move at all."""
    seen = []
    for rows in (batch, others):
        with aside(program), torch.no_grad():
            _jitter(program, jitter)
            torch.manual_seed(SEED)
            seen.append(sample_sites(poutine.trace(program.guide).get_trace(**rows)))
    pairs = {name: (site, seen[1][name]) for name, site in seen[0].items()}
    return [
        name
        for name, (one, two) in pairs.items()
        if torch.equal(one["value"], two["value"])
        and torch.equal(one["fn"].log_prob(one["value"]), two["fn"].log_prob(two["value"]))
    ]


def _jitter(program: nn.Module, jitter: bool = True) -> None:
    """Move what is exactly zero."""
    for parameter in program.parameters():
        if jitter and parameter.is_floating_point():
            parameter.data.add_(JITTER * torch.randn_like(parameter) * (parameter == 0))


def gradients(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """Every parameter receives a gradient."""
    parameters: dict[str, Tensor] = {name: p for name, p in program.named_parameters() if p.requires_grad}
    hidden = without(program.label, batch)  # a label that is shown is not drawn, and its network then of no use
    reached: set[str] = set()
    for rows in [batch, hidden] if hidden.keys() < batch.keys() and _takes(program, hidden) else [batch]:
        with aside(program):  # no gradient flows through a weight whose input is zero, as black pixels are
            moved = {key: v + torch.rand_like(v) if v.is_floating_point() else v for key, v in rows.items()}
        for training in (False, True):
            reached |= _reached(program, rows, rows, training, parameters)
            if len(reached) < len(parameters):
                with suppress(Exception):  # a guide may take none but the data's own values, or weights that are zero
                    reached |= _reached(program, rows, moved, training, parameters, jitter=True)
    for name in [name for name in parameters if name not in reached]:
        yield Finding(
            "gradients",
            name,
            f"parameter {name!r} receives no gradient from model or guide: it stays what it was at first. Is its "
            "output detached, computed under no_grad or not used? What shall stay fixed has requires_grad_(False)",
        )


def _takes(program: LatentModel, batch: Batch) -> bool:
    try:
        check_keys(batch, program.model, program.guide)
    except ValueError:
        return False
    return True


def _log_probs(sites: dict[str, Any]) -> Tensor:
    return torch.stack([site["fn"].log_prob(site["value"]).sum() for site in sites.values()]).sum()


def _reached(
    program: LatentModel,
    batch: Batch,
    seen: Batch,
    training: bool,
    parameters: dict[str, Tensor],
    jitter: bool = False,
) -> set[str]:
    """Which parameters log q, of a guide that sees these data, or log p of the batch has a gradient in."""
    with aside(program, training), torch.enable_grad():
        _jitter(program, jitter)
        guide = poutine.trace(program.guide).get_trace(**seen)
        _, model = traced(program, batch, latents=guide)
        totals = [_log_probs(sample_sites(trace)) for trace in (guide, model)]
        found: set[str] = set()
        for total in totals:
            if total.requires_grad and parameters:
                grads = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
                named = zip(parameters, grads, strict=True)
                found |= {name for name, grad in named if grad is not None and bool(grad.any())}
    return found


def reads_latents(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """The density of the data depends on a latent."""
    name = _unread(program, batch, jitter=False) and _unread(program, batch, jitter=True)
    if name:
        yield Finding(
            "likelihood",
            name,
            f"the density of {name!r} does not depend on any latent, so that these are of no use. Is a latent "
            "detached, or its network not called with it?",
        )


def _unread(program: LatentModel, batch: Batch, jitter: bool) -> str:
    """The observed sites, where their log-probabilities have no gradient in any latent; else nothing."""
    with aside(program), torch.enable_grad():
        _jitter(program, jitter)
        guide = sample_sites(poutine.trace(program.guide).get_trace(**batch))
        drawn = {name: site["value"].detach() for name, site in guide.items()}
        leaves = [value.requires_grad_() for value in drawn.values() if value.is_floating_point()]
        model = sample_sites(poutine.trace(poutine.condition(program.model, data=drawn)).get_trace(**batch))
        observed = {name: site for name, site in model.items() if site["is_observed"] and name not in drawn}
        total = _log_probs(observed)
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad and leaves else []
        moved = any(grad is not None and bool(grad.any()) for grad in grads)
    return ", ".join(observed) if leaves and not moved else ""
