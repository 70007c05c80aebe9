"""The only reader of Pyro traces: log-probabilities for each site and datum, and importance weights (K, N)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch
from pyrovae.program import LatentModel

PARTICLES = "pyrovae particles"  # name of the plate: none that a program is likely to use itself


@dataclass
class Draw:
    """K draws of all latents for each of N data, and what model and guide say of them.

    Attributes:
        guide: log q of each of the guide's sites, `(K, N)`; natural logarithms, unscaled, masks applied.
        latents: log p of each of the model's latent sites, `(K, N)`.
        observed: log p of each of the model's observed sites, `(K, N)`.
        guide_sites, model_sites: the sites themselves, as Pyro's traces have them.
        plate_name: of the plate over the data.
    """

    guide: dict[str, Tensor]
    latents: dict[str, Tensor]
    observed: dict[str, Tensor]
    guide_sites: dict[str, Any]
    model_sites: dict[str, Any]
    plate_name: str

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z_k) - log q(z_k | x), `(K, N)`."""
        return self.log_px_z - self.kl

    @property
    def log_px_z(self) -> Tensor:
        """log p(x | z_k), `(K, N)`."""
        return _sum(self.observed)

    @property
    def kl(self) -> Tensor:
        """log q(z_k | x) - log p(z_k), `(K, N)`: one-draw estimates of KL(q(z | x) || p(z))."""
        return _sum(self.guide) - _sum(self.latents)

    def posterior_means(self) -> dict[str, Tensor]:
        """E_q[z | x] of each of the guide's sites, `(N, D)`: exact where the family knows it, averaged over K.

        A site whose values are no vectors, as whole sequences, has none.
        """
        means = {}
        for name, site in self.guide_sites.items():
            if site["fn"].event_dim > 1:
                continue
            try:
                value = site["fn"].mean
            except NotImplementedError:
                value = site["value"]
            plate = next(frame for frame in site["cond_indep_stack"] if frame.name == self.plate_name)
            value = value.movedim(plate.dim - site["fn"].event_dim, 0)  # data first, then the particles' plate
            if _together(site):
                value = value.movedim(1, 0)
            means[name] = value.reshape(*self.guide[name].shape, -1).mean(0)
        return means

    def supported(self) -> Tensor:
        """Whether all observed values lie within the supports of their sites, `()`."""
        inside = [site["fn"].support.check(site["value"]).all() for site in self._checked()]
        return torch.stack(inside).all() if inside else self.log_weights.new_ones(()).bool()

    def check_support(self) -> None:
        """Raises ValueError where observed values lie outside the support of their site."""
        for site in self._checked():
            check_support("values", site["value"], site["name"], site["fn"].support)

    def _checked(self) -> list[Any]:
        sites = [self.model_sites[name] for name in self.observed]
        return [site for site in sites if site["mask"] is None and is_fixed(site["fn"].support)]

    def first_bad(self) -> str | None:
        """Where the first value or log-probability that is not finite stands, in the order of execution."""
        for part, sites, log_probs in (
            ("guide", self.guide_sites, self.guide),
            ("model", self.model_sites, self.latents | self.observed),
        ):
            for name, site in sites.items():
                if not bool(torch.isfinite(site["value"]).all()):
                    return f"site {name!r} of the {part}: its value is not finite"
                if not bool(torch.isfinite(log_probs[name]).all()):
                    return f"site {name!r} of the {part}: its log-probability is not finite"
        return None


def _sum(log_probs: dict[str, Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*log_probs.values())).sum(0) if log_probs else torch.zeros(())


def check_arguments(program: Any, num_particles: int = 1) -> None:
    """Raises ValueError for what is not a `LatentModel`, or fewer particles than one."""
    check_whole(num_particles=num_particles)
    if not isinstance(program, LatentModel):
        raise ValueError(
            f"Expected program to be a LatentModel; got {type(program).__name__}. "
            "Two functions become one by as_program(model, guide)"
        )


def is_fixed(support: Any) -> bool:
    """Whether a support is the same for all data and latents."""
    parts = [support, getattr(support, "base_constraint", None)]
    return not any(isinstance(value, Tensor) for part in parts if part is not None for value in vars(part).values())


def check_support(name: str, value: Tensor, site: str, support: Any) -> None:
    """Raises ValueError where values lie outside the support of a site."""
    inside = support.check(value)
    if bool(inside.all()):
        return
    while hasattr(support, "base_constraint"):  # of one value of a datum, where they are independent
        support = support.base_constraint
    each = support.check(value)
    bad = value[~each] if each.shape == value.shape else value[~inside].flatten()
    binary = "boolean" in str(support).lower()
    raise ValueError(
        f"Expected {name} within the support of site {site!r}, {'{0, 1}' if binary else support}; "
        f"got {bad[0].item():g}" + (". Binarize grey values, or choose another likelihood" if binary else "")
    )


