"""Gaussian mixtures, p(c) p(a | c): their parts, a start by k-means, and expectation-maximization."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from pyrovae.conditionals import Conditional, DiagonalNormal, FullNormal, OneHotCategorical
from pyrovae.nets import MLP, Constant, _check_sizes

Covariance = Literal["diagonal", "full"]
FAMILIES: dict[str, type[Conditional]] = {"diagonal": DiagonalNormal, "full": FullNormal}
ROWS = 8192  # data at once, whose distance from every cluster is taken


def proportions(num_clusters: int) -> OneHotCategorical:
    """p(c), learned; it begins uniform."""
    _check_sizes(num_clusters=num_clusters)
    return OneHotCategorical(Constant(num_clusters, learned=True))


def gaussians(dim: int, num_clusters: int, covariance: Covariance) -> Conditional:
    """p(a | c), a Gaussian for each cluster; its network is one matrix, whose columns are their parameters eta.

    The means begin as draws from N(0, I), the covariances at I.

    Args:
        dim: size of a.
        num_clusters: C.
        covariance: diagonal or full.

    Raises:
        ValueError: for a size below 1, or another covariance.
    """
    _check_sizes(dim=dim, num_clusters=num_clusters)
    if covariance not in FAMILIES:
        raise ValueError(f"Expected covariance to be one of {', '.join(FAMILIES)}; got {covariance!r}")
    family = FAMILIES[covariance]
    net = MLP(num_clusters, family.eta_dim(dim), (), out_bias=False)
    nn.init.zeros_(_matrix(net))
    nn.init.normal_(_matrix(net).data[:dim])
    return family(net)


def log_joint(p_c: Conditional, p_a: Conditional, a: Tensor) -> Tensor:
    """log p(c, a) of every cluster c at each a `(*, D)`: `(*, C)`."""
    logits = p_c.eta()
    every = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return _log_joint(p_a, logits, p_a.eta(every), a)


def check_data(x: Tensor, dim: int, num_clusters: int) -> None:
    """Raises ValueError for data that are not `(N, dim)`, or fewer than clusters."""
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"Expected x of shape (N, {dim}); got {tuple(x.shape)}")
    if len(x) < num_clusters:
        raise ValueError(f"Expected x to have a datum for each of {num_clusters} clusters, or more; got {len(x)}")


@torch.no_grad()
def start(p_c: Conditional, p_a: Conditional, a: Tensor, seed: int) -> None:
    """Make each cluster the Gaussian of the data that k-means, which begins by k-means++, gives it.

    Args:
        p_c, p_a: of `proportions` and `gaussians`; they are changed.
        a: `(N, D)`.
        seed: of k-means++.
    """
    from sklearn.cluster import KMeans

    num_clusters = len(p_c.eta())
    found = KMeans(num_clusters, n_init=1, random_state=seed).fit_predict(a.double().cpu().numpy())
    q = one_hot(torch.as_tensor(found, dtype=torch.int64), num_clusters).to(a.device, torch.float64)
    _fill(p_c, p_a, *_maximized(type(p_a), a.double(), q, floor=1e-6))


@torch.no_grad()
def em(
    p_c: Conditional, p_a: Conditional, a: Tensor, iterations: int, tolerance: float, floor: float, progress: bool
) -> list[float]:
    """Expectation-maximization until an iteration adds less than `tolerance`; in float64.

    Args:
        p_c, p_a: of `proportions` and `gaussians`, at which it begins; they are changed.
        a: `(N, D)`.
        iterations: at most so many.
        tolerance: nats per datum.
        floor: is added to every variance.
        progress: show a progress bar.

    Returns:
        The mean of log p(a) after each iteration, nats per datum.

    Raises:
        ValueError: for a covariance that is not positive definite.
    """
    _check_sizes(iterations=iterations)
    for name, value in (("tolerance", tolerance), ("floor", floor)):
        if not value >= 0:
            raise ValueError(f"Expected {name} to be a number of at least 0; got {value!r}")
    logits = p_c.eta()
    every = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    logits, eta, a = logits.double(), p_a.eta(every).double(), a.double()
    log_p = _log_joint(p_a, logits, eta, a)
    history: list[float] = []
    with tqdm(total=iterations, desc="EM", unit=" iterations", mininterval=0.5, disable=not progress) as bar:
        while len(history) < iterations and (len(history) < 2 or history[-1] - history[-2] >= tolerance):
            logits, eta = _maximized(type(p_a), a, log_p.softmax(-1), floor)
            log_p = _log_joint(p_a, logits, eta, a)
            history.append(log_p.logsumexp(-1).mean().item())
            bar.set_postfix_str(f"log p {history[-1]:.4f}")
            bar.update()
    _fill(p_c, p_a, logits, eta)
    return history


def _log_joint(p_a: Conditional, logits: Tensor, eta: Tensor, a: Tensor) -> Tensor:
    each = p_a.distribution(eta)
    parts = [each.log_prob(part.unsqueeze(-2)) for part in a.split(ROWS)]
    return logits.log_softmax(-1) + (parts[0] if len(parts) == 1 else torch.cat(parts))


def _maximized(family: type[Conditional], a: Tensor, q: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The likeliest logits `(C,)` and eta `(C, E)`, the clusters of data `(N, D)` having probabilities q `(N, C)`."""
    sizes = q.sum(0) + 10 * torch.finfo(q.dtype).eps  # of a cluster without data, too, a logarithm is taken
    means = q.T @ a / sizes.unsqueeze(1)
    etas = []
    for share, size, mean in zip(q.T, sizes, means, strict=True):
        apart = a - mean
        if family is DiagonalNormal:
            variance = share @ apart**2 / size + floor
            etas.append(torch.cat([mean, variance.log() / 2]))
        else:
            etas.append(_full(mean, (share * apart.T) @ apart / size + floor * torch.eye(len(mean)).to(a)))
    return sizes.log(), torch.stack(etas)


def _full(mean: Tensor, covariance: Tensor) -> Tensor:
    scale, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError(
            "Expected clusters whose covariance is positive definite; got one that is not. Give more data, or a floor"
        )
    row, column = torch.tril_indices(len(mean), len(mean), -1)
    return torch.cat([mean, scale.diagonal().log(), scale[row, column]])


def _fill(p_c: Conditional, p_a: Conditional, logits: Tensor, eta: Tensor) -> None:
    net: Any = p_c.net
    net.value.copy_(logits.log_softmax(-1))
    _matrix(p_a.net).copy_(eta.T)


def _matrix(net: Any) -> Tensor:
    return net.layers[-1].weight
