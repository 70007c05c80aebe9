"""The only reader of Pyro traces: log-probabilities for each site and datum, and importance weights (K, N)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from pyrovae.data import Batch, as_batch, check_finite, num_rows
from pyrovae.program import LatentModel, check_keys

FIRST = 1000  # data, at most, on which a program first runs and makes its parameters
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
        """E_q[z | x] of each of the guide's sites, `(N, D)`: exact where the family knows it, averaged over K."""
        means = {}
        for name, site in self.guide_sites.items():
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
            _check_support("values", site["value"], site["name"], site["fn"].support)

    def _checked(self) -> list[Any]:
        sites = [self.model_sites[name] for name in self.observed]
        return [site for site in sites if site["mask"] is None and _is_fixed(site["fn"].support)]

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


def log_weights(program: LatentModel, batch: Any, num_particles: int) -> Tensor:
    """log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q(z | x), for each datum on its own.

    Scales (subsampling, KL weights) are stripped, masks are kept. Gradients flow to model and guide.

    Args:
        program: a `LatentModel`.
        batch: data, a dict of tensors `(N, ...)`, a tensor or a pair.
        num_particles: K.

    Returns:
        `(K, N)`, in nats.

    Raises:
        ValueError: where latents of model and guide differ, or a site lies outside the plate over the data;
            for bad data or num_particles < 1.

    Source:
        Kingma and Welling (2019), section 2.6; Burda et al. (2016), eq. 8.

    Example:
        >>> from pyrovae import VAE, log_weights
        >>> log_weights(VAE.mlp(64, 2), torch.zeros(5, 64), num_particles=3).shape
        torch.Size([3, 5])
    """
    check_arguments(program, num_particles)
    batch = as_batch(batch)
    check_finite(batch, "batch")
    survey = Survey.of(program, batch)
    with program.scope():
        drawn = draw(program, batch, num_particles, survey)
    drawn.check_support()
    return drawn.log_weights


def check_arguments(program: Any, num_particles: int = 1) -> None:
    """Raises ValueError for what is not a `LatentModel`, or fewer particles than one."""
    if isinstance(num_particles, bool) or not hasattr(num_particles, "__index__") or num_particles < 1:
        raise ValueError(f"Expected num_particles to be a whole number of at least 1; got {num_particles!r}")
    if not isinstance(program, LatentModel):
        raise ValueError(
            f"Expected program to be a LatentModel; got {type(program).__name__}. "
            "Two functions become one by as_program(model, guide)"
        )


