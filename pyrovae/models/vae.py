"""The variational autoencoder, and its exactly solvable cousin."""

import math
from collections.abc import Sequence
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, StandardNormal
from pyrovae.conditionals.conditional import Distribution, check_conditionals, check_families
from pyrovae.conditionals.density import LogScaleNormal
from pyrovae.nets import Activation, _check_hidden, _check_input, _check_sizes
from pyrovae.program import LatentModel, data_plate


class VAE(LatentModel):
    """The variational autoencoder (Kingma and Welling 2014; Rezende et al. 2014).

        z ~ p(z),  x | z ~ p(x | z);   guide z ~ q(z | x)

    Args:
        prior: p(z), a root.
        likelihood: p(x | z).
        posterior: q(z | x).

    Example:
        >>> vae = VAE(StandardNormal(20), Bernoulli.mlp(20, 784), DiagonalNormal.mlp(784, 20))
        >>> vae.sample(3).shape
        torch.Size([3, 784])
    """

    def __init__(self, prior: Conditional, likelihood: Conditional, posterior: Conditional):
        super().__init__()
        check_conditionals(prior=prior, likelihood=likelihood, posterior=posterior)
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        *,
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "tanh",
    ) -> Self:
        """A VAE of two perceptrons, x - hidden - z and z - hidden reversed - x, with a standard normal prior.

        Args:
            x_dim: size of a datum.
            z_dim: size of the latent.
            hidden: units of the hidden layers, from x to z.
            likelihood: family of p(x | z).
            posterior: family of q(z | x).
            activation: after every hidden layer.
        """
        check_families(likelihood=likelihood, posterior=posterior)
        _check_hidden(hidden)
        return cls(
            StandardNormal(z_dim),
            likelihood.mlp(z_dim, x_dim, hidden[::-1], activation),
            posterior.mlp(x_dim, z_dim, hidden, activation),
        )

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z) p(x | z)."""
        with data_plate(x):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with data_plate(x):
            pyro.sample("z", self.posterior(x))

    def reference_elbo(self, x: Tensor, z: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z `(*, N, D)`.

        None where `reference` has not all three families.
        """
        likelihood = self.likelihood.by_hand(reference.LIKELIHOODS)
        return _reference_elbo(x, z, self.prior, self.posterior, likelihood, self.likelihood.eta)


def _reference_elbo(
    x: Tensor,
    z: Tensor,
    prior: Conditional,
    posterior: Conditional,
    likelihood: reference.Density | None,
    likelihood_net: reference.Net,
) -> Tensor | None:
    log_prior, functions = prior.by_hand(reference.PRIORS), posterior.by_hand(reference.POSTERIORS)
    if log_prior is None or functions is None or likelihood is None:
        return None
    transform, noise = functions
    with torch.no_grad():  # the noise is given: gradients flow through z = g(eps, x) alone
        eps = noise(z, posterior.eta(x).expand(*z.shape[:-1], -1))
    return reference.vae_elbo(
        x,
        eps,
        posterior_net=posterior.eta,
        likelihood_net=likelihood_net,
        posterior=transform,
        likelihood=likelihood,
        log_prior=lambda z: log_prior(z, prior.eta()),
    )


