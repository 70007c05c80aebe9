"""The hidden Markov model, in which everything is known exactly."""

from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional
from pyrovae.conditionals.conditional import Distribution, check_conditionals, check_families
from pyrovae.conditionals.sequences import MarkovChain, RecurrentPosterior, Steps, check_recurrent, num_steps_of
from pyrovae.nets import _check_sizes
from pyrovae.program import LatentModel, data_plate
from pyrovae.sequences import step_mask


class HiddenMarkovModel(LatentModel):
    """A chain of discrete states, each of which has a density of its own: log p(x) is known, by the forward algorithm.

        z_1 ~ Categorical(pi),  z_t ~ Categorical(A z_{t-1}),  x_t ~ p(x_t | z_t),  z_t one-hot

    The guide is the exact posterior, prod_t p(z_t | z_{t-1}, x_{t:T}), for which the ELBO is log p(x) whatever z is
    drawn; or any other q(z | x) that is given. The exact one passes no gradient on: that of log p(x, z) at its draws is
    in expectation that of log p(x), so that SVI is a stochastic EM. Batches are those of `DeepMarkovModel`.

    Args:
        num_states: number of states.
        likelihood: p(x_t | z_t).
        posterior: q(z | x); None for the exact posterior.

    Raises:
        ValueError: for a size that is not positive; when run, for what are not sequences with their lengths.

    Source:
        Rabiner (1989).

    Example:
        >>> program = HiddenMarkovModel.linear(5, num_states=3)
        >>> program.log_prob(torch.zeros(2, 20, 5), torch.tensor([20, 7])).shape
        torch.Size([2])
    """

    states: Tensor

    def __init__(self, num_states: int, likelihood: Conditional, posterior: RecurrentPosterior | None = None):
        super().__init__()
        _check_sizes(num_states=num_states)
        check_conditionals(likelihood=likelihood)
        check_recurrent(posterior)
        self.num_states, self.likelihood, self.posterior = num_states, likelihood, posterior
        self.initial_logits = nn.Parameter(torch.zeros(num_states))
        self.transition_logits = nn.Parameter(torch.eye(num_states))  # states begin with a little inertia
        self.register_buffer("states", torch.eye(num_states), persistent=False)

    @classmethod
    def linear(cls, x_dim: int, num_states: int, likelihood: type[Conditional] = Bernoulli) -> Self:
        """Each state has parameters of its own.

        Args:
            x_dim: size of a step of the data.
            num_states: number of states.
            likelihood: family of p(x_t | z_t).
        """
        check_families(likelihood=likelihood)
        _check_sizes(x_dim=x_dim, num_states=num_states)
        return cls(num_states, likelihood.mlp(num_states, x_dim, ()))

    @property
    def x_dim(self) -> int:
        """Size of a step of the data."""
        return self.likelihood(self.states[0]).event_shape[0]

    def model(self, lengths: Tensor, x: Tensor | None = None) -> Tensor:
        """prod_t p(z_t | z_{t-1}) p(x_t | z_t)."""
        num_steps = num_steps_of(x, lengths, self.x_dim)
        initial = dist.OneHotCategorical(logits=self.initial_logits)
        with data_plate(x):
            z = pyro.sample("z", MarkovChain(initial, self._step, lengths, num_steps))
            return pyro.sample("x", Steps(self.likelihood(z), lengths), obs=x)

    def _step(self, z: Tensor) -> Distribution:
        return dist.OneHotCategorical(logits=z @ self.transition_logits)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """q(z | x), or p(z | x)."""
        num_steps_of(x, lengths, self.x_dim)
        with data_plate(x):
            q = self.exact_posterior(x, lengths) if self.posterior is None else self.posterior(x, lengths)
            pyro.sample("z", q)

    @torch.no_grad()
    def exact_posterior(self, x: Tensor, lengths: Tensor) -> MarkovChain:
        """p(z | x) = prod_t p(z_t | z_{t-1}, x_{t:T}) for sequences `(N, T, X)` of lengths `(N,)`."""
        log_initial, log_transition, log_likelihood = self._log_probs(x)
        # log p(x_{t:T} | z_t)
        ahead = log_likelihood + reference.backward_algorithm(log_transition, log_likelihood, lengths)
        ahead = (ahead - ahead.amax(-1, keepdim=True)).to(x.dtype)  # thousands of nats, of which differences count
        initial = dist.OneHotCategorical(logits=log_initial.to(x.dtype) + ahead[:, 0])
        return MarkovChain(initial, self._exact_step, lengths, x.shape[1], ahead[:, 1:])

    def _exact_step(self, z: Tensor, ahead: Tensor) -> Distribution:
        """p(z_t | z_{t-1}, x_{t:T}) from z_{t-1} and log p(x_{t:T} | z_t)."""
        return dist.OneHotCategorical(logits=z @ self.transition_logits.detach().log_softmax(1) + ahead)

    def _log_probs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(z_1) `(S,)`, log p(z_t | z_{t-1}) `(S, S)` and log p(x_t | z_t) `(N, T, S)`, float64 for long sums."""
        log_likelihood = self.likelihood(self.states).log_prob(x.unsqueeze(-2)).double()
        initial, transition = self.initial_logits.double(), self.transition_logits.double()
        return initial.log_softmax(0), transition.log_softmax(1), log_likelihood

    def log_prob(self, x: Tensor, lengths: Tensor) -> Tensor:
        """log p(x), exact, by the forward algorithm, for sequences `(N, T, X)` of lengths `(N,)`: `(N,)`, in nats."""
        num_steps_of(x, lengths, self.x_dim)
        return reference.forward_algorithm(*self._log_probs(x), lengths)[0].to(x.dtype)

    def smooth(self, x: Tensor, lengths: Tensor) -> Tensor:
        """p(z_t | x), exact, `(N, T, S)`; zeros beyond the ends."""
        num_steps_of(x, lengths, self.x_dim)
        log_initial, log_transition, log_likelihood = self._log_probs(x)
        _, forward = reference.forward_algorithm(log_initial, log_transition, log_likelihood, lengths)
        marginals = (forward + reference.backward_algorithm(log_transition, log_likelihood, lengths)).softmax(-1)
        return marginals.to(x.dtype) * step_mask(lengths, x.shape[1]).unsqueeze(-1)

    def reference_elbo(self, x: Tensor, lengths: Tensor, z: Tensor) -> Tensor | None:
        """log p(x) by the forward algorithm, with the gradient of log p(x, z); with another guide None."""
        if self.posterior is not None:
            return None
        log_joint = reference.hidden_markov_log_joint(z.double(), *self._log_probs(x), lengths)
        return (log_joint - log_joint.detach()).to(x.dtype) + self.log_prob(x, lengths).detach()
