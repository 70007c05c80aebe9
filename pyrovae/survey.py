"""What a first run tells of a program, and draws of K particles for each datum by what it told."""

from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from pyrovae.batches import Batch, as_batch, check_finite, num_rows
from pyrovae.labels import Fixed, Label, Shared, without
from pyrovae.noise import forked
from pyrovae.program import LatentModel, check_keys, device_of, told
from pyrovae.sequences import are_sequences
from pyrovae.traces import (
    Draw,
    Traces,
    check_arguments,
    check_support,
    is_fixed,
    plate_dims,
    read,
    sample_sites,
    traced,
)

FIRST = 1000  # data, at most, on which a program first runs and makes its parameters


def log_weights(program: LatentModel, batch: Any, num_particles: int) -> Tensor:
    """log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q(z | x), for each datum on its own.

    A label that the batch does not show is not drawn but summed over: w_k = sum_y p(x, y, z_ky) / q(z_ky | x, y).
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
    batch = {key: value.to(device_of(program)) for key, value in as_batch(batch).items()}
    check_finite(batch, "batch")
    survey = Survey.of(program, batch)
    with program.scope():
        drawn = draw(program, batch, num_particles, survey)
    drawn.check_support()
    return drawn.log_weights


@dataclass(frozen=True)
class Survey:
    """What a first run on one or two rows tells of a program.

    Attributes:
        nesting: number of dimensions that the program's own plates take.
        vectorized: particles in a plate to the left of its own plates have the log-weights that they have one by
            one, so that its networks broadcast. If not, each datum is repeated for each particle.
        width: numbers for each datum in the widest tensor that a network or a site makes.
        dim: number of observed values in a datum; of sequences, in a step.
        supports: for each tensor of the batch that a site observes as it is, that site and its support.
        label: the program's label, where the batch does not show it.
    """

    nesting: int
    vectorized: bool
    width: int
    dim: int
    supports: dict[str, tuple[str, Any]]
    label: Label | None

    @property
    def numbers(self) -> int:
        """How many numbers one draw for one datum makes in the widest tensor."""
        return self.width * (1 if self.label is None else len(self.label.values))

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
        n, steps = num_rows(two), batch["x"].shape[1] if are_sequences(batch) else 1
        with forked(), program.inference(), told(batch, name):
            with pyro.validation_enabled(False), _Widest() as widest:
                traced(program, {key: value[:FIRST] for key, value in batch.items()})  # makes all parameters
                widest.numel = 0
                traces = _run_on(program, two)
                nesting = _nesting(traces)
                drawn = read(program, traces, 1, n, nesting)  # support: looked at below, under the data's name
            observed = [drawn.model_sites[site] for site in drawn.observed]
            sizes = map(_numel, (*drawn.guide_sites.values(), *drawn.model_sites.values()))
            survey = Survey(
                nesting,
                vectorized=False,
                width=max(widest.numel, *sizes) // n,
                dim=sum(site["value"].numel() for site in observed) // (n * steps),
                supports={
                    key: (site["name"], site["fn"].support)
                    for key, value in two.items()
                    for site in observed
                    if site["value"].data_ptr() == value.data_ptr()
                    and site["value"].shape == value.shape
                    and is_fixed(site["fn"].support)
                },
                label=Label.of(drawn.guide_sites[program.label]) if program.label in drawn.latents else None,
            )
            survey.check_support(two, name)
            if bool(torch.isnan(drawn.log_weights).any()):
                raise FloatingPointError(f"Expected finite log-weights; got NaN: {drawn.first_bad()}")
            with pyro.validation_enabled(True):
                read(program, traced(program, two), 1, n, nesting).check_support()
                # at two lengths, lest a network take data for features where there are as many of them
                vectorized = all(_broadcasts(program, rows, nesting) for rows in (two, three))
        return replace(survey, vectorized=vectorized)

    def check_support(self, batch: Batch, name: str) -> None:
        """Raises ValueError where data lie outside the support of the site that observes them."""
        for key, (site, support) in self.supports.items():
            check_support(f"{name}[{key!r}]", batch[key], site, support)


class Enumerated:
    """K draws for each of N data and each of C classes of a label, over which the classes are summed.

    What `Draw` has, marginalised: with z_c the latents drawn for class y_c, and without sampling a class (those that
    the guide draws before the label are the same for all classes),

        log w = log sum_c p(x, y_c, z_c) / q(z_c | x, y_c),  an unbiased estimate of p(x);
        log p(x | z) and KL are the expectations under q(y | x), whose difference is the ELBO with q(y | x).

    Args:
        drawn: of C N data, class by class, the label fixed.
        label: its name.
        num_classes: C.
    """

    def __init__(self, drawn: Draw, label: str, num_classes: int):
        self.drawn, self.label, self.num_classes = drawn, label, num_classes
        self.log_q = self._split(drawn.guide[label])
        rest = replace(drawn, guide=without(label, drawn.guide))
        # log p(x, y_c, z_c) - log q(z_c | x, y_c), (K, C, N)
        self.log_joint = self._split(rest.log_weights)
        self.check_support, self.supported, self.first_bad = drawn.check_support, drawn.supported, drawn.first_bad

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (self.num_classes, -1))

    def _expected(self, values: Tensor) -> Tensor:
        """E_q(y | x) of values for each class, also where a class is impossible."""
        q = self.log_q.exp()
        return (q * torch.where(q > 0, self._split(values), torch.zeros_like(q))).sum(1)

    @property
    def log_weights(self) -> Tensor:
        """log sum_c p(x, y_c, z_c) / q(z_c | x, y_c), `(K, N)`."""
        return self.log_joint.logsumexp(1)

    @property
    def log_px_z(self) -> Tensor:
        """E_q(y | x) of log p(x | y, z), `(K, N)`."""
        return self._expected(self.drawn.log_px_z)

    @property
    def kl(self) -> Tensor:
        """E_q(y | x) of log q(y, z | x) - log p(y, z), `(K, N)`."""
        return self._expected(self.drawn.kl)

    def posterior_means(self) -> dict[str, Tensor]:
        """E_q[z | x] of each of the guide's sites but the label, `(N, D)`."""
        q = self.log_q.exp().mean(0).unsqueeze(-1)
        means = without(self.label, self.drawn.posterior_means())
        return {name: (q * mean.unflatten(0, (self.num_classes, -1))).sum(0) for name, mean in means.items()}


