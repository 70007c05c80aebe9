"""Whether what is measured of a program means anything: scales, densities, particles, graphs, bounds."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from pyrovae.batches import Batch, num_rows
from pyrovae.compiled import Compiled, CompileError
from pyrovae.labels import enumerated
from pyrovae.program import LatentModel
from pyrovae.survey import Survey, draw
from pyrovae.symptoms.finding import Finding, aside
from pyrovae.symptoms.normalization import total_probability
from pyrovae.traces import read, sample_sites, traced

DRAWS = 100


def scales(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """No weights inside the program."""
    with aside(program), torch.no_grad():
        sites = [site for trace in traced(program, batch) for site in sample_sites(trace).values()]
    factors = {_factor(site) for site in sites}
    for site in sites:
        name, scale = site["name"], _factor(site)
        if len(factors) > 1 and scale != 1:
            yield Finding(
                "scales",
                name,
                f"site {name!r} is multiplied by {scale:g}, and not every site is: what is optimised is no bound on "
                "log p(x), as where a mean over pixels stands for their sum. Take the scale out; "
                "fit(..., kl_weight=) weights the KL term from outside",
            )
        if type(site["fn"]).__name__ == "Unit" and site["is_observed"]:
            yield Finding(
                "scales",
                name,
                f"{name!r} is a pyro.factor: whatever it adds to log p(x, z), nothing makes p a density, so that "
                "log p(x) means nothing. Write it as a distribution, with obs=",
            )


def _factor(site: Any) -> float:
    """The scale of a site beside that of plates of which a part is drawn."""
    parts = [frame.full_size / frame.size for frame in site["cond_indep_stack"] if frame.full_size]
    return round(float(torch.as_tensor(site["scale"]).double().mean()) / math.prod(parts), 5)


def densities(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """Densities sum or integrate to one, where that can be told."""
    with aside(program), torch.no_grad():
        for trace in traced(program, batch):
            for name, site in sample_sites(trace).items():
                total = total_probability(site["fn"])
                if total is not None and abs(total - 1) > 0.02:
                    yield Finding(
                        "densities",
                        name,
                        f"the probabilities of all values of {name!r} add to {total:.3g}, and not to 1: log p(x) is "
                        "then off by an unknown number. A normalizing constant is missing, or a mean stands for a sum",
                    )


def broadcasting(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """Particles and classes run together."""
    if not survey.vectorized:
        where, what = _what_does_not_broadcast(program, batch, survey)
        yield Finding(
            "broadcasting",
            where,
            f"K particles do not run together, {what}: each datum is repeated for each particle instead, and "
            "vectorize_particles and enumeration fail. Let networks work on the last dimension alone, without "
            "reshaping by the batch, as a Conditional's does",
        )
        return
    if survey.label is not None:
        name = survey.label.name
        guide = enumerated(program.guide, name)
        try:
            with aside(program):
                TraceEnum_ELBO(max_plate_nesting=survey.nesting).differentiable_loss(program.model, guide, **batch)
        except Exception as error:
            yield Finding(
                "broadcasting",
                name,
                f"the classes of {name!r} cannot be summed over in parallel ({type(error).__name__}: {error}): "
                "training without labels then needs draws of them, which are noisy. Let networks work on the last "
                "dimension alone",
            )


def _what_does_not_broadcast(program: LatentModel, batch: Batch, survey: Survey) -> tuple[str | None, str]:
    """The network or site at which K particles together fail or differ, and how."""
    running: list[nn.Module] = []
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda module, _: running.append(module)),
        nn.modules.module.register_module_forward_hook(lambda *_: running.pop() and None),
    ]
    try:
        with aside(program), torch.no_grad():
            read(program, traced(program, batch, 2, survey.nesting), 2, num_rows(batch), survey.nesting + 1)
    except Exception as error:
        names = {id(module): name for name, module in program.named_modules()}
        inner = next((names[id(module)] for module in reversed(running) if names.get(id(module))), None)
        where = f" in {inner}" if inner else ""
        return inner, f"for with a dimension more there is an error{where} ({str(error).splitlines()[0]})"
    finally:
        for hook in hooks:
            hook.remove()
    return None, "for together they have other log-weights than one by one"


def compiling(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """The program can be traced, as compiling needs it."""
    function = Compiled(lambda **rows: draw(program, rows, 1, survey).log_weights, (program.model, program.guide))
    try:
        with aside(program), torch.no_grad():
            function.trace(**batch)
    except CompileError as error:
        yield Finding("compiling", None, f"{error}. It trains and is evaluated all the same, only not compiled")


def bounds(program: LatentModel, batch: Batch, survey: Survey) -> Iterator[Finding]:
    """A bound of K particles is not below the ELBO by more than noise allows."""
    with aside(program), torch.no_grad():
        alone = torch.cat([draw(program, batch, 1, survey).log_weights for _ in range(DRAWS)]).double()
        together = draw(program, batch, DRAWS, survey).log_weights.double()
    elbo, error = alone.mean(0), (alone.var(0) / DRAWS + together.var(0) / DRAWS).sqrt()
    bound = together.logsumexp(0) - torch.tensor(float(DRAWS)).log()
    short = ((elbo - bound) / error.clamp(min=1e-3)).max().item()
    if short > 5:
        yield Finding(
            "bounds",
            None,
            f"the bound of {DRAWS} particles lies {short:.0f} standard errors below the ELBO, which no importance "
            "weights do: particles together are not what they are one by one. Do they share noise, or a state?",
        )
