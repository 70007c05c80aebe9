"""Gaussian mixtures, p(c) p(a | c): their parts, a start by k-means, and expectation-maximization."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from pyrovae.arguments import check_number, check_one_of, check_seed
from pyrovae.batches import as_batch, check_finite
from pyrovae.conditionals import Conditional, DiagonalNormal, FullNormal, OneHotCategorical
from pyrovae.nets import MLP, Constant, _check_sizes

Covariance = Literal["diagonal", "full"]
Parameters = tuple[Tensor, Tensor]  # logits (C,) and eta (C, E), float64
FAMILIES: dict[str, type[Conditional]] = {"diagonal": DiagonalNormal, "full": FullNormal}
ROWS = 8192  # data at once, whose distance from every cluster is taken
GAIN, TRIES = 1e-4, 5  # what splitting and merging must add, nats per datum; how many such moves are tried at a time
FLOOR = 1e-6  # added to every variance, lest a cluster fall upon one datum; scikit-learn's


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
    check_one_of(FAMILIES, covariance=covariance)
    family = FAMILIES[covariance]
    net = MLP(num_clusters, family.eta_dim(dim), (), out_bias=False)
    nn.init.zeros_(_matrix(net))
    nn.init.normal_(_matrix(net).data[:dim])
    return family(net)


def log_joint(p_c: Conditional, p_a: Conditional, a: Tensor) -> Tensor:
    """log p(c, a) of every cluster c at each a `(*, D)`: `(*, C)`."""
    logits = p_c.eta()
    return _log_joint(p_a, (logits, p_a.eta(torch.eye(len(logits)).to(logits))), a)


def vectors(x: Any, num_clusters: int, dim: int | None = None) -> Tensor:
    """The data x `(N, dim)` of a tensor, a batch or a `Data`.

    Raises:
        ValueError: for data of another shape, NaN or infinity, or fewer data than clusters.
    """
    batch = as_batch(x, "x")
    check_finite(batch, "x")
    x = batch.get("x", torch.zeros(()))
    if x.dim() != 2 or x.shape[1] != (dim or x.shape[1]):
        raise ValueError(f"Expected x of shape (N, {dim or 'D'}); got {tuple(x.shape)}")
    if len(x) < num_clusters:
        raise ValueError(f"Expected x to have a datum for each of {num_clusters} clusters, or more; got {len(x)}")
    return x


@torch.no_grad()
def start(p_c: Conditional, p_a: Conditional, a: Tensor, seed: int) -> None:
    """Make each cluster the Gaussian of the data that k-means, which begins by k-means++, gives it.

    Args:
        p_c, p_a: of `proportions` and `gaussians`; they are changed.
        a: `(N, D)`.
        seed: of k-means++.
    """
    check_seed(seed, 0, 2**32 - 1)  # NumPy's range
    a = a.double()
    _fill(p_c, p_a, _maximized(type(p_a), a, _k_means(a, len(p_c.eta()), seed), FLOOR))


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
    check_number(tolerance=tolerance, floor=floor)
    with tqdm(total=iterations, desc="EM", unit=" iterations", mininterval=0.5, disable=not progress) as bar:
        parameters, history = _climb(p_a, _parameters(p_c, p_a), a.double(), iterations, tolerance, floor, bar)
    _fill(p_c, p_a, parameters)
    return history


@torch.no_grad()
def split_and_merge(p_c: Conditional, p_a: Conditional, a: Tensor) -> float:
    """EM that does not stay in a local optimum: two clusters are merged, another is split, as long as that helps.

    In each round a few such moves are followed by EM, those first that promise most, until one is found that makes the
    data likelier.

    Args:
        p_c, p_a: of `proportions` and `gaussians`, at which it begins; they are changed.
        a: `(N, D)`.

    Returns:
        The mean of log p(a), nats per datum.

    Source:
        Ueda, Nakano, Ghahramani and Hinton (2000), section 3. They rank the moves by overlap and local fit, we by what
        one step of EM makes of them.
    """
    a = a.double()
    parameters, history = _climb(p_a, _parameters(p_c, p_a), a, 300, GAIN, FLOOR)
    best, better = history[-1], True
    while better:
        better = False
        for q in _moves(p_a, parameters, a, TRIES):
            found, history = _climb(p_a, _maximized(type(p_a), a, q, FLOOR), a, 300, GAIN, FLOOR)
            if history[-1] > best + GAIN:
                parameters, best, better = found, history[-1], True
                break
    _fill(p_c, p_a, parameters)
    return best


def _moves(p_a: Conditional, parameters: Parameters, a: Tensor, tries: int) -> Iterator[Tensor]:
    """Probabilities q `(N, C)` of clusters of which two are merged and one is split, the most promising first."""
    q = _log_joint(p_a, parameters, a).softmax(-1)
    clusters = range(q.shape[1])
    halves = {c: _halves(p_a, q[:, c], a) for c in clusters if q[:, c].sum() > 2}
    some = slice(None, None, math.ceil(len(a) / ROWS))  # of the data, by which moves are judged

    def value(*columns: Tensor) -> float:
        part = torch.stack(columns, 1)[some]
        return _log_joint(p_a, _maximized(type(p_a), a[some], part, FLOOR), a[some]).logsumexp(-1).mean().item()

    def others(*left_out: int) -> list[Tensor]:
        return [q[:, c] for c in clusters if c not in left_out]

    split = {c: value(*others(c), *half.T) for c, half in halves.items()}
    merged = {(i, j): value(*others(i, j), q[:, i] + q[:, j]) for j in clusters for i in range(j)}
    ranked = sorted(
        ((merged[pair] + split[c], pair, c) for pair in merged for c in split if c not in pair), reverse=True
    )
    for _, (i, j), c in ranked[:tries]:
        yield torch.stack([*others(i, j, c), q[:, i] + q[:, j], *halves[c].T], 1)


def _halves(p_a: Conditional, share: Tensor, a: Tensor) -> Tensor:
    """A cluster's shares of the data `(N,)` between two Gaussians, `(N, 2)`, by 2-means and EM among its own data."""
    own = a[share > 0.5] if int((share > 0.5).sum()) > 2 else a
    two = _maximized(type(p_a), own, _k_means(own, 2, seed=0), FLOOR)
    two, _ = _climb(p_a, two, own, 10, 1e-4, FLOOR)
    return share.unsqueeze(1) * _log_joint(p_a, two, a).softmax(-1)


