"""Labelled and unlabelled data together, for any program with a label."""

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor

from pyrovae.batches import Batch, Data, num_rows
from pyrovae.bounds import TracedELBO
from pyrovae.labels import Fixed, Label, enumerated, site_of, without
from pyrovae.noise import forked
from pyrovae.program import LatentModel
from pyrovae.survey import Survey

Labels = Literal["enumerate", "sample"]


class EnumeratedELBO(ELBO):
    """The loss U of data whose label is not known: all classes are summed over, by `TraceEnum_ELBO`.

    Args:
        elbo: of Pyro; its particles are kept.
        label: of the program.
        nesting: number of dimensions that the program's own plates take.

    Raises:
        ValueError: for a bound of ours, which enumerates nothing.
    """

    def __init__(self, elbo: Any, label: Label, nesting: int):
        super().__init__()
        if isinstance(elbo, TracedELBO):
            raise ValueError(
                "Expected an ELBO of Pyro's, as Trace_ELBO, or data that show it, for a program with a label "
                f"{label.name!r}; got {type(elbo).__name__}"
            )
        self.label = label
        self.elbo = TraceEnum_ELBO(
            num_particles=elbo.num_particles,
            vectorize_particles=elbo.vectorize_particles,
            max_plate_nesting=nesting if elbo.max_plate_nesting == torch.inf else elbo.max_plate_nesting,
        )
        self.parts = (self.elbo,)

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], **batch: Tensor) -> Any:
        """The loss `()` of a minibatch, to be differentiated."""
        return self.elbo.differentiable_loss(model, enumerated(guide, self.label.name), **batch)

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("TraceEnum_ELBO draws traces of its own")


class SemiSupervisedELBO(ELBO):
    """The loss of unlabelled and labelled data (Kingma et al. 2014, eq. 6 to 9), weighted by arguments.

        scales["unlabeled"] sum U(x) + scales["labeled"] sum L(x, y) + scales["classes"] sum -log q(y | x)

    Args:
        elbo: whose loss L is, and U where labels are sampled.
        label: of the program.
        nesting: number of dimensions that the program's own plates take.
        labels: whether unlabelled classes are summed over, by `TraceEnum_ELBO`, or drawn from q(y | x).
    """

    def __init__(self, elbo: Any, label: Label, nesting: int, labels: Labels = "enumerate"):
        super().__init__()
        self.label = label
        self.labeled = copy(elbo)
        if self.labeled.max_plate_nesting == torch.inf:
            self.labeled.max_plate_nesting = nesting
        self.unlabeled = EnumeratedELBO(elbo, label, nesting) if labels == "enumerate" else self.labeled
        self.parts = self.labeled, *getattr(self.unlabeled, "parts", ())

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        unlabeled: Batch | None,
        labeled: Batch | None,
        scales: dict[str, float],
    ) -> Any:
        """The loss `()` of a minibatch of each, to be differentiated; None leaves one of them out."""
        loss: Any = 0.0
        if unlabeled is not None:
            loss = loss + scales["unlabeled"] * self.unlabeled.differentiable_loss(model, guide, **unlabeled)
        if labeled is not None:
            loss = loss + scales["labeled"] * self.labeled.differentiable_loss(model, guide, **labeled)
            loss = loss - scales["classes"] * log_class(model, guide, labeled, self.label).sum()
        return loss

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("its parts draw traces of their own")


def log_class(model: Callable[..., Any], guide: Callable[..., Any], labeled: Batch, label: Label) -> Tensor:
    """log q(y | x) of the labels that labelled data have, `(N,)`, read from the guide."""
    value = site_of(model, label.name, labeled)["value"]
    with Fixed(label.name, value):
        site = site_of(guide, label.name, without(label.name, labeled))
    return site["fn"].log_prob(site["value"])


