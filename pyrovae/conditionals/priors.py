"""Learned priors p(z): roots, called with nothing."""

import math
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import reference
from pyrovae.conditionals.conditional import Conditional, Distribution, check_conditionals
from pyrovae.conditionals.density import LogScaleNormal, Mixture
from pyrovae.nets import Constant, _check_sizes


def no_mlp(cls: type[Conditional], *args: Any, **kwargs: Any) -> Any:
    """Not there: a prior has no parents.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"Expected the constructor of {cls.__name__}: it has no parents; got .mlp")


def no_mean(self: Conditional, mean: Tensor) -> Tensor:
    """Not there: a learned prior begins where its constructor says.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"Expected a family with a mean to set; got {type(self).__name__}, a learned prior")


def check_root(prior: Conditional, parents: tuple[Tensor, ...]) -> None:
    """Raises TypeError where a root is called with parents."""
    if parents:
        raise TypeError(f"Expected no parents for {type(prior).__name__}; got {len(parents)}")


class MixtureOfNormals(Conditional):
    """p(z) = sum_k pi_k N(z; mu_k, diag(sigma_k^2)),  eta = (log pi, mu, log sigma) learned, a root.

    log pi is known up to a constant. The means begin as draws from N(0, I), the scales and weights equal.

    Args:
        dim: size of z.
        num_components: K.

    Raises:
        ValueError: for a size or K below 1.

    Source:
        Tomczak and Welling (2018), who compare it with the VampPrior.

    Example:
        >>> MixtureOfNormals(2, 10)().event_shape
        torch.Size([2])
    """

    mlp = classmethod(no_mlp)  # pyright: ignore[reportAssignmentType]
    eta_at = no_mean

    def __init__(self, dim: int, num_components: int = 10):
        _check_sizes(dim=dim, num_components=num_components)
        net = Constant(self.eta_dim(dim, num_components), learned=True)
        super().__init__(net)
        self.dim, self.num_components = dim, num_components
        with torch.no_grad():
            net.value[num_components : num_components * (1 + dim)].normal_()

    @staticmethod
    def eta_dim(dim: int, num_components: int = 10) -> int:
        """K log weights, and a mean and a log scale of each component."""
        return num_components * (1 + 2 * dim)

    @property
    def parts(self) -> dict[str, Any]:
        """K."""
        return {"num_components": self.num_components}

    def distribution(self, eta: Tensor) -> Distribution:
        """The mixture from eta `(K + 2 K dim,)`."""
        k = self.num_components
        log_weights, mu, log_sigma = eta.split([k, k * self.dim, k * self.dim], -1)
        mu, log_sigma = (value.unflatten(-1, (k, self.dim)) for value in (mu, log_sigma))
        return Mixture(dist.Categorical(logits=log_weights), LogScaleNormal(mu, log_sigma).to_event(1))


class VampPrior(Conditional):
    """p(z) = (1/K) sum_k q(z | u_k): the posterior at K learned pseudo-inputs, a root.

    The posterior is the very module that the model has, not a copy: both learn it, and it is saved once. A batch norm
    within it sees the pseudo-inputs as a batch of their own.

    For data in [0, 1], u_k = sigmoid(v_k) with v_k learned, in the place of the paper's clipped linear map, whose
    gradient is zero beyond its bounds.

    Args:
        posterior: q(z | x), with one parent.
        x_dim: size of a datum, and so of a pseudo-input.
        num_components: K.
        unit_interval: whether data, and so pseudo-inputs, lie within [0, 1].

    Raises:
        ValueError: for a size or K below 1, or an x_dim that is not the size of the posterior's input.

    Source:
        Tomczak and Welling (2018), section 3.

    Example:
        >>> from pyrovae import VAE
        >>> from pyrovae.conditionals import Bernoulli, DiagonalNormal
        >>> q = DiagonalNormal.mlp(784, 20)
        >>> vae = VAE(VampPrior(q, 784, num_components=5), Bernoulli.mlp(20, 784), q)
        >>> vae.prior().event_shape
        torch.Size([20])
    """

    mlp = classmethod(no_mlp)  # pyright: ignore[reportAssignmentType]
    eta_at = no_mean

    def __init__(self, posterior: Conditional, x_dim: int, num_components: int = 500, unit_interval: bool = True):
        super().__init__(net=None)
        _check_sizes(x_dim=x_dim, num_components=num_components)
        check_conditionals(posterior=posterior)
        expected = _input_size(posterior)
        if expected is not None and expected != x_dim:
            raise ValueError(f"Expected x_dim to be the size of the posterior's input, {expected}; got {x_dim}")
        self.posterior, self.x_dim = posterior, x_dim
        self.num_components, self.unit_interval = num_components, unit_interval
        self.free = nn.Parameter(torch.randn(num_components, x_dim))

    @staticmethod
    def eta_dim(dim: int) -> int:
        """Nothing beside the posterior's own."""
        return 0

    @property
    def pseudo_inputs(self) -> Tensor:
        """u_k, `(K, X)`."""
        return self.free.sigmoid() if self.unit_interval else self.free

    @torch.no_grad()
    def start_from(self, x: Tensor) -> Self:
        """Set the pseudo-inputs to given data; within [0, 1] they are kept within [0.01, 0.99], where sigmoids learn.

        Args:
            x: `(K, X)`, as K data of the training set.

        Raises:
            ValueError: for another number or size, or data outside [0, 1] where that is where they lie.
        """
        if x.dim() != 2 or x.shape[1] != self.x_dim:
            raise ValueError(
                f"Expected pseudo-inputs of the size of the posterior's input, (K, {self.x_dim}); got {tuple(x.shape)}"
            )
        if len(x) != self.num_components:
            raise ValueError(f"Expected {self.num_components} pseudo-inputs, one for each component; got {len(x)}")
        if self.unit_interval and not bool(((x >= 0) & (x <= 1)).all()):
            worst = x.flatten()[(x - 0.5).abs().argmax()].item()
            raise ValueError(f"Expected pseudo-inputs within [0, 1], or unit_interval=False; got {worst:g}")
        self.free.copy_(x.clamp(0.01, 0.99).logit() if self.unit_interval else x)
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """The posterior's functions by hand."""
        return {"posterior": self.posterior.by_hand(reference.POSTERIORS)}

    def eta(self, *parents: Tensor) -> Tensor:
        """The posterior's parameters at the pseudo-inputs, `(K, E)`."""
        check_root(self, parents)
        return self.posterior.eta(self.pseudo_inputs)

    def distribution(self, eta: Tensor) -> Distribution:
        """The mixture from the posterior's eta `(K, E)`."""
        return Mixture(dist.Categorical(logits=eta.new_zeros(len(eta))), self.posterior.distribution(eta))


def _input_size(posterior: Conditional) -> int | None:
    """What the posterior's network takes, where it tells."""
    size, image_shape = getattr(posterior.net, "in_dim", None), getattr(posterior.net, "image_shape", None)
    return math.prod(image_shape) if size is None and image_shape is not None else size
