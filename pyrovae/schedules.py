"""The weight of the KL term in training, put upon a program from outside."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.arguments import check_number, check_whole, is_number

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Linear:
    """A KL weight that rises from `start` to 1 in `steps` steps and stays there (Sønderby et al. 2016).

    Args:
        steps: of the warm-up.
        start: weight of the first step.

    Raises:
        ValueError: for steps < 1 or a negative start.

    Example:
        >>> weight = Linear(100)
        >>> weight(0), weight(50), weight(1000)
        (0.0, 0.5, 1.0)
    """

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps)
        check_number(start=self.start)

    def __call__(self, step: int) -> float:
        """The weight of a step, counted from 0."""
        return self.start + (1 - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Cyclical:
    """A KL weight that rises from 0 to 1 again and again (Fu et al. 2019, eq. 6).

    Args:
        period: steps of a cycle.
        rising: part of each cycle in which it rises; 1 for the rest.

    Raises:
        ValueError: for a period < 1, or a part outside (0, 1).

    Example:
        >>> weight = Cyclical(100)
        >>> weight(0), weight(25), weight(80), weight(100)
        (0.0, 0.5, 1.0, 0.0)
    """

    period: int
    rising: float = 0.5

    def __post_init__(self) -> None:
        check_whole(period=self.period)
        if not is_number(self.rising) or not 0 < self.rising < 1:
            raise ValueError(f"Expected rising to be a number between 0 and 1; got {self.rising!r}")

    def __call__(self, step: int) -> float:
        """The weight of a step, counted from 0."""
        return min(1.0, step % self.period / (self.rising * self.period))


def check_kl_weight(kl_weight: float | Schedule, steps: int | None) -> None:
    """Raises ValueError for a weight that is no number of at least 0, or that `steps` steps end before it reaches 1."""
    if not callable(kl_weight):
        if not is_number(kl_weight) or not 0 <= kl_weight < math.inf:
            raise ValueError(
                f"Expected kl_weight to be a number of at least 0, or a function of the step; got {kl_weight!r}"
            )
        return
    if steps is None:
        raise ValueError(
            "Expected train of known length with a kl_weight that moves; got an iterable data set. "
            "data.in_epochs(train, steps=1000) gives its epochs a length"
        )
    largest = 0.0
    for step in range(steps):
        weight = kl_weight(step)
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"Expected kl_weight to give numbers of at least 0; got {weight!r} in step {step}")
        largest = max(largest, weight)
    if largest < 1:
        raise ValueError(
            f"Expected kl_weight to reach 1 within the {steps} steps of training, lest no ELBO be optimised; got "
            f"{largest:g} at most. Shorten the warm-up, or train longer"
        )


class _OnLatents(Messenger):
    """A handler that multiplies the scale of latent sites by a weight."""

    def __init__(self, weight: float | Tensor):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class WeightedELBO(ELBO):
    """E_q[log p(x | z)] - beta KL(q(z | x) || p(z)), whatever the ELBO and the program; beta is an argument.

    Args:
        elbo: an ELBO that heeds the scales of sites, as Pyro's do.
    """

    def __init__(self, elbo: Any):
        super().__init__()
        self.elbo = elbo
        self.parts = (elbo, *getattr(elbo, "parts", ()))

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], arguments: dict[str, Any], kl_weight: float
    ) -> Any:
        """The loss `()` at these arguments of the ELBO, to be differentiated."""

        def weighted(program: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: _OnLatents(kl_weight)(program)(*args, **kwargs)

        return self.elbo.differentiable_loss(weighted(model), weighted(guide), **arguments)

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the ELBO within draws its own traces")
