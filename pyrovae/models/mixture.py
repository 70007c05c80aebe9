"""The Gaussian mixture: a latent cluster, and all of it known exactly."""

from typing import Any, Self

import pyro
import torch
from torch import Tensor

from pyrovae import reference
from pyrovae.conditionals import OneHotCategorical, one_hot
from pyrovae.conditionals.conditional import Distribution
from pyrovae.em import Covariance, em, gaussians, log_joint, proportions, split_and_merge, start, vectors
from pyrovae.nets import _check_input, _check_sizes
from pyrovae.program import LatentModel, data_plate


class GaussianMixture(LatentModel):
    """A mixture of C Gaussians, each a cluster c.

        c ~ Categorical(pi),  x | c ~ N(mu_c, Sigma_c);   p(x) = sum_c pi_c N(x; mu_c, Sigma_c)

    The guide is the exact posterior, q(c | x) = pi_c N(x; mu_c, Sigma_c) / p(x), so that the ELBO is log p(x), and
    `fit`, which sums over c, ascends log p(x) itself. `em` ascends it too, in larger steps. `program.predict(x)` is
    q(c | x); `program.sample(n, c=3)` draws from a cluster. Where data show the cluster, as integers, it is observed.

    Args:
        x_dim: size of a datum.
        num_clusters: C.
        covariance: of each cluster, diagonal or full.

    Raises:
        ValueError: for a size below 1, or another covariance.

    Source:
        Dempster, Laird and Rubin (1977), section 4.3.

    Example:
        >>> x = torch.cat([torch.randn(50, 2) - 5, torch.randn(50, 2) + 5])
        >>> program = GaussianMixture(2, 2).start_from(x, seed=0)
        >>> history = program.em(x, progress=False)
        >>> torch.allclose(program.log_prob(x).mean(), torch.tensor(history[-1]))
        True
        >>> program.predict(x).argmax(1).unique_consecutive().shape
        torch.Size([2])
    """

    label = "c"

    def __init__(self, x_dim: int, num_clusters: int, covariance: Covariance = "full"):
        super().__init__()
        _check_sizes(x_dim=x_dim, num_clusters=num_clusters)
        self.x_dim, self.num_clusters, self.covariance = x_dim, num_clusters, covariance
        self.label_prior = proportions(num_clusters)
        self.likelihood = gaussians(x_dim, num_clusters, covariance)

    def model(self, x: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """p(c) p(x | c), for integer clusters c `(N,)` where they are known."""
        with data_plate(x):
            c = pyro.sample("c", self.label_prior(), obs=None if c is None else one_hot(c, self.num_clusters))
            return pyro.sample("x", self.likelihood(c), obs=x)

    def guide(self, x: Tensor, c: Tensor | None = None) -> None:
        """p(c | x)."""
        if c is None:
            with data_plate(x):
                pyro.sample("c", self.exact_posterior(x))

    def exact_posterior(self, x: Tensor) -> Distribution:
        """p(c | x) for x `(*, X)`: a one-hot vector with batch shape `*`."""
        _check_input(x, self.x_dim, self, "x")
        return OneHotCategorical(None).distribution(log_joint(self.label_prior, self.likelihood, x))

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """log p(x), exact, for x `(N, X)`, or log p(x, c) for integer clusters c `(N,)`: `(N,)`, in nats.

        Raises:
            ValueError: for x of another size or dtype, or clusters that are none.
        """
        _check_input(x, self.x_dim, self, "x")
        joint = log_joint(self.label_prior, self.likelihood, x)
        if c is None:
            return joint.logsumexp(-1)
        chosen = one_hot(c, self.num_clusters).bool()
        if chosen.shape != joint.shape or not bool(chosen.any(-1).all()):
            raise ValueError(
                f"Expected c to be clusters {tuple(joint.shape[:-1])} from 0 to {self.num_clusters - 1}; "
                f"got shape {tuple(c.shape)}, {c.min().item()} to {c.max().item()}"
            )
        return joint[chosen].reshape(joint.shape[:-1])

    def start_from(self, x: Any, seed: int) -> Self:
        """Place the clusters by k-means, begun by k-means++: each is the Gaussian of the data nearest to its mean.

        Args:
            x: data `(N, X)`, at least as many as clusters: a tensor, a batch or a `Data`.
            seed: of k-means++.

        Raises:
            ValueError: for fewer data than clusters, data of another size, or clusters whose covariance is singular.
        """
        start(self.label_prior, self.likelihood, self._vectors(x), seed)
        return self

    def em(
        self,
        x: Any,
        *,
        iterations: int = 1000,
        tolerance: float = 1e-6,
        floor: float = 1e-6,
        progress: bool = True,
    ) -> list[float]:
        """Expectation-maximization from where the program stands, until an iteration adds less than the tolerance.

        Args:
            x: data `(N, X)`, at least as many as clusters: a tensor, a batch or a `Data`.
            iterations: at most so many.
            tolerance: nats per datum.
            floor: is added to each variance, lest a cluster fall upon one datum, where log p(x) has no bound; with
                it the last iterations may lose what the floor costs.
            progress: show a progress bar.

        Returns:
            The mean of log p(x) after each iteration, nats per datum.

        Raises:
            ValueError: for fewer data than clusters, data of another size, or a covariance that is not positive
                definite.
        """
        return em(self.label_prior, self.likelihood, self._vectors(x), iterations, tolerance, floor, progress)

    def split_and_merge(self, x: Any) -> float:
        """EM that leaves many local optima: it merges two clusters and splits another while that makes x likelier.

        Args:
            x: data `(N, X)`, at least as many as clusters: a tensor, a batch or a `Data`.

        Returns:
            The mean of log p(x), nats per datum.

        Raises:
            ValueError: for fewer data than clusters, data of another size, or clusters whose covariance is singular.

        Source:
            Ueda, Nakano, Ghahramani and Hinton (2000).
        """
        return split_and_merge(self.label_prior, self.likelihood, self._vectors(x))

    def _vectors(self, x: Any) -> Tensor:
        return vectors(x, self.num_clusters, self.x_dim).to(self.label_prior.eta().device)

    def reference_elbo(self, x: Tensor, c: Tensor) -> Tensor:
        """The hand-written ELBO `(*, N)` at a cluster c drawn by the guide, one-hot: log p(x), whatever c is.

        Where data show c, integers, it is log p(x, c).
        """
        eta = self.likelihood.eta(torch.eye(self.num_clusters).to(x))
        if self.covariance == "full":
            mean, _, scale = reference.full_parameters(eta)
        else:
            mean, log_sigma = eta.chunk(2, -1)
            scale = torch.diag_embed(log_sigma.exp())
        parameters = self.label_prior.eta(), mean, scale @ scale.mT
        if c.is_floating_point():
            return reference.gaussian_mixture_log_prob(x, *parameters).expand(c.shape[:-1])
        return (reference.gaussian_mixture_log_joint(x, *parameters) * one_hot(c, self.num_clusters)).sum(-1)
