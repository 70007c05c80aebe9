"""The variational autoencoder with several stochastic layers."""

from collections.abc import Sequence
from typing import Literal, Self, cast, get_args

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrovae import reference
from pyrovae.arguments import check_one_of
from pyrovae.conditionals import Bernoulli, Conditional, DiagonalNormal, StandardNormal
from pyrovae.conditionals.conditional import check_conditionals, check_families
from pyrovae.nets import Activation, _check_sequence, _check_sizes
from pyrovae.program import LatentModel, data_plate

GuideKind = Literal["bottom-up", "top-down", "ladder"]


class HierarchicalVAE(LatentModel):
    """A VAE of L stochastic layers (Rezende et al. 2014; Burda et al. 2016; Sønderby et al. 2016).

        z_L ~ p(z_L),  z_l ~ p(z_l | z_{l+1}),  x ~ p(x | z_1)

    and one of three guides:

        bottom-up   z_1 ~ q(z_1 | x),  z_l ~ q(z_l | z_{l-1})
        top-down    z_L ~ q(z_L | x),  z_l ~ q(z_l | z_{l+1}, x)
        ladder      z_L ~ q(z_L | x),  z_l ~ q(z_l | z_{l+1}, x) proportional to q^(z_l | x) p(z_l | z_{l+1})

    The ladder's product of two diagonal Gaussians is one itself: its precision is the sum of theirs, its mean theirs
    weighted by precision. Each q^ has a network of its own from x; Sønderby et al. share one upward path, with batch
    norm, among all layers. Its guide is the prior wherever q^ is wide, and training may leave it there, z_1 telling
    nothing of x beyond z_2: their remedy is a KL weight that rises, `fit(..., kl_weight=Linear(steps))`.

    The sites are z1, ..., zL.

    Args:
        priors: p(z_1 | z_2), ..., p(z_{L-1} | z_L), p(z_L); the last one a root.
        likelihood: p(x | z_1).
        posteriors: those of z_1, ..., z_L, the parents in the order written above; for a ladder all given x alone.
        guide_kind: bottom-up, top-down or ladder.

    Raises:
        ValueError: for no layer, lists of unequal length, an unknown guide_kind, or a ladder with priors or posteriors
            other than DiagonalNormal below its top.

    Example:
        >>> HierarchicalVAE.mlp(784, (20, 10)).encode(torch.zeros(3, 784), site="z2").shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        priors: Sequence[Conditional],
        likelihood: Conditional,
        posteriors: Sequence[Conditional],
        guide_kind: GuideKind = "bottom-up",
    ):
        super().__init__()
        for name, each in (("priors", priors), ("posteriors", posteriors)):
            if not isinstance(each, list | tuple | nn.ModuleList):
                raise ValueError(f"Expected {name} to be a list of Conditionals; got {type(each).__name__}")
            check_conditionals(**{f"{name}[{i}]": conditional for i, conditional in enumerate(each)})
        check_conditionals(likelihood=likelihood)
        if not len(priors) == len(posteriors) > 0:
            raise ValueError(
                "Expected priors and posteriors to be lists of one common length, at least 1; "
                f"got {len(priors)} and {len(posteriors)}"
            )
        check_one_of(get_args(GuideKind), guide_kind=guide_kind)
        if guide_kind == "ladder":
            _check_ladder(priors=priors, posteriors=posteriors)
        self.priors = cast("Sequence[Conditional]", nn.ModuleList(priors))
        self.likelihood = likelihood
        self.posteriors = cast("Sequence[Conditional]", nn.ModuleList(posteriors))
        self.guide_kind: GuideKind = guide_kind

    @classmethod
    def mlp(
        cls,
        x_dim: int,
        z_dims: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        *,
        guide_kind: GuideKind = "bottom-up",
        likelihood: type[Conditional] = Bernoulli,
        activation: Activation = "tanh",
    ) -> Self:
        """Perceptrons, a standard normal p(z_L), and diagonal Gaussians; by default Burda et al.'s two-layer network.

        With z_0 = x, p(z_{l-1} | z_l) has the hidden layers hidden[l-1] in reverse, and so has, not reversed, the
        bottom-up q(z_l | z_{l-1}). The other guides' networks for z_l take x, so theirs are all of
        hidden[0], ..., hidden[l-1]: between x and z_l lie the same layers for every guide, with draws in between, or
        without. Since each z_l then has a network of its own from x, those guides have more weights.

        Args:
            x_dim: size of a datum.
            z_dims: sizes of z_1, ..., z_L.
            hidden: for each layer the units of the hidden layers between z_{l-1} and z_l.
            guide_kind: bottom-up, top-down or ladder.
            likelihood: family of p(x | z_1).
            activation: after every hidden layer.

        Raises:
            ValueError: for no layer, or hidden of another length.
        """
        check_families(likelihood=likelihood)
        check_one_of(get_args(GuideKind), guide_kind=guide_kind)
        _check_sizes(x_dim=x_dim)
        _check_sequence("z_dims", z_dims, (100, 50))
        if not isinstance(hidden, list | tuple):
            raise ValueError(f"Expected hidden to be a sequence of sizes for each layer; got {hidden!r}")
        for i, each in enumerate(hidden):
            _check_sequence(f"hidden[{i}]", each, (200, 200))
        if not len(z_dims) == len(hidden) > 0:
            raise ValueError(
                f"Expected z_dims and hidden to have one common length, at least 1; got {len(z_dims)} and {len(hidden)}"
            )
        sizes, top = (x_dim, *z_dims), len(z_dims)
        decoder = likelihood.mlp(z_dims[0], x_dim, hidden[0][::-1], activation)
        priors: list[Conditional] = [
            DiagonalNormal.mlp(sizes[i + 1], sizes[i], hidden[i][::-1], activation) for i in range(1, top)
        ]
        posteriors = []
        for i in range(top):
            parents, units = sizes[i], hidden[i]
            if guide_kind != "bottom-up":
                above = z_dims[i + 1] if guide_kind == "top-down" and i + 1 < top else 0
                parents, units = above + x_dim, [size for layer in hidden[: i + 1] for size in layer]
            posteriors.append(DiagonalNormal.mlp(parents, z_dims[i], units, activation))
        return cls([*priors, StandardNormal(z_dims[-1])], decoder, posteriors, guide_kind)

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2) p(x | z_1)."""
        top = len(self.priors) - 1
        with data_plate(x):
            z = pyro.sample(f"z{top + 1}", self.priors[top]())
            for i in reversed(range(top)):
                z = pyro.sample(f"z{i + 1}", self.priors[i](z))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z_1, ..., z_L | x)."""
        layers = range(len(self.posteriors))
        z: dict[int, Tensor] = {}
        with data_plate(x):
            for i in layers if self.guide_kind == "bottom-up" else reversed(layers):
                z[i] = pyro.sample(f"z{i + 1}", self.posteriors[i].distribution(self._posterior_eta(i, x, z)))

    def _posterior_eta(self, i: int, x: Tensor, z: dict[int, Tensor]) -> Tensor:
        """eta of the posterior of z_{i+1}, given the layers that the guide has drawn before."""
        posterior, top = self.posteriors[i], len(self.posteriors) - 1
        if self.guide_kind == "bottom-up":
            return posterior.eta(x if i == 0 else z[i - 1])
        if i == top:
            return posterior.eta(x)
        if self.guide_kind == "top-down":
            return posterior.eta(z[i + 1], x)
        return _product(posterior.eta(x), self.priors[i].eta(z[i + 1]))

    def reference_elbo(self, x: Tensor, **z: Tensor) -> Tensor | None:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z1, ..., zL, each `(*, N, D)`.

        None where `reference` has not all families.
        """
        values = {i: z[f"z{i + 1}"] for i in range(len(self.posteriors))}
        *below, root = self.priors
        families = [posterior.by_hand(reference.POSTERIORS) for posterior in self.posteriors]
        log_p = [prior.by_hand(reference.LIKELIHOODS) for prior in below]
        log_x, log_root = self.likelihood.by_hand(reference.LIKELIHOODS), root.by_hand(reference.PRIORS)
        if None in (*families, *log_p, log_x, log_root):
            return None
        with torch.no_grad():  # the noise is given: gradients flow through the latents alone
            eps = [
                noise(values[i], self._posterior_eta(i, x, values).expand(*values[i].shape[:-1], -1))
                for i, (_, noise) in enumerate(families)
            ]
        return reference.hierarchical_elbo(
            x,
            eps,
            guide_kind=self.guide_kind,
            posterior_nets=[posterior.eta for posterior in self.posteriors],
            prior_nets=[prior.eta for prior in below],
            likelihood_net=self.likelihood.eta,
            posteriors=[transform for transform, _ in families],
            priors=log_p,
            likelihood=log_x,
            log_prior=lambda top: log_root(top, root.eta()),
        )


