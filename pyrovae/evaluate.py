"""What a program's log-likelihood is, and how far that can be trusted."""

import math
from array import array
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.batches import Data, as_data, num_rows
from pyrovae.clustering import Clustering, agreement, check_classes
from pyrovae.compiled import Compile
from pyrovae.conditionals.conditional import networks_in
from pyrovae.draws import Plan, Weights
from pyrovae.noise import draw_seed
from pyrovae.processes import Processes
from pyrovae.program import LatentModel, device_of
from pyrovae.sequences import are_sequences
from pyrovae.traces import check_arguments
from pyrovae.weights import WeightSums, error_of_mean

K_HAT_LIMIT = 0.7
STATISTICS = {"log_px": "log_mean", "elbo": "elbo", "standard_error": "standard_error", "ess": "ess", "k_hat": "k_hat"}
ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class Evaluation:
    """Importance-sampled log-likelihood of N data, with what tells whether to trust it.

    Attributes:
        log_px: log (1/K) sum_k w_k, `(N,)`, nats: a lower bound on log p(x) in expectation.
        elbo: mean_k log w_k, `(N,)`, nats.
        standard_error: of log_px by the delta method, sqrt(1/ESS - 1/K), `(N,)`; NaN for one particle, which
            cannot tell.
        ess: effective sample size (sum w)^2 / sum w^2, `(N,)`, between 1 and K.
        k_hat: Pareto shape of the largest weights, `(N,)`. Above 0.7 neither log_px nor its error can be trusted.
            0 where all weights are equal; NaN below 21 particles, or where ties leave no tail to fit.
        num_particles: K.
        dim: number of observed values in a datum; of sequences, in a step.
        active_units: for each latent site, the number of units whose posterior mean varies over the data with a
            variance above 0.01 (Burda et al. 2016). Where a guide draws a layer given the one above, its mean moves
            with that one too, so that all of its units may count. Latents that are sequences are left out.
        clustering: how well the likeliest clusters agree with the classes, where these were given.
        num_steps: `(N,)`, the lengths of data that are sequences.
    """

    log_px: Tensor
    elbo: Tensor
    standard_error: Tensor
    ess: Tensor
    k_hat: Tensor
    num_particles: int
    dim: int
    active_units: dict[str, int]
    clustering: Clustering | None = None
    num_steps: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        """Means over the data, each with its standard error over the data; nats, per datum.

        `log_px_sampling_error` is the part of `log_px_error` that more particles would remove. The share of k-hat
        above 0.7 is that among the data whose k-hat is known; NaN for too few particles. Where there is a clustering,
        its `accuracy`, `nmi` and `ari`. Of sequences also `log_px_per_step` and `elbo_per_step`, the totals of all data
        over their steps, as are then the bits per dim.
        """
        bits, bits_error = self._per_value(self.log_px)
        known = self.k_hat[~self.k_hat.isnan()]
        return (
            {
                "num_data": len(self.log_px),
                "num_particles": self.num_particles,
                "log_px": self.log_px.mean().item(),
                "log_px_error": error_of_mean(self.log_px),
                "log_px_sampling_error": (self.standard_error**2).sum().sqrt().item() / len(self.log_px),
                "elbo": self.elbo.mean().item(),
                "elbo_error": error_of_mean(self.elbo),
                "bits_per_dim": bits,
                "bits_per_dim_error": bits_error,
                "ess": self.ess.mean().item(),
                "k_hat_above_0.7": (known > K_HAT_LIMIT).double().mean().item(),
                "active_units": dict(self.active_units),
            }
            | ({} if self.clustering is None else asdict(self.clustering))
            | self._per_step()
        )

    def _per_value(self, log_px: Tensor) -> tuple[float, float]:
        """Bits for each observed value, and their standard error."""
        mean, error = self._ratio(log_px)
        return -mean / (self.dim * math.log(2)), error / (self.dim * math.log(2))

    def _ratio(self, values: Tensor) -> tuple[float, float]:
        """The total of values over that of steps, and its standard error by the delta method."""
        if self.num_steps is None:
            return values.mean().item(), error_of_mean(values)
        steps = self.num_steps.to(values)
        ratio = values.sum() / steps.sum()
        return ratio.item(), error_of_mean(values - ratio * steps) / steps.mean().item()

    def _per_step(self) -> dict[str, float]:
        if self.num_steps is None:
            return {}
        log_px, elbo = self._ratio(self.log_px), self._ratio(self.elbo)
        names = "log_px_per_step", "log_px_per_step_error", "elbo_per_step", "elbo_per_step_error"
        return dict(zip(names, (*log_px, *elbo), strict=True))

    def __str__(self) -> str:
        s = self.summary()
        units = ", ".join(f"{count} in {site!r}" for site, count in s["active_units"].items())
        lines = [
            f"log p(x)      {s['log_px']:10.3f} ± {s['log_px_error']:.3f} nats per datum "
            f"({s['num_data']} data, K = {s['num_particles']}, sampling error {s['log_px_sampling_error']:.3f})",
            f"ELBO          {s['elbo']:10.3f} ± {s['elbo_error']:.3f} nats per datum",
            f"bits per dim  {s['bits_per_dim']:10.4f} ± {s['bits_per_dim_error']:.4f}",
            f"mean ESS      {s['ess']:10.1f}; k-hat above {K_HAT_LIMIT} for {s['k_hat_above_0.7']:.1%} of the data",
        ]
        if self.num_steps is not None:
            lines.append(
                f"per time step {s['log_px_per_step']:10.4f} ± {s['log_px_per_step_error']:.4f} nats, "
                f"ELBO {s['elbo_per_step']:.4f} ± {s['elbo_per_step_error']:.4f}"
            )
        if units:
            lines.append(f"active units  {units}")
        if self.clustering is not None:
            lines.append(f"clusters      accuracy {s['accuracy']:.2%}, NMI {s['nmi']:.4f}, ARI {s['ari']:.4f}")
        return "\n".join(lines)


