"""The variational autoencoder of data given a condition."""

from collections.abc import Sequence
from typing import Self

import pyro
import torch
from torch import Tensor

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal
from pyrovae.conditionals.conditional import check_conditionals, check_families
from pyrovae.nets import Activation, _check_hidden, _check_sizes
from pyrovae.program import LatentModel, data_plate


class ConditionalVAE(LatentModel):
    """A VAE of p(x | c), the condition c being given always and never modelled (Sohn, Lee and Yan 2015).

        z ~ p(z | c),  x ~ p(x | z, c);   guide z ~ q(z | x, c)

    c is a vector, `(N, C)`: a class as one-hot, the pixels of a quadrant. Its log-likelihoods are log p(x | c). A batch
    is `{"x": x, "c": c}`, and `program.sample(n, c=c)` draws x for n conditions.

    Args:
        prior: p(z | c).
        likelihood: p(x | z, c), its parents in this order.
        posterior: q(z | x, c), its parents in this order.
        c_dim: size of the condition.

    Raises:
        ValueError: for a c_dim below 1; when run, for a condition that is not `(N, c_dim)`, floating-point and as long
            as x.

    Example:
        >>> program = ConditionalVAE.mlp(784, 10, 20)
        >>> program.sample(3, c=torch.eye(10)[[7, 7, 2]]).shape
        torch.Size([3, 784])
    """

    def __init__(self, prior: Conditional, likelihood: Conditional, posterior: Conditional, c_dim: int):
        super().__init__()
        _check_sizes(c_dim=c_dim)
        check_conditionals(prior=prior, likelihood=likelihood, posterior=posterior)
        self.prior, self.likelihood, self.posterior, self.c_dim = prior, likelihood, posterior, c_dim

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        c_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        *,
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "tanh",
    ) -> Self:
        """Three perceptrons, the decoder with its hidden layers in reverse, and a diagonal Gaussian p(z | c).

        Args:
            x_dim: size of a datum.
            c_dim: size of the condition.
            z_dim: size of the latent.
            hidden: units of the hidden layers, from x and c, and from c alone, to z.
            likelihood: family of p(x | z, c).
            posterior: family of q(z | x, c).
            activation: after every hidden layer.
        """
        check_families(likelihood=likelihood, posterior=posterior)
        _check_sizes(x_dim=x_dim, c_dim=c_dim, z_dim=z_dim)
        _check_hidden(hidden)
        return cls(
            DiagonalNormal.mlp(c_dim, z_dim, hidden, activation),
            likelihood.mlp(z_dim + c_dim, x_dim, hidden[::-1], activation),
            posterior.mlp(x_dim + c_dim, z_dim, hidden, activation),
            c_dim,
        )

    def model(self, c: Tensor, x: Tensor | None = None) -> Tensor:
        """p(z | c) p(x | z, c)."""
        self._check(c, x)
        with data_plate(x):
            z = pyro.sample("z", self.prior(c))
            return pyro.sample("x", self.likelihood(z, c), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        """q(z | x, c)."""
        self._check(c, x)
        with data_plate(x):
            pyro.sample("z", self.posterior(x, c))

    def _check(self, c: Tensor, x: Tensor | None) -> None:
        if c.dim() != 2 or c.shape[1] != self.c_dim or not c.is_floating_point():
            raise ValueError(
                f"Expected c to be a floating-point tensor (N, {self.c_dim}), classes one-hot; "
                f"got {tuple(c.shape)} of {c.dtype}"
            )
        if x is not None and len(x) != len(c):
            raise ValueError(f"Expected c to have a row for each of the {len(x)} data in x; got {len(c)}")

    def reference_elbo(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z `(*, N, D)`.

        None where `reference` has not all families.
        """
        functions = self.posterior.by_hand(reference.POSTERIORS)
        log_p = self.prior.by_hand(reference.LIKELIHOODS)
        log_x = self.likelihood.by_hand(reference.LIKELIHOODS)
        if None in (functions, log_p, log_x):
            return None
        transform, noise = functions
        with torch.no_grad():  # the noise is given: gradients flow through z = g(eps, x, c) alone
            eps = noise(z, self.posterior.eta(x, c).expand(*z.shape[:-1], -1))
        return reference.conditional_vae_elbo(
            x,
            c,
            eps,
            posterior_net=self.posterior.eta,
            prior_net=self.prior.eta,
            likelihood_net=self.likelihood.eta,
            posterior=transform,
            prior=log_p,
            likelihood=log_x,
        )
