"""Distributions of whole sequences `(T, D)`, of unequal lengths: what lies beyond an end is zero and has no density."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals.conditional import Conditional, Distribution, check_conditionals
from pyrovae.conditionals.density import Density
from pyrovae.nets import BackwardRNN, _check_sizes
from pyrovae.sequences import step_mask


class _OrZeros(constraints.Constraint):
    """Vectors of another support, and the zero vector, with which sequences are padded."""

    event_dim = 1

    def __init__(self, base: Any):
        self.base_constraint = base if base.event_dim == 1 else constraints.independent(base, 1)

    def check(self, value: Tensor) -> Tensor:
        return self.base_constraint.check(value) | (value == 0).all(-1)


def _of_steps(support: Any) -> Any:
    """The support of sequences whose steps have this one."""
    return constraints.independent(_OrZeros(support), 1)


def _filled(value: Tensor, real: Tensor) -> Tensor:
    """Sequences with their first steps in the place of what lies beyond their ends: zeros need have no density."""
    return torch.where(real.unsqueeze(-1), value, value[..., :1, :])


def _ended(value: Tensor, real: Tensor) -> Tensor:
    """Sequences with zeros beyond their ends."""
    return torch.where(real.unsqueeze(-1), value, torch.zeros_like(value))


def _summed(log_p: Tensor, real: Tensor) -> Tensor:
    """Over the steps of each sequence."""
    return torch.where(real, log_p, torch.zeros_like(log_p)).sum(-1)


class Steps(Density):
    """p(x_1, ..., x_T) = prod_t p(x_t), t up to each sequence's length.

    Args:
        step: p(x_t), with batch shape `(*, T)` and event shape `(D,)`.
        lengths: `(*)`, each from 1 to T.

    Example:
        >>> import pyro.distributions as dist
        >>> p = Steps(dist.Normal(torch.zeros(2, 4, 3), 1.0).to_event(1), torch.tensor([4, 2]))
        >>> p.batch_shape, p.event_shape, p.sample()[1, 2:].abs().max().item()
        (torch.Size([2]), torch.Size([4, 3]), 0.0)
    """

    def __init__(self, step: Any, lengths: Tensor):
        self.step, self.lengths = step, lengths
        self.real = step_mask(lengths, step.batch_shape[-1])
        super().__init__(step.batch_shape[:-1], step.batch_shape[-1:] + step.event_shape)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of a step."""
        return self.step.has_rsample

    @property
    def support(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of a step, or zeros."""
        return _of_steps(self.step.support)

    @property
    def mean(self) -> Tensor:
        """E[x_t], zero beyond the ends."""
        return _ended(self.step.mean, self.real)

    def expanded(self, batch_shape: torch.Size) -> "Steps":
        """The same with another batch shape."""
        return Steps(self.step.expand(batch_shape + self.event_shape[:1]), self.lengths)

    def log_density(self, value: Tensor) -> Tensor:
        """sum_t log p(x_t)."""
        return _summed(self.step.log_prob(_filled(value, self.real)), self.real)

    def draw(self, shape: torch.Size) -> Tensor:
        """Draws of this shape before the batch shape."""
        return _ended(self.step.rsample(shape) if self.has_rsample else self.step.sample(shape), self.real)


class MarkovChain(Density):
    """p(z_1, ..., z_T) = p(z_1) prod_t p(z_t | z_{t-1}, c_t), t up to each sequence's length.

    The density of given values takes all steps at once; a draw goes from step to step, and its density is known then.

    Args:
        initial: p(z_1), with batch shape `*` and event shape `(D,)`.
        transition: z_{t-1} `(*, D)`, and c_t `(*, C)` where there is a context, to p(z_t | z_{t-1}, c_t).
        lengths: `(*)`, each from 1 to T.
        num_steps: T.
        context: c_2, ..., c_T, `(*, T - 1, C)`; none by default.

    Example:
        >>> import pyro.distributions as dist
        >>> def walk(z):
        ...     return dist.Normal(z, 1.0).to_event(1)
        >>> walks = MarkovChain(walk(torch.zeros(2, 1)), walk, torch.tensor([4, 2]), num_steps=4)
        >>> walks.sample().shape, walks.log_prob(torch.zeros(2, 4, 1))
        (torch.Size([2, 4, 1]), tensor([-3.6758, -1.8379]))
    """

    def __init__(
        self,
        initial: Any,
        transition: Callable[..., Distribution],
        lengths: Tensor,
        num_steps: int,
        context: Tensor | None = None,
    ):
        self.transition, self.lengths, self.num_steps, self.context = transition, lengths, num_steps, context
        self.real = step_mask(lengths, num_steps)
        batch_shape = torch.broadcast_shapes(initial.batch_shape, lengths.shape)
        self.initial = initial.expand(batch_shape)
        self._drawn: tuple[Tensor, Tensor] | None = None  # the last draw, and its density
        super().__init__(batch_shape, torch.Size([num_steps]) + initial.event_shape)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of a step."""
        return self.initial.has_rsample

    @property
    def support(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of a step, or zeros."""
        return _of_steps(self.initial.support)

    def expanded(self, batch_shape: torch.Size) -> "MarkovChain":
        """The same with another batch shape."""
        initial = self.initial.expand(batch_shape)
        return MarkovChain(initial, self.transition, self.lengths, self.num_steps, self.context)

    def log_density(self, value: Tensor) -> Tensor:
        """log p(z_1) + sum_t log p(z_t | z_{t-1}, c_t)."""
        if self._drawn is not None and self._drawn[0] is value:
            log_p = self._drawn[1]
            if log_p.requires_grad or not torch.is_grad_enabled():  # `sample` draws without gradients
                return log_p
        value = _filled(value, self.real)
        first, context = self.initial.log_prob(value[..., 0, :]).unsqueeze(-1), self.context
        if self.num_steps == 1:
            return first.squeeze(-1)
        before, after = value[..., :-1, :], value[..., 1:, :]
        rest = (self.transition(before) if context is None else self.transition(before, context)).log_prob(after)
        return _summed(torch.cat([first.expand(*rest.shape[:-1], 1), rest], -1), self.real)

    def draw(self, shape: torch.Size) -> Tensor:
        """Draws of this shape before the batch shape."""
        draw = "rsample" if self.has_rsample and torch.is_grad_enabled() else "sample"
        z = getattr(self.initial, draw)(shape)
        values, log_probs = [z], [self.initial.log_prob(z)]
        # unbound at once: the gradient of a slice is as large as all steps together
        contexts = [()] * (self.num_steps - 1) if self.context is None else [(c,) for c in self.context.unbind(-2)]
        for context in contexts:
            step: Any = self.transition(z, *context)
            z = getattr(step, draw)()
            values.append(z)
            log_probs.append(step.log_prob(z))
        value = _ended(torch.stack(values, -2), self.real)
        self._drawn = value, _summed(torch.stack(log_probs, -1), self.real)
        return value


def num_steps_of(x: Tensor | None, lengths: Tensor, x_dim: int | None = None) -> int:
    """T, of sequences x `(*, T, X)` of lengths `(*)`, or where there are none that of the longest to be drawn.

    Raises:
        ValueError: for what are not sequences and their lengths.
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"Expected lengths to be whole numbers; got {found}")
    if x is not None:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[:-2] != lengths.shape:
            found = f"shapes {tuple(x.shape)} and {tuple(lengths.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Expected x to be sequences (N, T, X) and lengths (N,); got {found}")
        if not x.is_floating_point():
            raise ValueError(f"Expected x to be sequences of floating-point values; got {x.dtype}")
        if x_dim not in (None, x.shape[-1]):
            raise ValueError(f"Expected steps of x to have {x_dim} values; got {x.shape[-1]}")
        return x.shape[-2]
    if int(lengths.min()) < 1:
        raise ValueError(f"Expected lengths of at least 1; got {int(lengths.min())}")
    return int(lengths.max())


