"""Latents of each datum, in unconstrained space, and a guide that has parameters of its own for each datum."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from pyrovae.arguments import check_seed, check_whole
from pyrovae.batches import Batch, Data, as_data, num_rows
from pyrovae.conditionals.density import LogScaleNormal
from pyrovae.labels import without
from pyrovae.noise import forked
from pyrovae.program import LatentModel, check_keys, device_of, told
from pyrovae.survey import Survey
from pyrovae.traces import check_arguments, sample_sites, site_log_prob

FIRST = 1000  # data, at most, on which a model runs to tell its latents
INITIAL_SIGMA = 0.1  # of q(u), as Pyro's AutoNormal begins


@dataclass(frozen=True)
class Latent:
    """A latent site of a model, z = t(u) with u unconstrained.

    Attributes:
        name: of the site.
        transform: t.
        shape: of one datum's u; where the site has plates beside that of the data, their sizes come first.
        axis: of the data in u as the site has it.
        event_dim: dimensions of u, at the right, that are no plates.
        frames: the plates of the site, each with name, size and dim.
    """

    name: str
    transform: Any
    shape: tuple[int, ...]
    axis: int
    event_dim: int
    frames: tuple[Any, ...]

    def as_site(self, u: Tensor) -> Tensor:
        """u `(N, *shape)` as the site has it, with its plates in their order."""
        return u.movedim(0, self.axis)

    def constrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z = t(u), as the site has it, and log |det dz/du| summed over all data, `()`, for u `(N, *shape)`."""
        u = self.as_site(u)
        z = self.transform(u)
        return z, self.transform.log_abs_det_jacobian(u, z).sum()

    def unconstrained(self, z: Tensor) -> Tensor:
        """u `(N, *shape)` of values z as the site has them."""
        return self.transform.inv(z).movedim(self.axis, 0)


def latents_of(program: LatentModel, batch: Batch) -> list[Latent]:
    """The latents of a program's model, by running it twice: on the first datum, and on the first 1000.

    Raises:
        ValueError: for arguments that do not fit, a model without latents, one that is discrete, outside the plate over
            the data, or whose support is not the same for all data and values of other latents.
    """
    check_keys(batch, program.model)
    with forked(), program.inference(), told(batch), pyro.validation_enabled(False):
        one, many = (_latent_sites(program, {k: v[:n] for k, v in batch.items()}) for n in (1, FIRST))
    if not one:
        raise ValueError(f"Expected a program with latents; got {type(program).__name__}, whose model has none")
    return [_latent(program, one[name], many[name]) for name in one]


def _latent_sites(program: LatentModel, batch: Batch) -> dict[str, Any]:
    sites = sample_sites(poutine.trace(program.model).get_trace(**batch))
    return {name: site for name, site in sites.items() if not site["is_observed"]}


def _latent(program: LatentModel, one: Any, many: Any) -> Latent:
    name, fn, z = one["name"], one["fn"], one["value"]
    if fn.has_enumerate_support or not z.is_floating_point() or fn.support.is_discrete:
        raise ValueError(f"Expected continuous latents; got site {name!r}, {type(fn).__name__}, which is discrete")
    frames = tuple(frame for frame in one["cond_indep_stack"] if frame.vectorized)
    data = next((frame for frame in frames if frame.name == program.plate_name), None)
    if data is None:
        raise ValueError(f"Expected site {name!r} inside the plate {program.plate_name!r} over the data; it is outside")
    try:
        transform: Any = biject_to(fn.support)
    except NotImplementedError:
        raise ValueError(
            f"Expected latents whose support numbers without bounds map to; got site {name!r}, {type(fn).__name__}"
        ) from None
    u = transform.inv(z)
    again = transform.inv(many["value"])
    if not torch.allclose(again, biject_to(many["fn"].support).inv(many["value"]), equal_nan=True):
        raise ValueError(f"Expected latents whose support is the same for all data; got site {name!r}, {fn.support}")
    batch_dims = z.dim() - fn.event_dim
    axis = batch_dims + data.dim
    real = torch.equal(u, z) and u.shape == z.shape
    shape = tuple(size for i, size in enumerate(u.shape) if i != axis)
    return Latent(name, identity_transform if real else transform, shape, axis, u.dim() - batch_dims, frames)