@dataclass(frozen=True)
class Survey:
    """What a first run on one or two rows tells of a program.

    Attributes:
        nesting: number of dimensions that the program's own plates take.
        vectorized: particles in a plate to the left of its own plates have the log-weights that they have one by
            one, so that its networks broadcast. If not, each datum is repeated for each particle.
        width: numbers for each datum in the widest tensor that a network or a site makes.
        dim: number of observed values in a datum.
        supports: for each tensor of the batch that a site observes as it is, that site and its support.
    """

    nesting: int
    vectorized: bool
    width: int
    dim: int
    supports: dict[str, tuple[str, Any]]

    @staticmethod
    def of(program: LatentModel, batch: Batch, name: str = "data") -> "Survey":
        """Run the program in eval mode on the first rows, from a copy of torch's random state.

        Raises:
            ValueError: where the batch does not fit the arguments, latents of model and guide differ, a site lies
                outside the plate over the data, data lie outside the support of their site, or Pyro finds fault with
                the values or parameters of a site.
            FloatingPointError: where a log-weight is NaN.
        """
        check_keys(batch, program.model, program.guide)
        two, three = ({key: value[:n] for key, value in batch.items()} for n in (2, 3))
        n = num_rows(two)
        with torch.random.fork_rng(), program.inference():
            with pyro.validation_enabled(False), _Widest() as widest:
                _run(program, {key: value[:FIRST] for key, value in batch.items()})  # makes all parameters
                widest.numel = 0
                traces = _run_on(program, two)
                nesting = _nesting(traces)
                drawn = _read(program, traces, 1, n, nesting)  # support: looked at below, under the data's name
            observed = [drawn.model_sites[site] for site in drawn.observed]
            sizes = [site["value"].numel() for site in (*drawn.guide_sites.values(), *drawn.model_sites.values())]
            survey = Survey(
                nesting,
                vectorized=False,
                width=max(widest.numel, *sizes) // n,
                dim=sum(site["value"].numel() for site in observed) // n,
                supports={
                    key: (site["name"], site["fn"].support)
                    for key, value in two.items()
                    for site in observed
                    if site["value"].data_ptr() == value.data_ptr()
                    and site["value"].shape == value.shape
                    and _is_fixed(site["fn"].support)
                },
            )
            survey.check_support(two, name)
            if bool(torch.isnan(drawn.log_weights).any()):
                raise FloatingPointError(f"Expected finite log-weights; got NaN: {drawn.first_bad()}")
            with pyro.validation_enabled(True):
                _read(program, _run(program, two), 1, n, nesting).check_support()
                # at two lengths, lest a network take data for features where there are as many of them
                vectorized = all(_broadcasts(program, rows, nesting) for rows in (two, three))
        return replace(survey, vectorized=vectorized)

    def check_support(self, batch: Batch, name: str) -> None:
        """Raises ValueError where data lie outside the support of the site that observes them."""
        for key, (site, support) in self.supports.items():
            _check_support(f"{name}[{key!r}]", batch[key], site, support)


def _is_fixed(support: Any) -> bool:
    """Whether a support is the same for all data and latents."""
    parts = [support, getattr(support, "base_constraint", None)]
    return not any(isinstance(value, Tensor) for part in parts if part is not None for value in vars(part).values())


def _check_support(name: str, value: Tensor, site: str, support: Any) -> None:
    inside = support.check(value)
    if bool(inside.all()):
        return
    bad, binary = value[~inside][0].flatten(), "boolean" in str(support).lower()
    bad = bad[(bad != 0) & (bad != 1)] if binary else bad
    raise ValueError(
        f"Expected {name} within the support of site {site!r}, {'{0, 1}' if binary else support}; "
        f"got {bad[0].item():g}" + (". Binarize grey values, or choose another likelihood" if binary else "")
    )


class _Widest:
    """While entered, notes the largest number of values that any network's output has."""

    def __enter__(self) -> "_Widest":
        self.numel = 0
        self.handle = register_module_forward_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.numel = max(self.numel, output.numel())