def evaluate(
    program: LatentModel,
    data: Any,
    num_particles: int = 5000,
    *,
    classes: Tensor | None = None,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    devices: int | None = None,
    precision: str = "32-true",
    compile: Compile = False,
    progress: bool = True,
) -> Evaluation:
    """Importance-sampled log p(x) of each datum, its standard error and its diagnostics.

        log p_K(x) = log (1/K) sum_k w_k,   w_k = p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Weights are formed for each datum and summed as they come, so memory is bounded whatever K; with the data of a
    `DataLoader`, of which two minibatches are held at most, it grows by what is returned, 48 bytes for each. Runs
    without gradients and in eval mode, on the program's device; the mode and, with a seed, torch's random state are
    restored after.

    Args:
        program: a `LatentModel`.
        data: a tensor `(N, D)`, a batch, a `Data` or a torch `DataLoader`.
        num_particles: K; exactly as many are drawn.
        classes: the data's true classes `(N,)`, integers that training has not seen: the clusters of a program with a
            label, the likeliest under `program.predict`, are scored against them.
        batch_size: data at once; None chooses by memory.
        chunk_size: particles at once; None chooses by memory. Neither size enters the result, except through the
            order in which random numbers are drawn.
        seed: of the draws; None draws one from torch's present random state.
        devices: processes that share the data, as for `fit`; each has all results at the end. Those of an iterable
            data set, of which each process reads its own, come process by process. Every number is the one that a
            single process gets.
        precision: 32-true (as the program's parameters are) or bf16-mixed (the networks of all Conditionals in
            bfloat16; densities, weights and sums stay).
        compile: compile the program, in seconds; it pays from thousands of data on. "auto" goes on uncompiled, with a
            warning, where the program or the machine does not allow it.
        progress: show a progress bar.

    Raises:
        CompileError: where `compile` is True and the program cannot be compiled, or there is no C++ compiler.
        ValueError: for bad data, sizes below 1, data outside the support of the likelihood, latents of model
            and guide that do not fit, or classes that are not one integer for each datum, or given with a program
            without a label or data that show it.
        FloatingPointError: where a weight is NaN or infinite, naming the datum and the site.
        ConnectionError: where another process has failed or was killed.

    Source:
        Kingma and Welling (2019), section 2.6; Burda et al. (2016); for k-hat, Vehtari et al. (2024).

    Example:
        >>> from pyrovae import LinearGaussian, evaluate
        >>> program, x = LinearGaussian(5, 2), torch.zeros(3, 5)
        >>> result = evaluate(program, x, num_particles=10, progress=False)
        >>> torch.allclose(result.log_px, program.log_prob(x).double())
        True
    """
    check_arguments(program, num_particles)
    data = as_data(data)
    processes = Processes.start(device_of(program) or torch.device("cpu"), devices)
    seed = processes.seed() if seed is None else seed
    with program.inference(seed), pyro.validation_enabled(False), networks_in(precision):
        held = data.tensors if isinstance(data, Data) else None
        processes.check_same(program=program.state_dict(), seed=seed, data=held)
        plan = processes.together(
            lambda: Plan.of(program, data, num_particles, batch_size, chunk_size, compile, processes)
        )
        if classes is not None:
            _check_clusters(program, plan, classes)
        found = processes.gather(lambda: _measured(program, plan, classes is not None, progress))
    tables = [table for table, _ in found if table]
    whole = {name: torch.cat([torch.frombuffer(t[name], dtype=torch.float64) for t in tables]) for name in tables[0]}
    if not plan.sharded:
        order = whole["datum"].argsort()
        whole = {name: values[order] for name, values in whole.items()}
    return Evaluation(
        **{name: whole[name] for name in STATISTICS},
        num_particles=num_particles,
        dim=plan.draws.survey.dim,
        num_steps=whole["length"].long() if "length" in whole else None,
        active_units=_ActiveUnits.of_all([units for _, units in found]).count(),
        clustering=None if classes is None else agreement(whole["cluster"].long(), classes),
    )


