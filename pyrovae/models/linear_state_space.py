"""The linear-Gaussian state-space model, in which everything is known exactly."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals.conditional import Distribution
from pyrovae.conditionals.density import LogScaleNormal
from pyrovae.conditionals.sequences import MarkovChain, RecurrentPosterior, Steps, check_recurrent, num_steps_of
from pyrovae.nets import _check_sizes
from pyrovae.program import LatentModel, data_plate
from pyrovae.sequences import step_mask


class LinearGaussianStateSpace(LatentModel):
    """A Gaussian chain, seen through a linear map with noise: log p(x) is known, by the Kalman filter.

        z_1 ~ N(m, diag(s_1^2)),  z_t ~ N(A z_{t-1}, diag(s_z^2)),  x_t ~ N(C z_t + b, diag(s_x^2))

    The guide is the exact posterior, prod_t p(z_t | z_{t-1}, x_{t:T}), for which the ELBO is log p(x) whatever z is
    drawn; or any other q(z | x) that is given. Batches are those of `DeepMarkovModel`.

    Args:
        x_dim: size of a step of the data.
        z_dim: size of a step of the latents.
        posterior: q(z | x); None for the exact posterior.

    Raises:
        ValueError: for a size that is not positive; when run, for what are not sequences with their lengths.

    Source:
        Kalman (1960); Rauch, Tung and Striebel (1965).

    Example:
        >>> program = LinearGaussianStateSpace(5, 2)
        >>> program.log_prob(torch.zeros(3, 20, 5), torch.tensor([20, 7, 1])).shape
        torch.Size([3])
    """

    def __init__(self, x_dim: int, z_dim: int, posterior: RecurrentPosterior | None = None):
        super().__init__()
        _check_sizes(x_dim=x_dim, z_dim=z_dim)
        check_recurrent(posterior)
        self.x_dim, self.z_dim, self.posterior = x_dim, z_dim, posterior
        self.transition = nn.Parameter(0.9 * torch.eye(z_dim) + 0.1 * torch.randn(z_dim, z_dim) / math.sqrt(z_dim))
        self.emission = nn.Parameter(torch.randn(x_dim, z_dim) / math.sqrt(z_dim))
        self.bias = nn.Parameter(torch.zeros(x_dim))
        self.initial_mean = nn.Parameter(torch.zeros(z_dim))
        self.initial_log_sigma = nn.Parameter(torch.zeros(z_dim))
        self.transition_log_sigma = nn.Parameter(torch.zeros(z_dim))
        self.emission_log_sigma = nn.Parameter(torch.zeros(x_dim))

    def model(self, lengths: Tensor, x: Tensor | None = None) -> Tensor:
        """prod_t p(z_t | z_{t-1}) p(x_t | z_t)."""
        num_steps = num_steps_of(x, lengths, self.x_dim)
        initial = LogScaleNormal(self.initial_mean, self.initial_log_sigma).to_event(1)
        with data_plate(x):
            z = pyro.sample("z", MarkovChain(initial, self._step, lengths, num_steps))
            x_t = LogScaleNormal(z @ self.emission.T + self.bias, self.emission_log_sigma).to_event(1)
            return pyro.sample("x", Steps(x_t, lengths), obs=x)

    def _step(self, z: Tensor) -> Distribution:
        return LogScaleNormal(z @ self.transition.T, self.transition_log_sigma).to_event(1)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """q(z | x), or p(z | x)."""
        num_steps_of(x, lengths, self.x_dim)
        with data_plate(x):
            q = self.exact_posterior(x, lengths) if self.posterior is None else self.posterior(x, lengths)
            pyro.sample("z", q)

    def exact_posterior(self, x: Tensor, lengths: Tensor) -> MarkovChain:
        """p(z | x) = prod_t p(z_t | z_{t-1}, x_{t:T}) for sequences `(N, T, X)` of lengths `(N,)`.

        Backwards in time, p(x_{t:T} | z_t) is proportional to exp(-z' J_t z / 2 + h_t' z); then
        p(z_t | z_{t-1}, x_{t:T}) is Gaussian of precision P + J_t and mean (P + J_t)^-1 (P A z_{t-1} + h_t), where P is
        the precision of a transition. All that is in float64; where x_t has fewer values than z_t, to relative errors
        of some 1e-16 (s_z / s_x)^2.
        """
        x, dtype = x.double(), x.dtype
        matrix, c = self.transition.double(), self.emission.double()
        noise = (-2 * self.emission_log_sigma.double()).exp()
        j_x, h_x = (c.T * noise) @ c, ((x - self.bias) * noise) @ c
        p_1, p = (torch.diag((-2 * s.double()).exp()) for s in (self.initial_log_sigma, self.transition_log_sigma))
        real = step_mask(lengths, x.shape[1]).to(x.dtype).unsqueeze(-1)
        j, h = x.new_zeros(len(x), *j_x.shape), torch.zeros_like(h_x[:, 0])  # of what follows
        covariances, offsets = [], []
        for t, (h_t, real_t) in reversed(list(enumerate(zip(h_x.unbind(1), real.unbind(1), strict=True)))):
            j, h = j + real_t.unsqueeze(-1) * j_x, h + real_t * h_t
            covariances.insert(0, torch.linalg.inv(j + (p if t else p_1)))
            offsets.insert(0, _times(covariances[0], h if t else h + p_1 @ self.initial_mean.double()))
            # P - P (P + J)^-1 P, in which a large P would cancel, is J (P + J)^-1 P
            j, h = real_t.unsqueeze(-1) * (matrix.T @ j @ covariances[0] @ p @ matrix), offsets[0] @ p @ matrix
        covariance, offset = torch.stack(covariances, 1), torch.stack(offsets, 1)
        scale, gain = torch.linalg.cholesky(covariance), covariance @ p @ matrix
        initial = dist.MultivariateNormal(offset[:, 0].to(dtype), scale_tril=scale[:, 0].to(dtype))
        context = torch.cat([gain.flatten(2), offset, scale.flatten(2)], -1)[:, 1:].to(dtype)
        return MarkovChain(initial, self._exact_step, lengths, x.shape[1], context)

    def _exact_step(self, z: Tensor, context: Tensor) -> Distribution:
        """p(z_t | z_{t-1}, x_{t:T}) by the gain, the offset and the scale of a step."""
        d = self.z_dim
        gain, offset, scale = context.split([d * d, d, d * d], -1)
        mean = _times(gain.unflatten(-1, (d, d)), z) + offset
        return dist.MultivariateNormal(mean, scale_tril=scale.unflatten(-1, (d, d)))

    def log_prob(self, x: Tensor, lengths: Tensor) -> Tensor:
        """log p(x), exact, by the Kalman filter, for sequences `(N, T, X)` of lengths `(N,)`: `(N,)`, in nats."""
        num_steps_of(x, lengths, self.x_dim)
        return reference.kalman_filter(x.double(), lengths, **self._by_hand())[0].to(x.dtype)

    def smooth(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """E[z_t | x] `(N, T, D)` and its covariance `(N, T, D, D)`, exact; beyond the ends, predictions."""
        num_steps_of(x, lengths, self.x_dim)
        mean, covariance = reference.kalman_smoother(x.double(), lengths, **self._by_hand())
        return mean.to(x.dtype), covariance.to(x.dtype)

    def _by_hand(self) -> dict[str, Tensor]:
        """The parameters as `reference` takes them, in float64: S = C P C' + R may be ill-conditioned."""
        covariances = {
            "initial_covariance": self.initial_log_sigma,
            "transition_covariance": self.transition_log_sigma,
            "emission_covariance": self.emission_log_sigma,
        }
        return {name: torch.diag((2 * sigma.double()).exp()) for name, sigma in covariances.items()} | {
            "transition": self.transition.double(),
            "emission": self.emission.double(),
            "bias": self.bias.double(),
            "initial_mean": self.initial_mean.double(),
        }

    def reference_elbo(self, x: Tensor, lengths: Tensor, z: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z `(*, N, T, D)`.

        With the exact posterior that is log p(x), by the Kalman filter. None where `reference` does not have the
        posterior's family.
        """
        if self.posterior is None:
            return self.log_prob(x, lengths).expand(z.shape[:-2])
        guide = self.posterior.by_hand(x, lengths, z)
        if guide is None:
            return None
        return reference.deep_markov_elbo(
            x,
            lengths,
            **guide,
            transition_net=lambda z: _eta(z @ self.transition.T, self.transition_log_sigma),
            likelihood_net=lambda z: _eta(z @ self.emission.T + self.bias, self.emission_log_sigma),
            initial_eta=_eta(self.initial_mean, self.initial_log_sigma),
            likelihood=reference.log_diagonal_normal,
        )


def _eta(mu: Tensor, log_sigma: Tensor) -> Tensor:
    return torch.cat([mu, log_sigma.expand_as(mu)], -1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