def _climb(
    p_a: Conditional,
    parameters: Parameters,
    a: Tensor,
    iterations: int,
    tolerance: float,
    floor: float,
    bar: Any = None,
) -> tuple[Parameters, list[float]]:
    log_p, history = _log_joint(p_a, parameters, a), []
    while len(history) < iterations and (len(history) < 2 or history[-1] - history[-2] >= tolerance):
        parameters = _maximized(type(p_a), a, log_p.softmax(-1), floor)
        log_p = _log_joint(p_a, parameters, a)
        history.append(log_p.logsumexp(-1).mean().item())
        if bar is not None:
            bar.set_postfix_str(f"log p {history[-1]:.4f}", refresh=False)
            bar.update()
    return parameters, history


def _k_means(a: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The cluster of each datum, one-hot `(N, C)`."""
    from sklearn.cluster import KMeans

    once: Any = 1  # scikit-learn's annotation knows "auto" alone
    found = KMeans(num_clusters, n_init=once, random_state=seed).fit_predict(a.cpu().numpy())
    return one_hot(torch.as_tensor(found, dtype=torch.int64), num_clusters).to(a)


def _log_joint(p_a: Conditional, parameters: Parameters, a: Tensor) -> Tensor:
    logits, eta = parameters
    each = p_a.distribution(eta)
    parts = [each.log_prob(part.unsqueeze(-2)) for part in a.split(ROWS)]
    return logits.log_softmax(-1) + (parts[0] if len(parts) == 1 else torch.cat(parts))


def _maximized(family: type[Conditional], a: Tensor, q: Tensor, floor: float) -> Parameters:
    """The likeliest parameters, the clusters of data `(N, D)` having probabilities q `(N, C)`."""
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
            "Expected clusters whose covariance is positive definite; got one that is not. "
            "Give more data, fewer clusters, or data of a smaller scale"
        )
    row, column = torch.tril_indices(len(mean), len(mean), -1)
    return torch.cat([mean, scale.diagonal().log(), scale[row, column]])


def _parameters(p_c: Conditional, p_a: Conditional) -> Parameters:
    return p_c.eta().double(), _matrix(p_a.net).T.double()


def _fill(p_c: Conditional, p_a: Conditional, parameters: Parameters) -> None:
    net: Any = p_c.net
    net.value.copy_(parameters[0].log_softmax(-1))
    _matrix(p_a.net).copy_(parameters[1].T)


def _matrix(net: Any) -> Tensor:
    return net.layers[-1].weight
