"""Wake-sleep: a guide learned without a gradient through its draws, so that latents may be discrete."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyrovae.arguments import check_one_of
from pyrovae.bounds import Program, TracedELBO, _Traces
from pyrovae.traces import Cut, check_latents, sample_sites

Phase = Literal["sleep", "wake", "both"]


class WakeSleep_ELBO(TracedELBO):
    """Wake-sleep and reweighted wake-sleep: two objectives, one for the model and one for the guide.

    With z_k ~ q(z | x), cut from phi, and normalized weights v_k = w_k / sum_j w_j,  w_k = p(x, z_k) / q(z_k | x):

        model, awake    sum_k v_k d log p(x, z_k) / d theta
        guide, asleep   d log q(z | x) / d phi  at a dream (z, x) ~ p,  one for each datum of the minibatch
        guide, awake    sum_k v_k d log q(z_k | x) / d phi

    For K = 1, asleep, it is the Helmholtz machine's wake-sleep. No gradient passes through a draw, so latents may be
    discrete. The value is minus the bound of `IWAE_ELBO`; its gradient is not that of the value.

    Where it comes to rest: for the model, the awake step is that of the bound L_K, exact maximum likelihood where q
    holds the posterior. The guide minimises KL(p(z | x) || q(z | x)), over dreams when asleep; over the data when
    awake, with the bias of K draws, O(1/K). Where q cannot hold the posterior, model and guide go by different
    objectives, and neither need fall. Beside that there is the noise of minibatches and draws, which falls with the
    learning rate.

    Model and guide must not share parameters, which would get the sum of both gradients.

    Args:
        num_particles: K.
        phi: when the guide learns: asleep (sleep), awake (wake; K of 2 at least, for one draw's weight is 1 and its
            gradient mere noise), or by the mean of the two gradients (both).
        max_plate_nesting, vectorize_particles: as for `IWAE_ELBO`.

    Raises:
        ValueError: for K < 1, another phase, or K = 1 awake; in a call, for latents that model and guide do not share,
            sites of different scales, and, asleep, for a model that observes what is none of its arguments.

    Source:
        Hinton, Dayan, Frey and Neal (1995); Bornschein and Bengio (2015), section 2. There a minibatch's awake and
        asleep steps are taken one after the other; here they are one step.

    Example:
        >>> from pyrovae import VAE, fit
        >>> program, x = VAE.mlp(6, 2), torch.ones(50, 6)
        >>> history = fit(program, x, elbo=WakeSleep_ELBO(5, "both"), epochs=1, progress=False)
    """

    reparameterized = False

    def __init__(
        self,
        num_particles: int = 1,
        phi: Phase = "sleep",
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        check_one_of(get_args(Phase), phi=phi)
        if phi != "sleep" and num_particles < 2:
            raise ValueError(f"Expected num_particles to be at least 2 with phi={phi!r}; got {num_particles}")
        self.phi = phi

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> _Traces:
        with Cut():
            return super()._get_trace(model, guide, args, kwargs)

    def _minus_loss(self, traces: list[_Traces], again: Callable[[_Traces], _Traces]) -> Tensor:
        log_p = torch.cat([each.log_p() for each in traces])
        log_q = torch.cat([each.log_q() for each in traces])
        log_w = (log_p - log_q).detach()
        weights = torch.softmax(log_w, 0)
        learned = log_p if self.phi == "sleep" else log_p + self._share * log_q
        bound = torch.logsumexp(log_w, 0) - math.log(len(log_w))
        return (traces[0].scale() * (bound + (weights * (learned - learned.detach())).sum(0))).sum()

    @property
    def _share(self) -> float:
        return 0.5 if self.phi == "both" else 1.0

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss `()`, whose gradient is that of both objectives; to be differentiated once."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if self.phi == "wake" or not torch.is_grad_enabled():
            return loss
        log_q = _of_dreams(model, guide, args, kwargs)
        return loss - self._share * (log_q - log_q.detach())


def _of_dreams(model: Program, guide: Program, args: Any, kwargs: Any) -> Tensor:
    """log q(z | x) at one draw (z, x) from the model for each datum, summed `()`."""
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    sites = sample_sites(dream)
    seen = {name: site for name, site in sites.items() if site["infer"].get("was_observed")}
    args = tuple(_dreamed(value, seen) for value in args)
    kwargs = {name: _dreamed(value, seen) for name, value in kwargs.items()}
    _check_arguments(seen, [*args, *kwargs.values()])
    trace = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*args, **kwargs)
    drawn = sample_sites(trace)
    check_latents([name for name in sites if name not in seen], drawn)
    if extra := sorted(drawn.keys() - sites.keys()):
        raise ValueError(f"Expected a guide whose latents a dream holds; got {', '.join(extra)}, which the model lacks")
    return torch.as_tensor(trace.log_prob_sum())


def _dreamed(value: Any, seen: dict[str, Any]) -> Any:
    """What the model dreams in the place of an argument that it observes; other arguments as they are."""
    return next((site["value"] for site in seen.values() if site["infer"]["obs"] is value), value)


def _check_arguments(seen: dict[str, Any], arguments: list[Any]) -> None:
    for name, site in seen.items():
        if not any(value is site["value"] for value in arguments):
            raise ValueError(
                f"Expected a model that observes its arguments as they are, so that they can be dreamed; got site "
                f"{name!r}, which observes something else. Awake (phi='wake') nothing is dreamed"
            )
