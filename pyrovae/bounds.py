"""Bounds beside Pyro's own: the importance-weighted one, an ELBO whose gradient has less noise, and free bits."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.traceenum_elbo import _get_common_scale
from torch import Tensor
from torch.distributions import Independent
from torch.distributions.utils import _sum_rightmost

from pyrovae.arguments import check_number, check_one_of, check_whole
from pyrovae.conditionals.density import logsumexp
from pyrovae.noise import forked
from pyrovae.traces import check_latents, sample_sites

Gradient = Literal["plain", "dreg"]
Program = Callable[..., Any]
_PARTICLES = "num_particles_vectorized"  # the name of the plate that Pyro's ELBO puts around a program


class _Traces:
    """A guide's trace, the model's run against it, and what they say of each datum: each cell of all sites' plates."""

    def __init__(self, guide: poutine.Trace, model: poutine.Trace, reparameterized: bool = True):
        self.guide_trace = guide
        self.guide, self.model = sample_sites(guide), sample_sites(model)
        self.latents = [name for name, site in self.model.items() if not site["is_observed"]]
        check_latents(self.latents, self.guide)
        self.sites = [*self.guide.values(), *self.model.values()]
        for name, site in self.guide.items():
            if reparameterized and not site["fn"].has_rsample:
                raise ValueError(
                    "Expected reparameterized latents for this bound; "
                    f"got {type(site['fn']).__name__} at site {name!r} of the guide"
                )
        frames = [{frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in self.sites]
        self.depth = max((-frame.dim for each in frames for frame in each), default=0)
        self.kept = {frame.dim for frame in set.intersection(*frames)}  # particles and data
        self.particles = next((f.dim for each in frames for f in each if f.name == _PARTICLES), None)

    def scale(self) -> Any:
        """That of all sites, as of subsampling."""
        try:
            return _get_common_scale([site["scale"] for site in self.sites])
        except ValueError:
            raise ValueError("Expected one scale for all sites under this bound; got different ones") from None

    def log_prob(self, site: Any) -> Tensor:
        """Unscaled and masked, `(K, *)`."""
        log_p = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return self.over_plates(log_p, site)

    def over_plates(self, terms: Tensor, site: Any) -> Tensor:
        """Terms of a site for each cell of its plates, summed over those that not all sites share: `(K, *)`."""
        terms = scale_and_mask(terms, mask=site["mask"])
        if terms.dim() > self.depth:
            raise ValueError(
                f"Expected the batch dimensions of site {site['name']!r} to be those of its plates; "
                f"got shape {tuple(terms.shape)}. Does it lack .to_event(1)?"
            )
        terms = terms.reshape([1] * (self.depth - terms.dim()) + list(terms.shape))
        others = [d for d in range(-self.depth, 0) if d not in self.kept]
        terms = terms.sum(others, keepdim=True) if others else terms
        return terms.unsqueeze(0) if self.particles is None else terms.movedim(self.particles, 0)

    def _sum(self, sites: Iterable[Any]) -> Tensor:
        return sum((self.log_prob(site) for site in sites), torch.zeros(()))

    def log_p(self) -> Tensor:
        """log p(x, z_k), `(K, *)`."""
        return self._sum(self.model.values())

    def log_px_z(self) -> Tensor:
        """log p(x | z_k), `(K, *)`."""
        return self._sum(site for name, site in self.model.items() if name not in self.latents)

    def log_q(self) -> Tensor:
        """log q(z_k | x), `(K, *)`."""
        return self._sum(self.guide.values())


class TracedELBO(ELBO):
    """What the bounds share: a loss for Pyro, minus a sum of bounds, from traces of K particles."""

    reparameterized = True  # whether latents must be

    def __init__(self, num_particles: int = 1, max_plate_nesting: float = math.inf, vectorize_particles: bool = True):
        check_whole(num_particles=num_particles)
        if not (isinstance(max_plate_nesting, float) and max_plate_nesting == math.inf):
            check_whole(0, max_plate_nesting=max_plate_nesting)
        super().__init__(
            num_particles=num_particles, max_plate_nesting=max_plate_nesting, vectorize_particles=vectorize_particles
        )

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> _Traces:
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args, **kwargs)
        return _Traces(trace, replayed, self.reparameterized)

    def _guess_max_plate_nesting(self, model: Program, guide: Program, args: Any, kwargs: Any) -> None:
        """By a first run, which draws its random numbers aside."""
        with forked(), poutine.block():
            traces = self._get_trace(model, guide, args, kwargs)
        self.max_plate_nesting = traces.depth + (self.vectorize_particles and self.num_particles > 1)

    def _minus_loss(self, traces: list[_Traces], again: Callable[[_Traces], _Traces]) -> Tensor:
        """From the particles' traces; `again` runs the program once more on latents that its parameters do not move."""
        raise NotImplementedError

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss `()`, to be differentiated once."""
        traces = list(self._get_traces(model, guide, args, kwargs))
        if self.vectorize_particles:
            model, guide = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)

        def again(traces: _Traces) -> _Traces:
            cut = traces.guide_trace.copy()
            nodes: Any = cut.nodes
            for name, site in traces.guide.items():
                nodes[name] = {**site, "value": site["value"].detach().requires_grad_()}
            return self._get_trace(model, poutine.replay(guide, trace=cut), args, kwargs)

        return -self._minus_loss(traces, again)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss alone."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; its gradients are added to those that the parameters have."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


def _without_score(
    traces: list[_Traces], again: Callable[[_Traces], _Traces], of_model: Tensor, of_guide: Tensor
) -> Tensor:
    """Zeros `(*)` whose gradient is sum_k a_k d log p(x, z_k) / d theta + b_k d log w_k / d z_k  d z_k / d phi.

    The latents are cut from the parameters that they were drawn with, and the program is run again on them, so that
    no way leads around z_k in d log w_k / d z_k. The coefficients a and b are `(K, *)`.
    """
    if not torch.is_grad_enabled():
        return torch.zeros(())
    total = torch.zeros(())
    rows = len(of_model) // len(traces)
    for drawn, a, b in zip(traces, of_model.split(rows), of_guide.split(rows), strict=True):
        fixed = again(drawn)
        log_p = fixed.log_p()
        leaves = [site["value"] for site in fixed.guide.values()]
        slopes = torch.autograd.grad((log_p - fixed.log_q()).sum(), leaves, retain_graph=True)
        total = total + _weighted(a, log_p - log_p.detach())
        for site, slope in zip(drawn.guide.values(), slopes, strict=True):
            moved = _sum_rightmost(slope * (site["value"] - site["value"].detach()), site["fn"].event_dim)
            total = total + _weighted(b, drawn.over_plates(moved, {**site, "mask": None}))
    return total


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """sum_k a_k t_k `(*)`, also where a draw of weight 0 has log p = -inf, and so terms that are no numbers."""
    return (weights * torch.where(weights == 0, torch.zeros_like(terms), terms)).sum(0)


def _log_w(traces: list[_Traces]) -> Tensor:
    return torch.cat([each.log_p() - each.log_q() for each in traces])


class IWAE_ELBO(TracedELBO):
    """The importance-weighted bound, for each datum:  E[ log (1/K) sum_k w_k ],  w_k = p(x, z_k) / q(z_k | x).

    It rises with K from the ELBO, K = 1, to log p(x). A datum is a cell of the plates that all sites share; scales,
    as of subsampling, stand outside the logarithm. Latents must be reparameterized.

    With K the plain gradient of the guide's parameters drowns in noise (Rainforth et al. 2018); the doubly
    reparameterized one, as unbiased, does not where the guide is near the posterior or wider:
    sum_k (w_k / sum_j w_j)^2  d log w_k / d z_k  d z_k / d phi.  It runs the program twice.

    Args:
        num_particles: K.
        gradient: `plain`, or `dreg`, doubly reparameterized.
        max_plate_nesting: dimensions that the program's own plates take; found by a first run where it is not given.
        vectorize_particles: run all particles together, for which the program must broadcast.

    Raises:
        ValueError: for K < 1 or another gradient; in a call, for latents that are not reparameterized, that model and
            guide do not share, or sites of different scales.

    Source:
        Burda et al. (2016), eq. 8; Tucker et al. (2019), eq. 7.

    Example:
        >>> from pyrovae import VAE
        >>> program = VAE.mlp(6, 2)
        >>> IWAE_ELBO(5, "dreg").differentiable_loss(program.model, program.guide, torch.zeros(3, 6)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 5,
        gradient: Gradient = "plain",
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        check_one_of(get_args(Gradient), gradient=gradient)
        self.gradient = gradient

    def _minus_loss(self, traces: list[_Traces], again: Callable[[_Traces], _Traces]) -> Tensor:
        log_w = _log_w(traces)
        bound = logsumexp(log_w, 0) - math.log(len(log_w))
        if self.gradient == "dreg":
            weights = torch.softmax(log_w.detach(), 0)
            bound = bound.detach() + _without_score(traces, again, weights, weights**2)
        return (traces[0].scale() * bound).sum()


class STL_ELBO(TracedELBO):
    """The ELBO, sticking the landing: the score of q, whose expectation is zero, is left out of the gradient.

        d ELBO / d phi = E[ d log w / d z  d z / d phi ]

    whose noise vanishes where q(z | x) is the true posterior. The value is that of `Trace_ELBO`. It runs the program
    twice; latents must be reparameterized.

    Args:
        num_particles: draws to average over.
        max_plate_nesting, vectorize_particles: as for `IWAE_ELBO`.

    Raises:
        ValueError: as `IWAE_ELBO`.

    Source:
        Roeder et al. (2017), eq. 8.

    Example:
        >>> from pyrovae import VAE
        >>> program = VAE.mlp(6, 2)
        >>> STL_ELBO().differentiable_loss(program.model, program.guide, torch.zeros(3, 6)).shape
        torch.Size([])
    """

    def _minus_loss(self, traces: list[_Traces], again: Callable[[_Traces], _Traces]) -> Tensor:
        log_w = _log_w(traces).detach()
        each = torch.full_like(log_w, 1 / len(log_w))
        return (traces[0].scale() * (log_w.mean(0) + _without_score(traces, again, each, each))).sum()


class FreeBits_ELBO(TracedELBO):
    """An ELBO in which a group of latents costs nothing below lambda nats:

        E_M[ E_q[log p(x | z)] ] - sum_j max(lambda, E_M[ KL(q(z_j | x) || p(z_j)) ])

    E_M is the mean over the minibatch, inside the maximum. The KL is estimated by the draws. The loss is the sum over
    the minibatch, as that of `Trace_ELBO`, which it equals for lambda = 0 where no estimate is negative.

    Args:
        nats: lambda.
        groups: of equally many neighbouring dimensions, at each latent site; more than one need log-densities that
            are sums over the dimensions, as a diagonal Gaussian's.
        num_particles, max_plate_nesting, vectorize_particles: as for `STL_ELBO`.

    Raises:
        ValueError: for lambda < 0, groups < 1; in a call, for groups that do not divide the latents or a site whose
            density is no product, and as `STL_ELBO`.

    Source:
        Kingma et al. (2016), eq. 15.

    Example:
        >>> from pyrovae import VAE
        >>> program = VAE.mlp(6, 4)
        >>> FreeBits_ELBO(0.5, groups=2).differentiable_loss(program.model, program.guide, torch.zeros(3, 6)).shape
        torch.Size([])
    """

    def __init__(
        self,
        nats: float,
        groups: int = 1,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        check_number(nats=nats)
        check_whole(groups=groups)
        self.nats, self.groups = nats, groups

    def _minus_loss(self, traces: list[_Traces], again: Callable[[_Traces], _Traces]) -> Tensor:
        first = traces[0]
        log_px_z = torch.cat([each.log_px_z() for each in traces]).mean(0)
        bound = log_px_z.mean()
        for name in first.latents:
            kl = torch.cat([self._kl(t, name) for t in traces], 1)
            bound = bound - kl.flatten(1).mean(1).clamp(min=self.nats).sum()
        return first.scale() * log_px_z.numel() * bound

    def _kl(self, traces: _Traces, name: str) -> Tensor:
        """One-draw estimates of each group's KL, `(groups, K, *)`."""
        q, p = (self._by_group(sites[name]) for sites in (traces.guide, traces.model))
        return torch.stack([traces.over_plates(term, traces.model[name]) for term in (q - p).unbind(-1)])

    def _by_group(self, site: Any) -> Tensor:
        """Log-probabilities `(*, groups)`."""
        fn, value, name = site["fn"], site["value"], site["name"]
        if self.groups == 1:
            return fn.log_prob(value).unsqueeze(-1)
        if not isinstance(fn, Independent) or len(fn.event_shape) != 1:
            raise ValueError(
                f"Expected a density that is a product over the dimensions of site {name!r} for groups={self.groups}; "
                f"got {type(fn).__name__}. With groups=1 any density serves"
            )
        if value.shape[-1] % self.groups:
            raise ValueError(
                f"Expected groups to divide the {value.shape[-1]} latents of site {name!r}; got {self.groups}"
            )
        return fn.base_dist.log_prob(value).unflatten(-1, (self.groups, -1)).sum(-1)


def check_bound(elbo: Any, kl_weight: Any, free_bits: Any, labeled: Any) -> None:
    """Raises ValueError for settings of `fit` that do not go together."""
    if free_bits is not None and (elbo is not None or labeled is not None or kl_weight != 1):
        other = "elbo" if elbo is not None else "labeled" if labeled is not None else "kl_weight"
        raise ValueError(f"Expected free_bits without {other}; got both")
    if isinstance(elbo, TracedELBO) and kl_weight != 1:
        raise ValueError(f"Expected kl_weight with an ELBO of Pyro's, as Trace_ELBO; got {type(elbo).__name__}")
    if isinstance(elbo, TracedELBO) and labeled is not None:
        raise ValueError(f"Expected an ELBO of Pyro's with labeled, as Trace_ELBO; got {type(elbo).__name__}")


def bound(free_bits: float | tuple[float, int] | None) -> ELBO:
    """`Trace_ELBO`, or the one with free bits."""
    if free_bits is None:
        return Trace_ELBO()
    if isinstance(free_bits, tuple) and len(free_bits) != 2:
        raise ValueError(f"Expected free_bits to be nats, or (nats, groups); got {free_bits!r}")
    return FreeBits_ELBO(*free_bits) if isinstance(free_bits, tuple) else FreeBits_ELBO(free_bits)
