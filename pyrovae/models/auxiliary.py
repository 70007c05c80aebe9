"""Auxiliary latent variables, which make a posterior richer."""

from collections.abc import Sequence
from typing import Self

import pyro
import torch
from torch import Tensor

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, StandardNormal
from pyrovae.conditionals.conditional import check_conditionals, check_families
from pyrovae.nets import Activation, _check_hidden, _check_sizes
from pyrovae.program import LatentModel, data_plate


class AuxiliaryVAE(LatentModel):
    """A VAE whose guide mixes over an auxiliary latent a (Kingma and Welling 2019, section 3.2.1).

        z ~ p(z),  x ~ p(x | z),  a ~ p(a | x, z);   guide a ~ q(a | x),  z ~ q(z | a, x)

    q(z | x) = E_{q(a | x)}[q(z | a, x)] may have many modes. p(x) is that of the VAE whatever p(a | x, z) is, which
    makes the ELBO only looser: KL(q(a, z | x) || p(a, z | x)) >= KL(q(z | x) || p(z | x)).

    Args:
        prior: p(z), a root.
        likelihood: p(x | z).
        posterior: q(z | a, x), its parents in this order.
        auxiliary_posterior: q(a | x).
        auxiliary: p(a | x, z), its parents in this order.

    Source:
        Ranganath et al. (2016), Hierarchical variational models; Maaløe et al. (2016), section 2.

    Example:
        >>> AuxiliaryVAE.mlp(784, 20).encode(torch.zeros(3, 784), site="z").shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        prior: Conditional,
        likelihood: Conditional,
        posterior: Conditional,
        auxiliary_posterior: Conditional,
        auxiliary: Conditional,
    ):
        super().__init__()
        check_conditionals(prior=prior, likelihood=likelihood, posterior=posterior)
        check_conditionals(auxiliary_posterior=auxiliary_posterior, auxiliary=auxiliary)
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self.auxiliary_posterior, self.auxiliary = auxiliary_posterior, auxiliary

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        *,
        a_dim: int | None = None,
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "tanh",
    ) -> Self:
        """Four perceptrons, the decoder with its hidden layers in reverse, and a standard normal p(z).

        Args:
            x_dim: size of a datum.
            z_dim: size of the latent.
            hidden: units of the hidden layers, from x.
            a_dim: size of a; None for that of z.
            likelihood: family of p(x | z).
            posterior: family of q(z | a, x), q(a | x) and p(a | x, z).
            activation: after every hidden layer.
        """
        check_families(likelihood=likelihood, posterior=posterior)
        _check_hidden(hidden)
        a_dim = z_dim if a_dim is None else a_dim
        _check_sizes(x_dim=x_dim, z_dim=z_dim, a_dim=a_dim)
        return cls(
            StandardNormal(z_dim),
            likelihood.mlp(z_dim, x_dim, hidden[::-1], activation),
            posterior.mlp(a_dim + x_dim, z_dim, hidden, activation),
            posterior.mlp(x_dim, a_dim, hidden, activation),
            posterior.mlp(x_dim + z_dim, a_dim, hidden, activation),
        )

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z) p(x | z) p(a | x, z)."""
        with data_plate(x):
            z = pyro.sample("z", self.prior())
            x = pyro.sample("x", self.likelihood(z), obs=x)
            pyro.sample("a", self.auxiliary(x, z))
            return x

    def guide(self, x: Tensor) -> None:
        """q(a | x) q(z | a, x)."""
        with data_plate(x):
            a = pyro.sample("a", self.auxiliary_posterior(x))
            pyro.sample("z", self.posterior(a, x))

    def reference_elbo(self, x: Tensor, z: Tensor, a: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z and a, `(*, N, D)`.

        None where `reference` has not all families.
        """
        parts = self.posterior.by_hand(reference.POSTERIORS), self.auxiliary_posterior.by_hand(reference.POSTERIORS)
        densities = (
            self.likelihood.by_hand(reference.LIKELIHOODS),
            self.auxiliary.by_hand(reference.LIKELIHOODS),
            self.prior.by_hand(reference.PRIORS),
        )
        if None in parts or None in densities:
            return None
        (of_z, noise_z), (of_a, noise_a) = parts
        log_x, log_a, log_z = densities
        with torch.no_grad():  # the noise is given: gradients flow through a and z alone
            eps_a = noise_a(a, self.auxiliary_posterior.eta(x).expand(*a.shape[:-1], -1))
            eps_z = noise_z(z, self.posterior.eta(a, x))
        return reference.auxiliary_elbo(
            x,
            eps_a,
            eps_z,
            auxiliary_posterior_net=self.auxiliary_posterior.eta,
            posterior_net=self.posterior.eta,
            likelihood_net=self.likelihood.eta,
            auxiliary_net=self.auxiliary.eta,
            auxiliary_posterior=of_a,
            posterior=of_z,
            likelihood=log_x,
            auxiliary=log_a,
            log_prior=lambda z: log_z(z, self.prior.eta()),
        )