class RecurrentPosterior(nn.Module):
    """q(z | x) = prod_t q(z_t | z_{t-1}, x_{t:T}): a chain that knows, at each step, all that is still to come.

        h_t = RNN(x_t, h_{t+1}),  z_t ~ q(z_t | z_{t-1}, h_t),  z_0 learned

    Given z_{t-1}, nothing that came before t tells more of z_t: it is the form of a state-space model's true posterior.

    Args:
        rnn: reads the sequence backwards.
        step: q(z_t | z_{t-1}, h_t), its parents in this order.
        z_dim: size of z_t.

    Source:
        Krishnan, Shalit and Sontag (2017), the structured inference network DKS.

    Example:
        >>> from pyrovae.conditionals import DiagonalNormal
        >>> q = RecurrentPosterior(BackwardRNN(88, 50), DiagonalNormal.mlp(10 + 50, 10), 10)
        >>> q(torch.zeros(3, 20, 88), torch.tensor([20, 7, 1])).event_shape
        torch.Size([20, 10])
    """

    def __init__(self, rnn: BackwardRNN, step: Conditional, z_dim: int):
        super().__init__()
        if not isinstance(rnn, nn.Module):
            raise ValueError(f"Expected rnn to be a network, as BackwardRNN; got {rnn!r}")
        check_conditionals(step=step)
        _check_sizes(z_dim=z_dim)
        self.rnn, self.step, self.z_dim = rnn, step, z_dim
        self.z_0 = nn.Parameter(torch.zeros(z_dim))

    def forward(self, x: Tensor, lengths: Tensor) -> MarkovChain:
        """q(z | x) for sequences `(*, T, X)` of lengths `(*)`."""
        h = self.rnn(x, lengths)
        return MarkovChain(self.step(self.z_0, h[..., 0, :]), self.step, lengths, x.shape[-2], h[..., 1:, :])

    def by_hand(self, x: Tensor, lengths: Tensor, z: Tensor) -> dict[str, Any] | None:
        """What `reference.deep_markov_elbo` asks of a guide, at the noise behind its draws z `(*, N, T, D)`.

        None where `reference` does not have the family.
        """
        functions = self.step.by_hand(reference.POSTERIORS)
        if functions is None:
            return None
        transform, noise = functions
        with torch.no_grad():  # the noise is given: gradients flow through the latents alone
            first = self.z_0.expand(*z.shape[:-2], 1, self.z_dim)
            eps = noise(z, self.step.eta(torch.cat([first, z[..., :-1, :]], -2), self.rnn(x, lengths)))
        return {
            "eps": eps,
            "rnn": self.rnn,
            "posterior_net": self.step.eta,
            "z_0": self.z_0,
            "posterior": transform,
        }


def check_recurrent(posterior: Any, optional: bool = True) -> None:
    """Raises ValueError for what is no `RecurrentPosterior`, or None where that is no choice."""
    if not (isinstance(posterior, RecurrentPosterior) or (optional and posterior is None)):
        raise ValueError(f"Expected posterior to be a RecurrentPosterior; got {posterior!r}")
