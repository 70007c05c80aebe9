"""Variational autoencoders whose data are labelled in part."""

from collections.abc import Sequence
from typing import Self

import pyro
import torch
from torch import Tensor

from pyrovae import reference
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, OneHotCategorical, StandardNormal, one_hot
from pyrovae.conditionals.conditional import check_conditionals, check_families
from pyrovae.nets import Activation, _check_hidden, _check_sizes
from pyrovae.program import LatentModel, data_plate


class SemiSupervisedVAE(LatentModel):
    """M2, a variational autoencoder with a label (Kingma, Rezende, Mohamed and Welling 2014, eq. 2, 4).

        y ~ p(y),  z ~ p(z),  x | y, z ~ p(x | y, z);   guide y ~ q(y | x),  z ~ q(z | x, y)

    Where the label is given it is observed, and the guide does not draw it. `fit(program, x, labeled=(x, y))` trains
    it on unlabelled and labelled data together, `program.predict(x)` is q(y | x).

    Args:
        label_prior: p(y), a root.
        prior: p(z), a root.
        likelihood: p(x | y, z), its parents in this order.
        classifier: q(y | x).
        posterior: q(z | x, y), its parents in this order; with `factorized`, q(z | x).
        factorized: the guide is q(y | x) q(z | x).

    Example:
        >>> program = SemiSupervisedVAE.mlp(784, 10, 20)
        >>> program.sample(2, y=torch.tensor([3, 8])).shape
        torch.Size([2, 784])
    """

    def __init__(
        self,
        label_prior: Conditional,
        prior: Conditional,
        likelihood: Conditional,
        classifier: Conditional,
        posterior: Conditional,
        factorized: bool = False,
    ):
        super().__init__()
        check_conditionals(label_prior=label_prior, prior=prior, likelihood=likelihood)
        check_conditionals(classifier=classifier, posterior=posterior)
        self.label_prior, self.prior, self.likelihood = label_prior, prior, likelihood
        self.classifier, self.posterior, self.factorized = classifier, posterior, factorized

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        num_classes: int,
        z_dim: int,
        hidden: Sequence[int] = (500,),
        *,
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "softplus",
        factorized: bool = False,
    ) -> Self:
        """M2 of three perceptrons, with a uniform p(y) and a standard normal p(z).

        Args:
            x_dim: size of a datum.
            num_classes: values of the label.
            z_dim: size of the latent.
            hidden: units of the hidden layers, from x to y and to z; the decoder has them in reverse.
            likelihood: family of p(x | y, z).
            posterior: family of q(z | x, y).
            activation: after every hidden layer.
            factorized: the guide is q(y | x) q(z | x).
        """
        check_families(likelihood=likelihood, posterior=posterior)
        _check_sizes(x_dim=x_dim, num_classes=num_classes, z_dim=z_dim)
        _check_hidden(hidden)
        return cls(
            OneHotCategorical.uniform(num_classes),
            StandardNormal(z_dim),
            likelihood.mlp(num_classes + z_dim, x_dim, hidden[::-1], activation),
            OneHotCategorical.mlp(x_dim, num_classes, hidden, activation),
            posterior.mlp(x_dim if factorized else x_dim + num_classes, z_dim, hidden, activation),
            factorized,
        )

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """p(y) p(z) p(x | y, z), for integer labels y `(N,)` where they are known."""
        with data_plate(x):
            y = pyro.sample("y", self.label_prior(), obs=self._one_hot(y))
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(y, z), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(y | x) q(z | x, y)."""
        with data_plate(x):
            label = self._one_hot(y)
            if label is None:
                label = pyro.sample("y", self.classifier(x))
            pyro.sample("z", self.posterior(x) if self.factorized else self.posterior(x, label))

    def _one_hot(self, y: Tensor | None) -> Tensor | None:
        return None if y is None else one_hot(y, len(self.label_prior.eta()))

    def reference_elbo(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor | None:
        """The hand-written -L(x, y) - log q(y | x) `(*, N)` at a label y `(*, N, C)`, one-hot, and latents z.

        Where data show y, integers, it is -L(x, y). None where `reference` has not all families.
        """
        likelihood = self.likelihood.by_hand(reference.LIKELIHOODS)
        functions = self.posterior.by_hand(reference.POSTERIORS)
        log_prior = self.prior.by_hand(reference.PRIORS)
        if likelihood is None or functions is None or log_prior is None:
            return None
        transform, noise = functions
        shown = not y.is_floating_point()
        if shown:
            y = one_hot(y, len(self.label_prior.eta()))
        with torch.no_grad():
            eps = noise(z, self.posterior_net(x, y).expand(*z.shape[:-1], -1))
        labeled = reference.labeled_elbo(
            x,
            y,
            eps,
            label_logits=self.label_prior.eta(),
            posterior_net=self.posterior_net,
            likelihood_net=self.likelihood.eta,
            posterior=transform,
            likelihood=likelihood,
            log_prior=lambda z: log_prior(z, self.prior.eta()),
        )
        return labeled if shown else labeled - reference.log_one_hot(y, self.classifier.eta(x))

    def posterior_net(self, x: Tensor, y: Tensor) -> Tensor:
        """eta of q(z | x, y), or of q(z | x)."""
        return self.posterior.eta(x) if self.factorized else self.posterior.eta(x, y)