def _check_ladder(**families: Sequence[Conditional]) -> None:
    for name, conditionals in families.items():
        for conditional in conditionals[:-1]:
            if not isinstance(conditional, DiagonalNormal):
                raise ValueError(
                    f"Expected {name} of a ladder below its top to be of DiagonalNormal; "
                    f"got {type(conditional).__name__}"
                )


def _product(first: Tensor, second: Tensor) -> Tensor:
    """eta of the normalised product of two diagonal Gaussians, each eta = (mu, log sigma) `(*, 2 D)`.

    sigma^2 = sigma_1^2 w,  mu = w mu_1 + (1 - w) mu_2,  w = sigma_2^2 / (sigma_1^2 + sigma_2^2)
    """
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            "Expected a posterior of a ladder to be as large as the prior that it is multiplied with; "
            f"got {first.shape[-1] // 2} and {second.shape[-1] // 2}"
        )
    (mu_1, log_sigma_1), (mu_2, log_sigma_2) = first.chunk(2, -1), second.chunk(2, -1)
    log_odds = 2 * (log_sigma_2 - log_sigma_1)
    return torch.cat(
        [torch.lerp(*torch.broadcast_tensors(mu_2, mu_1, log_odds.sigmoid())), log_sigma_1 + logsigmoid(log_odds) / 2],
        -1,
    )