class Supervision:
    """The labelled data of a training run: their minibatches, what these weigh, and how they are classified.

    Args:
        program: a `LatentModel` with a label; the caller has entered its scope whenever it runs.
        labeled: data with labels.
        num_unlabeled: N_u; 0 where there are none.
        batch_size: labelled data in a minibatch.
        weight: alpha; None for 0.1 (N_l + N_u).

    Raises:
        ValueError: for a program without a label, data without labels, labels that are none of the classes.
    """

    def __init__(self, program: LatentModel, labeled: Data, num_unlabeled: int, batch_size: int, weight: float | None):
        self.program, self.labeled, self.num_unlabeled = program, labeled, num_unlabeled
        self.batch_size = min(batch_size, len(labeled))
        self.weight = 0.1 * (len(labeled) + num_unlabeled) if weight is None else weight
        name = program.label
        if name not in labeled.tensors:
            raise ValueError(f"Expected labeled to hold labels {name!r}; got {', '.join(labeled.tensors)}")
        first = next(labeled.batches(len(labeled)))
        # what is known of the program where labels are hidden, and where they are shown
        self.hidden = Survey.of(program, without(name, first), "labeled")
        if self.hidden.label is None:
            raise ValueError(
                f"Expected a program with a label {name!r}, a latent of finitely many values, with labeled; "
                f"got {type(program).__name__}, whose guide draws none"
            )
        self.label = self.hidden.label
        present = self.classes(first, "labeled").unique()
        absent = [c for c in range(len(self.label.values)) if c not in present]
        if absent:
            warnings.warn(
                f"labeled has no datum of {'class' if len(absent) == 1 else 'classes'} "
                f"{', '.join(map(str, absent))} of {len(self.label.values)}",
                stacklevel=5,
            )
        self.survey = Survey.of(program, first, "labeled")

    def classes(self, batch: Batch, name: str) -> Tensor:
        """The numbers of the classes that data show, `(N,)`.

        Raises:
            ValueError: for a label that is none of the classes.
        """
        with forked(), self.program.inference(), pyro.validation_enabled(False):
            value = site_of(self.program.model, self.label.name, batch)["value"]
        event = tuple(self.label.values.shape[1:])
        if value.shape != (num_rows(batch), *event):
            kind = f"one-hot vectors (N, {event[0]})" if event else "integers (N,)"
            raise ValueError(
                f"Expected {name}[{self.label.name!r}] as site {self.label.name!r} has its classes, {kind}; "
                f"got shape {tuple(value.shape)}"
            )
        found = self.label.classes_of(value)
        wrong = (found == len(self.label.values)).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise ValueError(
                f"Expected {name}[{self.label.name!r}] among {len(self.label.values)} classes; "
                f"got {batch[self.label.name][index].tolist()} at index {index}"
            )
        return found

    def mistakes(self, batch: Batch, name: str) -> int:
        """How many data's likeliest class under q(y | x) is not the one that they show."""
        predicted = self.program.predict(batch).argmax(1)
        return int((predicted != self.classes(batch, name)).sum())

    def cross_entropy(self, seed: int) -> float:
        """-log q(y | x) averaged over the labelled data, nats; `seed` is that of what is drawn to show them."""
        with self.program.inference(seed):
            batch = next(self.labeled.batches(len(self.labeled)))
            return -log_class(self.program.model, self.program.guide, batch, self.label).mean().item()

    def joined(self, batches: Iterator[Batch], shuffle: torch.Generator) -> Iterator[tuple[dict[str, Any], float]]:
        """What `SemiSupervisedELBO` takes in each step of an epoch, and how many data of all the step stands for.

        The two sums over the data are each estimated from a minibatch of their own, times N over its size; the step
        has the share of the whole that its unlabelled data are of theirs.

        Args:
            batches: of the unlabelled data; of the labelled ones where there are no others.
            shuffle: of the labelled data.
        """
        num_labeled = len(self.labeled)
        beside = self.labeled.endless(self.batch_size, shuffle) if self.num_unlabeled else None
        for batch in batches:
            if beside is None:
                scales = {"unlabeled": 0.0, "labeled": 1.0, "classes": self.weight / num_labeled}
                yield {"unlabeled": None, "labeled": batch, "scales": scales}, num_rows(batch)
                continue
            share = num_rows(batch) / self.num_unlabeled  # of the whole objective that this step stands for
            scales = {
                "unlabeled": 1.0,
                "labeled": share * num_labeled / self.batch_size,
                "classes": share * self.weight / self.batch_size,
            }
            yield (
                {"unlabeled": batch, "labeled": next(beside), "scales": scales},
                share * (num_labeled + self.num_unlabeled),
            )