def _measured(
    program: LatentModel, plan: Plan, with_clusters: bool, progress: bool
) -> "tuple[dict[str, array[float]], _ActiveUnits]":
    """Columns with a number for each of this process's data; and what tells which units are active."""
    table, units = defaultdict(lambda: array("d")), _ActiveUnits()
    for first, part in plan.parts(f"log p(x), K = {plan.num_particles}", progress):
        sums = WeightSums(plan.num_particles)
        for weights in plan.weights(first, part):
            sums.add(weights.log_weights, weights.elbo)
            units.add(weights)
        units.end_of_chunk()
        columns = {name: getattr(sums, method)().tolist() for name, method in STATISTICS.items()}
        columns["datum"] = range(first, first + num_rows(part))
        if with_clusters:
            columns["cluster"] = program.predict(part).argmax(1).tolist()
        if are_sequences(part):
            columns["length"] = part["lengths"].tolist()
        for name, values in columns.items():
            table[name].extend(values)
    return dict(table), units


def _check_clusters(program: LatentModel, plan: Plan, classes: Tensor) -> None:
    """Raises ValueError where a program has no clusters, or the classes do not fit the data."""
    check_classes(classes)
    _check_label(program, plan, " with classes")
    if plan.num_data not in (None, len(classes)):
        raise ValueError(f"Expected classes of {plan.num_data} data; got {len(classes)}")


def _check_label(program: LatentModel, plan: Plan, purpose: str = "") -> None:
    """Raises ValueError for a program without a label, or data that show it."""
    if plan.draws.survey.label is None:
        raise ValueError(
            f"Expected a program with a label {program.label!r}, and data that do not show it{purpose}; "
            f"got {type(program).__name__}"
        )


class _ActiveUnits:
    """Variance over the data of each unit's posterior mean, from sums."""

    def __init__(self) -> None:
        self.num_data = 0
        self.sums: dict[str, Tensor] = {}  # over the data, (2, D): of means and of their squares
        self.chunk: dict[str, Tensor] = {}  # over the particles, (n, D), of one chunk of data
        self.particles = 0

    def add(self, weights: Weights) -> None:
        k = len(weights.log_weights)
        for name, mean in weights.means.items():
            self.chunk[name] = self.chunk.get(name, 0) + k * mean.double()
        self.particles += k

    def end_of_chunk(self) -> None:
        for name, total in self.chunk.items():
            mean = total / self.particles
            self.sums[name] = self.sums.get(name, 0) + torch.stack([mean.sum(0), (mean**2).sum(0)])
        self.num_data += len(next(iter(self.chunk.values()), ()))
        self.chunk, self.particles = {}, 0

    @staticmethod
    def of_all(parts: list["_ActiveUnits"]) -> "_ActiveUnits":
        """The sums of several processes together."""
        total = _ActiveUnits()
        for part in parts:
            total.num_data += part.num_data
            for name, sums in part.sums.items():
                total.sums[name] = total.sums.get(name, 0) + sums.cpu()
        return total

    def count(self) -> dict[str, int]:
        counts = {}
        for name, sums in self.sums.items():
            mean, square = sums / self.num_data
            if not bool(mean.isnan().all()):  # a class has no mean
                counts[name] = int((square - mean**2 > ACTIVE_VARIANCE).sum())
        return counts


def classify(
    program: LatentModel,
    data: Any,
    num_particles: int = 100,
    *,
    seed: int | None = None,
    precision: str = "32-true",
    compile: Compile = False,
    progress: bool = True,
) -> Tensor:
    """p(y | x), the generative model's probability of each class, from importance weights over every class.

        p(y | x) = p(x, y) / sum_y' p(x, y'),  p(x, y) = (1/K) sum_k p(x, y, z_k) / q(z_k | x, y)

    It does not use q(y | x), which `program.predict(x)` gives, and so is a check on it.

    Args:
        program: a `LatentModel` with a label.
        data: as for `evaluate`, without labels.
        num_particles: K, for each class.
        seed, precision, compile, progress: as for `evaluate`.

    Returns:
        `(N, C)`, float64.

    Raises:
        ValueError: for a program without a label, or data that show it.

    Source:
        Kingma et al. (2014), eq. 2; Burda et al. (2016), eq. 8.

    Example:
        >>> from pyrovae import SemiSupervisedVAE, classify
        >>> classify(SemiSupervisedVAE.mlp(64, 10, 2, (5,)), torch.zeros(3, 64), progress=False).shape
        torch.Size([3, 10])
    """
    check_arguments(program, num_particles)
    found = []
    seed = draw_seed() if seed is None else seed
    with program.inference(seed), pyro.validation_enabled(False), networks_in(precision):
        plan = Plan.of(program, data, num_particles, compile=compile)
        _check_label(program, plan)
        for first, part in plan.parts(f"p(y | x), K = {num_particles}", progress):
            chunks = [weights.log_joint for weights in plan.weights(first, part)]
            found.append(torch.stack([chunk.double() for chunk in chunks if chunk is not None]).logsumexp(0))
    return torch.cat(found, 1).softmax(0).T
