"""The variational autoencoder whose latents form clusters."""

from collections.abc import Sequence
from typing import Any, Self

import pyro
import torch
from torch import Tensor

from pyrovae import reference
from pyrovae.arguments import check_seed, check_whole
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, OneHotCategorical, one_hot
from pyrovae.conditionals.conditional import Distribution, check_conditionals, check_families
from pyrovae.em import Covariance, gaussians, log_joint, proportions, split_and_merge, start, vectors
from pyrovae.nets import Activation, _check_hidden, _check_sizes
from pyrovae.noise import forked
from pyrovae.program import LatentModel, data_plate

AT_ONCE = 1000  # data whose latents are drawn


class GaussianMixtureVAE(LatentModel):
    """A variational autoencoder with a mixture of C Gaussians for a prior, each a cluster c (Jiang et al. 2017, VaDE).

        c ~ Categorical(pi),  z | c ~ N(mu_c, Sigma_c),  x | z ~ p(x | z);   guide z ~ q(z | x),  c ~ p(c | z)

    Given z the data tell no more of c, so that the guide's q(c | z) = p(z, c) / p(z) is exact, and of all q(c | x, z)
    the one whose bound is tightest; `fit`, which sums over c, then maximises the ELBO of a VAE whose prior is the
    mixture. `program.predict(x)` is q(c | z) at the posterior mean of z; `program.sample(n, c=3)` draws from a cluster.
    Where data show the cluster, as integers, it is observed.

    Trained from its random beginning it is slow to form clusters, and those agree less with the classes of the data:
    train a `VAE`, take over its likelihood and posterior, and call `start_from` first, as VaDE's authors do.

    Args:
        likelihood: p(x | z).
        posterior: q(z | x).
        z_dim: size of z.
        num_clusters: C.
        covariance: of each cluster, diagonal, as in the paper, or full.

    Raises:
        ValueError: for a size below 1, or another covariance.

    Example:
        >>> program = GaussianMixtureVAE.mlp(64, 10, 2, (20,))
        >>> program.sample(3, c=7).shape, program.predict(torch.zeros(5, 64)).shape
        (torch.Size([3, 64]), torch.Size([5, 10]))
    """

    label = "c"

    def __init__(
        self,
        likelihood: Conditional,
        posterior: Conditional,
        z_dim: int,
        num_clusters: int,
        covariance: Covariance = "diagonal",
    ):
        super().__init__()
        check_conditionals(likelihood=likelihood, posterior=posterior)
        _check_sizes(z_dim=z_dim, num_clusters=num_clusters)
        self.z_dim, self.num_clusters, self.covariance = z_dim, num_clusters, covariance
        self.label_prior = proportions(num_clusters)
        self.prior = gaussians(z_dim, num_clusters, covariance)
        self.likelihood, self.posterior = likelihood, posterior

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        num_clusters: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        *,
        likelihood: type[Conditional] = Bernoulli,
        posterior: type[Conditional] = DiagonalNormal,
        activation: Activation = "tanh",
        covariance: Covariance = "diagonal",
    ) -> Self:
        """Two perceptrons, x - hidden - z and z - hidden reversed - x.

        Args:
            x_dim: size of a datum.
            num_clusters: C.
            z_dim: size of the latent.
            hidden: units of the hidden layers, from x to z.
            likelihood: family of p(x | z).
            posterior: family of q(z | x).
            activation: after every hidden layer.
            covariance: of each cluster, diagonal or full.
        """
        check_families(likelihood=likelihood, posterior=posterior)
        _check_hidden(hidden)
        return cls(
            likelihood.mlp(z_dim, x_dim, hidden[::-1], activation),
            posterior.mlp(x_dim, z_dim, hidden, activation),
            z_dim,
            num_clusters,
            covariance,
        )

    def model(self, x: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """p(c) p(z | c) p(x | z), for integer clusters c `(N,)` where they are known."""
        with data_plate(x):
            c = pyro.sample("c", self.label_prior(), obs=None if c is None else one_hot(c, self.num_clusters))
            z = pyro.sample("z", self.prior(c))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor, c: Tensor | None = None) -> None:
        """q(z | x) p(c | z)."""
        with data_plate(x):
            z = pyro.sample("z", self.posterior(x))
            if c is None:
                pyro.sample("c", self.exact_posterior(z))

    def exact_posterior(self, z: Tensor) -> Distribution:
        """p(c | z) for z `(*, D)`: a one-hot vector with batch shape `*`."""
        return OneHotCategorical(None).distribution(log_joint(self.label_prior, self.prior, z))

    def start_from(self, x: Any, seed: int, restarts: int = 3) -> Self:
        """Place the clusters by k-means and EM on draws z ~ q(z | x), one for each datum.

        Local optima of EM are left by splitting and merging clusters (Ueda et al. 2000); of the restarts the likeliest
        is kept. The networks stay as they are: train them before.

        Args:
            x: data `(N, X)`, at least as many as clusters: a tensor, a batch or a `Data`.
            seed: of the draws, and of the first k-means; the others have the seeds that follow.
            restarts: how many times all that is done.

        Raises:
            ValueError: for fewer data than clusters, restarts below 1, or clusters whose covariance is singular.
        """
        check_whole(restarts=restarts)
        check_seed(seed, 0, 2**32 - restarts)  # NumPy's range
        x = vectors(x, self.num_clusters)
        self.to(next(self.posterior.parameters()).device)  # a posterior that was trained before may be on another
        with forked(seed):
            z = torch.cat([self.encode(part, "z", sample=True) for part in x.split(AT_ONCE)])
        best, state = -torch.inf, {}
        for restart in range(restarts):
            start(self.label_prior, self.prior, z, seed + restart)
            found = split_and_merge(self.label_prior, self.prior, z)
            if found > best:
                best, state = found, {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(state)
        return self

    def reference_elbo(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor | None:
        """The hand-written ELBO `(*, N)` at the noise behind z `(*, N, D)`, for c drawn by the guide, one-hot.

        Where data show c, integers, it is that of log p(x, c). None where `reference` has not all families.
        """
        likelihood = self.likelihood.by_hand(reference.LIKELIHOODS)
        functions = self.posterior.by_hand(reference.POSTERIORS)
        if likelihood is None or functions is None:
            return None
        transform, noise = functions
        with torch.no_grad():
            eps = noise(z, self.posterior.eta(x).expand(*z.shape[:-1], -1))
        log_pi = torch.log_softmax(self.label_prior.eta(), -1)
        etas = self.prior.eta(torch.eye(self.num_clusters).to(x))
        return reference.mixture_vae_elbo(
            x,
            None if c.is_floating_point() else one_hot(c, self.num_clusters),
            eps,
            posterior_net=self.posterior.eta,
            likelihood_net=self.likelihood.eta,
            posterior=transform,
            likelihood=likelihood,
            log_joint=lambda z: log_pi + self.prior.by_hand(reference.LIKELIHOODS)(z.unsqueeze(-2), etas),
        )
