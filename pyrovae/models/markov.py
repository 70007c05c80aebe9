"""The deep Markov model: a chain of latents, of which each step makes one step of the data."""

from collections.abc import Sequence
from typing import Any, Self

import pyro
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal
from pyrovae.conditionals.conditional import check_conditionals, check_families
from pyrovae.conditionals.sequences import MarkovChain, RecurrentPosterior, Steps, check_recurrent, num_steps_of
from pyrovae.nets import MLP, Activation, BackwardRNN, Cell, Combiner, GatedTransition, _check_sizes
from pyrovae.program import LatentModel, data_plate


class DeepMarkovModel(LatentModel):
    """A state-space model with networks (Krishnan, Shalit and Sontag 2017).

        z_t ~ p(z_t | z_{t-1}),  x_t ~ p(x_t | z_t);   guide z_t ~ q(z_t | z_{t-1}, x_{t:T}),   z_0 learned in both

    A batch is `{"x": x, "lengths": lengths}`: sequences `(N, T, X)`, and how many steps of each count, `(N,)`; what
    lies beyond is never seen. All latents of a sequence are one site, z `(N, T, D)`, so that a sequence has one
    importance weight. `program.sample(n, lengths=100)` draws n sequences of 100 steps.

    In the paper p(z_1) has a mean and a scale of its own; here it is p(z_1 | z_0), as in Pyro's tutorial.

    Args:
        transition: p(z_t | z_{t-1}).
        likelihood: p(x_t | z_t).
        posterior: q(z | x).
        z_dim: size of z_t.

    Raises:
        ValueError: for a size that is not positive; when run, for what are not sequences with their lengths.

    Example:
        >>> program = DeepMarkovModel.mlp(88, 10, rnn_dim=50)
        >>> program.sample(3, lengths=20).shape
        torch.Size([3, 20, 88])
    """

    def __init__(self, transition: Conditional, likelihood: Conditional, posterior: RecurrentPosterior, z_dim: int):
        super().__init__()
        _check_sizes(z_dim=z_dim)
        check_conditionals(transition=transition, likelihood=likelihood)
        check_recurrent(posterior, optional=False)
        self.transition, self.likelihood, self.posterior, self.z_dim = transition, likelihood, posterior, z_dim
        self.z_0 = nn.Parameter(torch.zeros(z_dim))

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        z_dim: int = 100,
        hidden: Sequence[int] = (100, 100),
        *,
        transition_dim: int = 200,
        rnn_dim: int = 600,
        cell: Cell = "relu",
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "relu",
        **family: Any,
    ) -> Self:
        """Gated transitions, a perceptron from z_t to x_t, a recurrent guide; the sizes of Pyro's tutorial by default.

        Args:
            x_dim: size of a step of the data.
            z_dim: size of a step of the latents.
            hidden: units of the hidden layers of p(x_t | z_t).
            transition_dim: hidden units of the transition's gate and change.
            rnn_dim: units of the guide's recurrent network.
            cell: of that network: relu, tanh or gru.
            likelihood: family of p(x_t | z_t).
            posterior: family of q(z_t | z_{t-1}, x_{t:T}).
            activation: in p(x_t | z_t).
            family: what the posterior's family takes beside its network, as steps=2 for a flow.
        """
        _check_sizes(x_dim=x_dim, z_dim=z_dim, transition_dim=transition_dim, rnn_dim=rnn_dim)
        check_families(likelihood=likelihood, posterior=posterior)
        step = posterior.mlp(z_dim + rnn_dim, z_dim, (), **family)
        assert isinstance(step.net, MLP)
        step.net = Combiner(z_dim, rnn_dim, step.net.out_dim)
        return cls(
            DiagonalNormal(GatedTransition(z_dim, transition_dim)),
            likelihood.mlp(z_dim, x_dim, hidden, activation),
            RecurrentPosterior(BackwardRNN(x_dim, rnn_dim, cell), step, z_dim),
            z_dim,
        )

    def model(self, lengths: Tensor, x: Tensor | None = None) -> Tensor:
        """prod_t p(z_t | z_{t-1}) p(x_t | z_t)."""
        num_steps = num_steps_of(x, lengths)
        with data_plate(x):
            z = pyro.sample("z", MarkovChain(self.transition(self.z_0), self.transition, lengths, num_steps))
            return pyro.sample("x", Steps(self.likelihood(z), lengths), obs=x)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """prod_t q(z_t | z_{t-1}, x_{t:T})."""
        num_steps_of(x, lengths)
        with data_plate(x):
            pyro.sample("z", self.posterior(x, lengths))

    def reference_elbo(self, x: Tensor, lengths: Tensor, z: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z `(*, N, T, D)`.

        None where `reference` has not all families.
        """
        guide = self.posterior.by_hand(x, lengths, z)
        log_p = self.transition.by_hand(reference.LIKELIHOODS)
        log_x = self.likelihood.by_hand(reference.LIKELIHOODS)
        if guide is None or log_p is None or log_x is None:
            return None
        return reference.deep_markov_elbo(
            x,
            lengths,
            **guide,
            transition_net=self.transition.eta,
            likelihood_net=self.likelihood.eta,
            initial_eta=self.transition.eta(self.z_0),
            transition=log_p,
            likelihood=log_x,
        )
