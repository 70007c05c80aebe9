"""Whether a program is one: that it runs, its latents, its plate, its values."""

from collections.abc import Iterator
from typing import Any

import pyro.poutine as poutine
import torch

from pyrovae.batches import Batch, num_rows
from pyrovae.program import LatentModel
from pyrovae.survey import Survey, draw
from pyrovae.symptoms.finding import Finding, aside, own_error
from pyrovae.traces import is_fixed, plate_dims, sample_sites, site_log_prob, traced

DRAWS = 100


def _lengths(batch: Batch) -> list[Batch]:
    """The batch and one datum less of it, lest a dimension of the data pass for the plate."""
    return [batch, {key: value[:-1] for key, value in batch.items()}] if num_rows(batch) > 1 else [batch]


def runs(program: LatentModel, batch: Batch) -> Iterator[Finding]:
    """Model and guide run, each on its own."""
    for part in ("guide", "model"):
        for rows in _lengths(batch):
            try:
                with aside(program), torch.no_grad():
                    poutine.trace(getattr(program, part)).get_trace(**rows)
            except Exception as error:
                yield _failure(error, f"the {part} on {num_rows(rows)} data")
                break


def _failure(error: Exception, what: str) -> Finding:
    """A finding that shows a program's own error, whole."""
    text = str(error)
    if "Shape mismatch inside plate" in text:
        text = text.splitlines()[0]
        site = text.split("at site ")[-1].split(" ")[0]
        return Finding(
            "plate",
            site,
            f"site {site!r} has a batch dimension that is not the plate's ({text}): what belongs to one datum would be "
            "taken for many data. Let its distribution end in .to_event(1), and the plate be as long as the batch, "
            "as data_plate(x) is",
        )
    return Finding("runs", None, f"{what} fails, so that nothing else can be looked at. {own_error(error)}")


def latents(program: LatentModel, batch: Batch) -> Iterator[Finding]:
    """The same latents in model and guide, of the same shapes and supports."""
    with aside(program), torch.no_grad():
        guide, model = (sample_sites(poutine.trace(f).get_trace(**batch)) for f in (program.guide, program.model))
        inner = {name: site for name, site in model.items() if not site["is_observed"]}
        for name in [name for name in inner if name not in guide]:
            yield Finding(
                "latents",
                name,
                f"latent {name!r} of the model is not drawn by the guide, which draws {', '.join(guide) or 'nothing'}: "
                "without log q of it there is no ELBO, and no weight. Draw it in the guide under this name",
            )
        for name in [name for name in guide if name not in inner]:
            if not guide[name]["infer"].get("is_auxiliary"):
                what = "observes it" if name in model else "has no such site"
                yield Finding(
                    "latents",
                    name,
                    f"the guide draws {name!r}, and the model {what}: log q is subtracted and nothing added for it, so "
                    "that the ELBO is wrong. Give the model this latent, or take it out of the guide",
                )
        for name in [name for name in inner if name in guide]:
            yield from _of_one_kind(name, guide, model)


def _of_one_kind(name: str, guide: dict[str, Any], model: dict[str, Any]) -> Iterator[Finding]:
    q, p = guide[name]["fn"], model[name]["fn"]
    if q.event_shape != p.event_shape:
        others = [other for other in guide if other != name and guide[other]["fn"].event_shape == p.event_shape]
        hint = f" Is it swapped with {others[0]!r}?" if others else ""
        yield Finding(
            "latents",
            name,
            f"latent {name!r} has the shape {tuple(q.event_shape)} in the guide and {tuple(p.event_shape)} in the "
            f"model: one of them scores what the other has not drawn. Give both one size, and both .to_event(1).{hint}",
        )
        return
    for drawn, by, scored, of, why in (
        (q, "guide", p, "model", "their log p is meaningless or minus infinity"),
        (p, "model", q, "guide", "these values are never proposed, and log p(x) comes out too low"),
    ):
        if not bool(guide[name]["value"].isfinite().all()):
            return  # its parameters are not, either
        values = drawn.sample(torch.Size((DRAWS,)))
        try:
            if not is_fixed(scored.support):
                continue  # it depends on another latent
            outside = ~scored.support.check(values)
        except NotImplementedError:
            continue
        if bool(outside.any()):
            yield Finding(
                "latents",
                name,
                f"{outside.double().mean():.0%} of what the {by} draws at {name!r} lie outside the support of the {of}"
                f", {scored.support}: {why}. Give both families one support",
            )
            return


def plates(program: LatentModel, batch: Batch) -> Iterator[Finding]:
    """Every site in the plate over the data, with a log-probability for each datum."""
    for rows in _lengths(batch):
        with aside(program), torch.no_grad():
            found = list(_plates(program, rows))
        if found:
            yield from found
            return


def _plates(program: LatentModel, rows: Batch) -> Iterator[Finding]:
    n = num_rows(rows)
    try:
        pair = [sample_sites(trace) for trace in traced(program, rows)]
    except Exception as error:
        yield _failure(error, "the model on what the guide has drawn")
        return
    sites = [site for part in pair for site in part.values()]
    dims = max((-dim for site in sites for dim in plate_dims(site)), default=1)
    for site in sites:
        try:
            site_log_prob(program, site, 1, n, dims)
        except ValueError as error:
            yield Finding(
                "plate",
                site["name"],
                f"{error}. Without a log-probability of its own a datum has no weight; open the plate by `with "
                "data_plate(x):` around every site, and let what belongs to one datum end in .to_event(1)",
            )
    if all(not site["is_observed"] for site in pair[1].values()):
        yield Finding(
            "plate",
            None,
            "the model observes nothing, so that the ELBO says nothing of the data. Give the data's site obs=x",
        )


def values(program: LatentModel, batch: Batch) -> Iterator[Finding]:
    """Data within supports, parameters valid, log-weights finite."""
    try:
        with aside(program), torch.no_grad():
            bad = draw(program, batch, 1, Survey.of(program, batch)).first_bad()
    except (ValueError, FloatingPointError) as error:
        yield Finding("values", None, f"{error}. Neither an ELBO nor a weight can be formed of it")
        return
    if bad is not None:
        yield Finding("values", None, f"{bad}: one such value spoils the whole loss. Bound the parameters that give it")