class Unscaled(Messenger):
    """A handler that strips the scales from a program."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


class Cut(Messenger):
    """A handler that cuts latents from the parameters that they were drawn with: log-densities alone have gradients."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def replayed_guide(program: LatentModel, batch: Batch) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The guide with its latents fixed at one draw, and their values."""
    trace = poutine.trace(program.guide).get_trace(**batch)
    return poutine.replay(program.guide, trace=trace), {
        name: site["value"] for name, site in sample_sites(trace).items()
    }


Traces = tuple[poutine.Trace, poutine.Trace]


def traced(program: LatentModel, batch: Batch, num_particles: int = 1, nesting: int = 0, latents: Any = None) -> Traces:
    """Traces of the guide and of the model run against it; `latents`, a trace, fixes what the guide draws."""
    model, guide = program.model, program.guide
    if num_particles > 1:
        plate = pyro.plate(PARTICLES, num_particles, dim=-nesting - 1)
        model, guide = plate(model), plate(guide)
    if latents is not None:
        guide = poutine.replay(guide, trace=latents)
    guide_trace = poutine.trace(guide).get_trace(**batch)
    return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(**batch)


def sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites that carry a density."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not poutine.util.site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def plate_dims(site: Any) -> set[int]:
    """The dimensions of a site's plates, counted from the right."""
    return {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def _together(site: Any) -> bool:
    """Whether the particles have a plate of their own."""
    return any(frame.name == PARTICLES for frame in site["cond_indep_stack"])


def read(program: LatentModel, traces: Traces, num_particles: int, n: int, dims: int) -> Draw:
    """What traces of K particles for N data say, site by site; `dims` plates there are at most.

    Raises:
        ValueError: where latents of model and guide differ, or a site lies outside the plate over the data.
    """
    guide, model = map(sample_sites, traces)
    latents = [name for name, site in model.items() if not site["is_observed"]]
    check_latents(latents, guide)
    if len(latents) == len(model):
        raise ValueError(f"Expected the model to observe data; got only latent sites, {sorted(latents)}")
    log_q = {name: site_log_prob(program, site, num_particles, n, dims) for name, site in guide.items()}
    log_p = {name: site_log_prob(program, site, num_particles, n, dims) for name, site in model.items()}
    return Draw(
        guide=log_q,
        latents={name: log_p[name] for name in latents},
        observed={name: log_p[name] for name in model if name not in latents},
        guide_sites=guide,
        model_sites=model,
        plate_name=program.plate_name,
    )


def check_latents(model: list[str], guide: dict[str, Any]) -> None:
    """Raises ValueError where the latent sites of model and guide differ; auxiliary ones aside."""
    missing = sorted(set(model) - set(guide))
    extra = sorted(name for name in set(guide) - set(model) if not guide[name]["infer"].get("is_auxiliary"))
    if missing or extra:
        raise ValueError(
            f"Expected the guide to have the latent sites of the model, {sorted(model)}; got {sorted(guide)}"
            + (f": the guide lacks {', '.join(missing)}" if missing else "")
            + (f": the model lacks {', '.join(extra)}" if extra else "")
        )


def site_log_prob(program: LatentModel, site: Any, num_particles: int, n: int, dims: int) -> Tensor:
    """log-probability `(K, N)` of one site, summed over all its plates but those of particles and data.

    `dims` plates there are at most; with more than `program`'s own, the first is that of the particles. Otherwise
    the K particles lie behind each other in the data plate.
    """
    name, fn, value = site["name"], site["fn"], site["value"]
    plate = next((f for f in site["cond_indep_stack"] if f.name == program.plate_name and f.vectorized), None)
    if plate is None:
        raise ValueError(f"Expected site {name!r} inside the plate {program.plate_name!r} over the data; it is outside")
    event_shape = tuple(value.shape[value.dim() - fn.event_dim :])
    if event_shape != tuple(fn.event_shape):
        raise ValueError(
            f"Expected values of shape (*, {', '.join(map(str, fn.event_shape))}) at site {name!r}; "
            f"got {tuple(value.shape)}"
        )
    log_p = scale_and_mask(fn.log_prob(value, *site["args"], **site["kwargs"]), mask=site["mask"])
    undeclared = [d for d in range(-log_p.dim(), 0) if log_p.shape[d] > 1 and d not in plate_dims(site)]
    if undeclared:
        raise ValueError(
            f"Expected the batch dimensions of site {name!r} to be those of its plates; got shape "
            f"{tuple(log_p.shape)} with none for dimension {undeclared[0]}. Does it lack .to_event(1)?"
        )
    together = _together(site)
    rows = n if together else num_particles * n
    if plate.size != rows or log_p.dim() < -plate.dim or log_p.shape[plate.dim] != rows:
        raise ValueError(
            f"Expected the plate {program.plate_name!r} at site {name!r} to be as long as the batch, {rows}; "
            f"got {plate.size} and log-probabilities of shape {tuple(log_p.shape)}"
        )
    log_p = log_p.reshape([1] * (dims - log_p.dim()) + list(log_p.shape))
    others = [d for d in range(-dims + together, 0) if d != plate.dim]
    return (log_p.sum(others) if others else log_p).reshape(num_particles, n)