class LinearGaussian(LatentModel):
    """Probabilistic PCA (Tipping and Bishop 1999), in which everything is known exactly.

        z ~ N(0, I),  x | z ~ N(W z + b, s^2 I);   p(x) = N(x; b, W W^T + s^2 I)

    The guide is the exact posterior, N(M^-1 W^T (x - b), s^2 M^-1) with M = W^T W + s^2 I, for which the ELBO is
    log p(x) whatever z is drawn; or any other q(z | x) that is given.

    Args:
        x_dim: size of a datum.
        z_dim: size of the latent.
        posterior: q(z | x); None for the exact posterior.

    Example:
        >>> LinearGaussian(5, 2).log_prob(torch.zeros(3, 5)).shape
        torch.Size([3])
    """

    def __init__(self, x_dim: int, z_dim: int, posterior: Conditional | None = None):
        super().__init__()
        _check_sizes(x_dim=x_dim, z_dim=z_dim)
        if posterior is not None:
            check_conditionals(posterior=posterior)
        self.x_dim, self.z_dim, self.posterior = x_dim, z_dim, posterior
        self.prior = StandardNormal(z_dim)
        self.weight = nn.Parameter(torch.randn(x_dim, z_dim) / math.sqrt(z_dim))
        self.bias = nn.Parameter(torch.zeros(x_dim))
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z) p(x | z)."""
        with data_plate(x):
            z = pyro.sample("z", self.prior())
            mu = z @ self.weight.T + self.bias
            return pyro.sample("x", LogScaleNormal(mu, self.log_sigma).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), or p(z | x)."""
        with data_plate(x):
            pyro.sample("z", self.exact_posterior(x) if self.posterior is None else self.posterior(x))

    def exact_posterior(self, x: Tensor) -> Distribution:
        """p(z | x) for x `(*, X)`: a Gaussian on `(D,)` with batch shape `*`; found in float64."""
        _check_input(x, self.x_dim, self, "x")
        mean, scale = self._posterior(x.double())
        return dist.MultivariateNormal(mean.to(x.dtype), scale_tril=scale.to(x.dtype))

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of p(z | x), in float64: T^-1 Q^T (x - b) and s T^-1, T lower triangular, T^T T = M.

        W W^T + s^2 I and M lose s where it is small: Q and T are those of W over s I, whose square is M.
        """
        s = self._sigma_eye(self.z_dim)
        q, r = _qr(torch.cat([self.weight.double(), s]).flip(-1))
        q, t = q.flip(-1), r.flip(0, 1)
        mean = torch.linalg.solve_triangular(t, ((x - self.bias) @ q[: self.x_dim]).unsqueeze(-1), upper=False)
        return mean.squeeze(-1), torch.linalg.solve_triangular(t, s, upper=False)

    def _sigma_eye(self, size: int) -> Tensor:
        sigma = self.log_sigma.double().exp()
        return sigma * torch.eye(size, dtype=sigma.dtype, device=sigma.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), exact, for x `(*, X)`: `(*)`, in nats; in float64, for W W^T + s^2 I may be ill-conditioned.

        From that matrix's factor, or, where it is the larger, from log p(x, z) - log p(z | x) at the posterior's mean.
        """
        _check_input(x, self.x_dim, self, "x")
        value, bias, weight, log_s = x.double(), self.bias.double(), self.weight.double(), self.log_sigma.double()
        if self.x_dim <= self.z_dim:
            _, r = _qr(torch.cat([weight.T, self._sigma_eye(self.x_dim)]))
            p_x = dist.MultivariateNormal(bias, scale_tril=r.T)
            return p_x.log_prob(value).to(x.dtype)
        z, scale = self._posterior(value)
        log_px_z = LogScaleNormal(z @ weight.T + bias, log_s).log_prob(value).sum(-1)
        # log N(z; 0, I) - log N(z; z, s^2 M^-1)
        return (log_px_z - (z**2).sum(-1) / 2 + scale.diagonal().log().sum()).to(x.dtype)

    def reference_elbo(self, x: Tensor, z: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z `(*, N, D)`.

        None where `reference` does not have the posterior's family.
        """
        if self.posterior is not None:
            return _reference_elbo(
                x, z, self.prior, self.posterior, reference.log_diagonal_normal, self._likelihood_eta
            )
        mean, covariance = reference.linear_gaussian_posterior(x, self.weight, self.bias, self.log_sigma)
        scale = torch.linalg.cholesky(covariance)
        with torch.no_grad():
            eps = torch.linalg.solve_triangular(scale, (z - mean).unsqueeze(-1), upper=False).squeeze(-1)
        z = mean + eps @ scale.T
        log_q = reference.log_standard_normal(eps) - scale.diagonal().log().sum()
        return reference.linear_gaussian_elbo(x, z, log_q, self.weight, self.bias, self.log_sigma)

    def _likelihood_eta(self, z: Tensor) -> Tensor:
        mu = z @ self.weight.T + self.bias
        return torch.cat([mu, self.log_sigma.expand_as(mu)], -1)


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R, upper triangular with a positive diagonal, of a matrix `(A, B)`, A >= B: R^T R is its square."""
    q, r = torch.linalg.qr(matrix)
    sign = r.diagonal().sign()
    return q * sign, sign.unsqueeze(-1) * r