def log_joint(program: LatentModel, batch: Batch, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z) `(N,)` of each datum, unscaled and masked, z being these values; the caller has entered the scope.

    Raises:
        ValueError: where a site lies outside the plate over the data, or its shape does not carry it.
    """
    trace = poutine.trace(poutine.condition(program.model, data=values)).get_trace(**batch)
    sites = sample_sites(trace)
    nesting = max(-frame.dim for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized)
    return torch.stack([site_log_prob(program, site, 1, num_rows(batch), nesting)[0] for site in sites.values()]).sum(0)


def indexed(data: Any) -> Data:
    """The same data with each datum's number, `index` `(N,)`, beside its values, as a `LocalGuide` asks for.

    Args:
        data: a tensor, a pair, a dict of tensors or a `Data`; `index` is kept where it is there.

    Raises:
        ValueError: for data that are not in memory, as a DataLoader's.

    Example:
        >>> indexed(torch.zeros(3, 2))["index"]
        tensor([0, 1, 2])
    """
    data = as_data(data)
    if not isinstance(data, Data):
        raise ValueError(f"Expected data in memory, as tensors or a Data; got a {type(data).__name__}")
    if "index" in data.tensors:
        index = data["index"]
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"Expected index to be whole numbers (N,); got {index.dtype} {tuple(index.shape)}")
        return data
    first = next(iter(data.tensors.values()))
    index = torch.arange(len(data), device=first.device)
    return Data({**data.tensors, "index": index}, dynamic=data.dynamic, show=data.show, check=False)


class LocalGuide(LatentModel):
    """A program's model with a guide that has parameters of its own for each datum, and no network.

        q(z | x_i) = N(u; mu_i, diag(sigma_i^2)) |du/dz|,   z = t(u)

    for each latent site on its own, t the map from unconstrained space that Pyro's AutoNormal takes. Its batches have
    `index`, the number of each datum (`indexed`), beside the arguments of the model. The model's parameters are shared
    with the program, not copied; the program's own guide is not used.

    Args:
        program: whose model it is.
        latents: of the model, by `latents_of`.
        num_data: N, rows of the tables.

    Attributes:
        mu, log_sigma: for each latent a table `(N, D)`, D the size of u; they begin at 0 and log 0.1.

    Raises:
        ValueError: for what is not a `LatentModel`, or num_data < 1; in `of`, as `latents_of`.

    Source:
        Kingma and Welling (2019), appendix A.2; for t, Kucukelbir et al. (2017), section 2.3.

    Example:
        >>> from pyrovae import VAE, evaluate
        >>> x = torch.ones(3, 6)
        >>> local = LocalGuide.of(VAE.mlp(6, 2), x)
        >>> evaluate(local, indexed(x), num_particles=5, progress=False).log_px.shape
        torch.Size([3])
    """

    def __init__(self, program: LatentModel, latents: list[Latent], num_data: int):
        check_arguments(program)
        check_whole(num_data=num_data)
        super().__init__()
        self.program, self.latents, self.num_data = program, latents, num_data
        self.plate_name, self.label = program.plate_name, program.label
        like = next(program.parameters(), torch.zeros(()))
        self.mu, self.log_sigma = (
            nn.ModuleList(_table(num_data, math.prod(latent.shape), value, like) for latent in latents)
            for value in (0.0, math.log(INITIAL_SIGMA))
        )

    @classmethod
    def of(cls, program: LatentModel, data: Any) -> Self:
        """A guide for these data, whose latents are found in the program's model; not trained."""
        check_arguments(program)
        data = indexed(data)
        first = next(data.to(device_of(program)).batches(FIRST))
        return cls(program, latents_of(program, without("index", first)), len(data))

    def scope(self) -> AbstractContextManager[None]:
        """The program's own, for what `pyro.param` makes in its model is its."""
        return self.program.scope()

    def model(self, index: Tensor | None = None, **batch: Tensor) -> Any:
        """p(x, z), the program's."""
        return self.program.model(**batch)

    def guide(self, index: Tensor, **batch: Tensor) -> None:
        """q(z | x_i) for each i in index `(N,)`."""
        frames = {frame.name: frame for latent in self.latents for frame in latent.frames}
        sizes = {name: frame.size for name, frame in frames.items()} | {self.plate_name: len(index)}
        plates = {name: pyro.plate(name, sizes[name], dim=frame.dim) for name, frame in frames.items()}
        for latent, *tables in zip(self.latents, self.mu, self.log_sigma, strict=True):
            mu, log_sigma = (latent.as_site(table(index).reshape(len(index), *latent.shape)) for table in tables)
            q: Any = LogScaleNormal(mu, log_sigma).to_event(latent.event_dim)
            if latent.transform != identity_transform:
                q = dist.TransformedDistribution(q, [latent.transform])
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame.name])
                pyro.sample(latent.name, q)

    @torch.no_grad()
    def start(self, batch: Batch, draws: int) -> None:
        """Put each mean of a batch at the draw from p(z), of so many, that has the largest p(x, z)."""
        index, batch = batch["index"], without("index", batch)
        best = torch.full(index.shape, -math.inf, device=index.device)
        for _ in range(draws):
            values = {name: site["value"] for name, site in _latent_sites(self.program, batch).items()}
            found = log_joint(self.program, batch, values)
            better = found > best
            best = torch.where(better, found, best)
            for latent, table in zip(self.latents, self.mu, strict=True):
                u = latent.unconstrained(values[latent.name]).reshape(len(index), -1)
                table.get_parameter("weight")[index[better]] = u[better]

    @contextmanager
    def sparse(self) -> Iterator[list[nn.Parameter]]:
        """The tables, with sparse gradients inside, so that `torch.optim.SparseAdam` moves a batch's rows alone."""
        tables: list[Any] = [*self.mu, *self.log_sigma]
        try:
            for table in tables:
                table.sparse = True
            yield [table.weight for table in tables]
        finally:
            for table in tables:
                table.sparse = False


def _table(num_data: int, dim: int, value: float, like: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(like.new_full((num_data, dim), value), freeze=False)


@contextmanager
def running(program: LatentModel, seed: int | None) -> Iterator[None]:
    """Run in the program's scope, without Pyro's validation; its modes and, with a seed, torch's state are restored."""
    with ExitStack() as stack:
        if seed is not None:
            check_seed(seed)
            stack.enter_context(forked(seed))
        for context in (pyro.validation_enabled(False), program.scope(), program.modes_kept()):
            stack.enter_context(context)
        yield


def prepared(local: LocalGuide, data: Any, name: str) -> Data:
    """Numbered data on the program's device, looked through as `fit` does.

    Raises:
        ValueError: for data that do not fit the program, or that are another number than its guide has.
    """
    data = indexed(data).to(device_of(local.program))
    if len(data) != local.num_data:
        raise ValueError(f"Expected {name} to be the {local.num_data} data that the guide is for; got {len(data)}")
    if not bool(((data["index"] >= 0) & (data["index"] < local.num_data)).all()):
        raise ValueError(f"Expected index in {name} from 0 to {local.num_data - 1}; got others")
    with forked():
        survey = Survey.of(local, next(data.batches(FIRST)), name)
    if data.fixed:
        survey.check_support(data.tensors, name)
    return data