def draw(program: LatentModel, batch: Batch, num_particles: int, survey: Survey) -> Draw | Enumerated:
    """Run guide and model once, K particles at a time; the caller has entered the program's scope.

    Raises:
        ValueError: where latents of model and guide differ, or a site lies outside the plate over the data.
    """
    label = survey.label
    if label is None:
        return _draw(program, batch, num_particles, survey)
    classes, n = len(label.values), num_rows(batch)
    values = label.values.repeat_interleave(n, 0)
    if num_particles > 1 and not survey.vectorized:
        values = _repeated(values, num_particles)
    with Shared(label.name, program.plate_name, classes, n), Fixed(label.name, values):
        drawn = _draw(program, {k: _repeated(v, classes) for k, v in batch.items()}, num_particles, survey)
    return Enumerated(drawn, label.name, classes)


def _draw(program: LatentModel, batch: Batch, num_particles: int, survey: Survey) -> Draw:
    n = num_rows(batch)
    if num_particles == 1:
        return read(program, traced(program, batch), 1, n, survey.nesting)
    if survey.vectorized:
        traces = traced(program, batch, num_particles, survey.nesting)
        return read(program, traces, num_particles, n, survey.nesting + 1)
    rows = {key: _repeated(value, num_particles) for key, value in batch.items()}
    return read(program, traced(program, rows), num_particles, n, survey.nesting)


def _repeated(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *[1] * (value.dim() - 1))


def _run_on(program: LatentModel, rows: Batch) -> Traces:
    """Run on a few rows; an error names that as its cause."""
    try:
        return traced(program, rows)
    except RuntimeError as error:
        raise ValueError(
            "Expected a program that runs on any number of data; it ran on more, and on "
            f"{num_rows(rows)} it fails: {str(error).splitlines()[0]}"
        ) from error


def _numel(site: Any) -> int:
    """How many numbers the density of a site's value takes at once: of a mixture, those of all components."""
    mixed = getattr(site["fn"], "component_distribution", None)
    return site["value"].numel() if mixed is None else mixed.batch_shape.numel() * mixed.event_shape.numel()


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


def _nesting(traces: Traces) -> int:
    return max(
        (-dim for trace in traces for site in sample_sites(trace).values() for dim in plate_dims(site)), default=1
    )


def _broadcasts(program: LatentModel, batch: Batch, nesting: int) -> bool:
    n = num_rows(batch)
    try:
        traces = traced(program, batch, 2, nesting)
        together = read(program, traces, 2, n, nesting + 1)
    except Exception:  # a network that does not broadcast says so in many ways, and each datum is repeated instead
        return False
    for k in range(2):
        alone = read(program, traced(program, batch, latents=_particle(traces[0], k, nesting)), 1, n, nesting)
        if not torch.allclose(together.log_weights[k], alone.log_weights[0], rtol=1e-4, atol=1e-4, equal_nan=True):
            return False
    return True


def _particle(guide_trace: poutine.Trace, k: int, nesting: int) -> poutine.Trace:
    """The guide's trace with the k-th particle alone, its values shaped as if there had been no others."""
    particle = poutine.Trace()
    for name, site in sample_sites(guide_trace).items():
        plates = max((-dim for dim in plate_dims(site) if dim != -nesting - 1), default=0)
        value = site["value"][k]
        value = value.reshape(value.shape[value.dim() - site["fn"].event_dim - plates :])
        particle.add_node(name, name=name, type="sample", value=value, is_observed=False, infer=site["infer"])
    return particle
