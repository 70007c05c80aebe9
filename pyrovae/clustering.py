"""How well clusters found without classes agree with the classes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clustering:
    """Agreement of clusters with classes, whatever the clusters' numbers; 1 is perfect.

    Attributes:
        accuracy: share of data in the cluster of their class, each class having the one cluster, or none, with which
            that share is largest.
        nmi: normalized mutual information, over the mean of both entropies; 0 for independent ones.
        ari: adjusted Rand index, of pairs of data that are together or apart in both; 0 is what chance gives.
    """

    accuracy: float
    nmi: float
    ari: float


def check_classes(classes: Tensor, name: str = "classes") -> None:
    """Raises ValueError for what is no tensor of integers `(N,)`, N > 0."""
    sound = isinstance(classes, Tensor) and classes.dim() == 1 and len(classes) > 0
    if not sound or classes.is_floating_point() or classes.is_complex():
        shape = f"{classes.dtype} of shape {tuple(classes.shape)}" if isinstance(classes, Tensor) else repr(classes)
        raise ValueError(f"Expected {name} to be a tensor of integers (N,); got {shape}")


def agreement(clusters: Tensor, classes: Tensor) -> Clustering:
    """Score the clusters of N data.

    Args:
        clusters: integers `(N,)`.
        classes: integers `(N,)`.

    Raises:
        ValueError: for clusters or classes that are no integers, none at all, or of unequal length.

    Source:
        Jiang et al. (2017), eq. 18, for the accuracy; Hubert and Arabie (1985) for the adjusted Rand index.

    Example:
        >>> found = agreement(torch.tensor([2, 2, 0, 0]), torch.tensor([5, 5, 7, 5]))
        >>> found.accuracy, round(found.nmi, 3), round(found.ari, 3)
        (0.75, 0.344, 0.0)
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    check_classes(classes)
    check_classes(clusters, "clusters")
    if len(classes) != len(clusters):
        raise ValueError(f"Expected classes of {len(clusters)} data; got {len(classes)}")
    found, true = clusters.cpu(), classes.cpu()
    rows, columns = (torch.unique(values, return_inverse=True)[1] for values in (found, true))
    counts = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.int64)
    counts.index_put_((rows, columns), torch.ones_like(rows), accumulate=True)
    pairs = linear_sum_assignment(counts.numpy(), maximize=True)
    return Clustering(
        accuracy=counts[pairs].sum().item() / len(true),
        nmi=float(normalized_mutual_info_score(true.numpy(), found.numpy())),
        ari=float(adjusted_rand_score(true.numpy(), found.numpy())),
    )