def draw(program: LatentModel, batch: Batch, num_particles: int, survey: Survey) -> Draw:
    """Run guide and model once, K particles at a time; the caller has entered the program's scope.

    Raises:
        ValueError: where latents of model and guide differ, or a site lies outside the plate over the data.
    """
    n = num_rows(batch)
    if num_particles == 1:
        return _read(program, _run(program, batch), 1, n, survey.nesting)
    if survey.vectorized:
        traces = _run(program, batch, num_particles, survey.nesting)
        return _read(program, traces, num_particles, n, survey.nesting + 1)
    rows = {key: value.repeat(num_particles, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    return _read(program, _run(program, rows), num_particles, n, survey.nesting)


def _run_on(program: LatentModel, rows: Batch) -> "Traces":
    """Run on a few rows; an error names that as its cause."""
    try:
        return _run(program, rows)
    except RuntimeError as error:
        raise ValueError(
            "Expected a program that runs on any number of data; it ran on more, and on "
            f"{num_rows(rows)} it fails: {str(error).splitlines()[0]}"
        ) from error


class Unscaled(Messenger):
    """A handler that strips the scales from a program."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


def replayed_guide(program: LatentModel, batch: Batch) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The guide with its latents fixed at one draw, and their values."""
    trace = poutine.trace(program.guide).get_trace(**batch)
    return poutine.replay(program.guide, trace=trace), {name: site["value"] for name, site in _sites(trace).items()}


Traces = tuple[poutine.Trace, poutine.Trace]


def _run(program: LatentModel, batch: Batch, num_particles: int = 1, nesting: int = 0, latents: Any = None) -> Traces:
    """Traces of the guide and of the model run against it; `latents`, a trace, fixes what the guide draws."""
    model, guide = program.model, program.guide
    if num_particles > 1:
        plate = pyro.plate(PARTICLES, num_particles, dim=-nesting - 1)
        model, guide = plate(model), plate(guide)
    if latents is not None:
        guide = poutine.replay(guide, trace=latents)
    guide_trace = poutine.trace(guide).get_trace(**batch)
    return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(**batch)


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites that carry a density."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not poutine.util.site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def _plate_dims(site: Any) -> set[int]:
    return {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def _together(site: Any) -> bool:
    """Whether the particles have a plate of their own."""
    return any(frame.name == PARTICLES for frame in site["cond_indep_stack"])


def _nesting(traces: Traces) -> int:
    return max((-dim for trace in traces for site in _sites(trace).values() for dim in _plate_dims(site)), default=1)


def _broadcasts(program: LatentModel, batch: Batch, nesting: int) -> bool:
    n = num_rows(batch)
    try:
        traces = _run(program, batch, 2, nesting)
        together = _read(program, traces, 2, n, nesting + 1)
    except Exception:  # a network that does not broadcast says so in many ways, and each datum is repeated instead
        return False
    for k in range(2):
        alone = _read(program, _run(program, batch, latents=_particle(traces[0], k, nesting)), 1, n, nesting)
        if not torch.allclose(together.log_weights[k], alone.log_weights[0], rtol=1e-4, atol=1e-4, equal_nan=True):
            return False
    return True


def _particle(guide_trace: poutine.Trace, k: int, nesting: int) -> poutine.Trace:
    """The guide's trace with the k-th particle alone, its values shaped as if there had been no others."""
    particle = poutine.Trace()
    for name, site in _sites(guide_trace).items():
        plates = max((-dim for dim in _plate_dims(site) if dim != -nesting - 1), default=0)
        value = site["value"][k]
        value = value.reshape(value.shape[value.dim() - site["fn"].event_dim - plates :])
        particle.add_node(name, name=name, type="sample", value=value, is_observed=False, infer=site["infer"])
    return particle


def _read(program: LatentModel, traces: Traces, num_particles: int, n: int, dims: int) -> Draw:
    guide, model = map(_sites, traces)
    latents = [name for name, site in model.items() if not site["is_observed"]]
    _check_latents(latents, guide)
    if len(latents) == len(model):
        raise ValueError(f"Expected the model to observe data; got only latent sites, {sorted(latents)}")
    log_q = {name: _log_prob(program, site, num_particles, n, dims) for name, site in guide.items()}
    log_p = {name: _log_prob(program, site, num_particles, n, dims) for name, site in model.items()}
    return Draw(
        guide=log_q,
        latents={name: log_p[name] for name in latents},
        observed={name: log_p[name] for name in model if name not in latents},
        guide_sites=guide,
        model_sites=model,
        plate_name=program.plate_name,
    )


def _check_latents(model: list[str], guide: dict[str, Any]) -> None:
    missing = sorted(set(model) - set(guide))
    extra = sorted(name for name in set(guide) - set(model) if not guide[name]["infer"].get("is_auxiliary"))
    if missing or extra:
        raise ValueError(
            f"Expected the guide to have the latent sites of the model, {sorted(model)}; got {sorted(guide)}"
            + (f": the guide lacks {', '.join(missing)}" if missing else "")
            + (f": the model lacks {', '.join(extra)}" if extra else "")
        )


def _log_prob(program: LatentModel, site: Any, num_particles: int, n: int, dims: int) -> Tensor:
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
    undeclared = [d for d in range(-log_p.dim(), 0) if log_p.shape[d] > 1 and d not in _plate_dims(site)]
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
