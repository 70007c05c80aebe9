"""A label: a discrete latent of a program that some of the data show."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


@dataclass(frozen=True)
class Label:
    """A latent site with finitely many values.

    Attributes:
        name: of the site, and of the argument of model and guide by which it is observed.
        values: each class as the site has it, `(C, ...)`: numbers, or one-hot vectors.
    """

    name: str
    values: Tensor

    @staticmethod
    def of(site: Any) -> "Label | None":
        """That of a sample site; None where its values cannot be enumerated."""
        if not site["fn"].has_enumerate_support:
            return None
        try:
            values = site["fn"].enumerate_support(expand=False)
        except NotImplementedError:  # several variables in one site
            return None
        return Label(site["name"], values.reshape(len(values), *site["fn"].event_shape))

    def log_prob(self, fn: Any) -> Tensor:
        """The log-probability of each class under a distribution of batch shape `(N,)`, `(N, C)`."""
        values = self.values.reshape(len(self.values), *[1] * len(fn.batch_shape), *fn.event_shape)
        return fn.log_prob(values).movedim(0, -1)

    def classes_of(self, values: Tensor) -> Tensor:
        """The numbers `(N,)` of the classes of a site's values `(N, ...)`; C for what is none."""
        classes = len(self.values)
        same = (values.unsqueeze(1) == self.values.to(values)).reshape(len(values), classes, -1).all(-1)
        return torch.where(same.any(1), same.int().argmax(1), classes)


class Fixed(Messenger):
    """Gives a latent site this value `(N, ...)`, for all particles; it stays a latent site."""

    def __init__(self, name: str, value: Tensor):
        super().__init__()
        self.name, self.value = name, value

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not msg["is_observed"]:
            msg["value"] = self.value.expand(msg["fn"].shape())
            msg["done"] = True


class Shared(Messenger):
    """Gives all classes one draw of the latents that a guide draws before its label, which do not depend on it.

    Args:
        label: its name.
        plate: name of the plate over the data, in which N data are repeated class by class.
        num_classes: C.
        num_data: N.
    """

    def __init__(self, label: str, plate: str, num_classes: int, num_data: int):
        super().__init__()
        self.label, self.plate, self.sizes = label, plate, (-1, num_classes, num_data)
        self.before = True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.before = self.before and msg["name"] != self.label
        plate = next((frame for frame in msg["cond_indep_stack"] if frame.name == self.plate), None)
        if self.before and plate is not None and not msg["is_observed"]:
            dim = msg["value"].dim() + plate.dim - msg["fn"].event_dim
            values = msg["value"].unflatten(dim, self.sizes)
            msg["value"] = values.narrow(dim + 1, 0, 1).expand_as(values).flatten(dim, dim + 2)


def enumerated(guide: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The guide, for an ELBO that sums over all classes of the label of this name."""

    def in_parallel(site: Any) -> Any:
        return {"enumerate": "parallel"} if site["name"] == name else {}

    return poutine.infer_config(guide, in_parallel)


class _Until(Messenger):
    """Ends a program once it has passed a sample site."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise _Passed(msg)


class _Passed(Exception):
    def __init__(self, site: Any):
        super().__init__()
        self.site = site


def site_of(function: Callable[..., Any], name: str, batch: dict[str, Tensor]) -> Any:
    """The sample site of that name, up to which the program runs; None where there is none."""
    try:
        with _Until(name):
            function(**batch)
    except _Passed as passed:
        return passed.site
    return None


def without(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that does not show its labels, or what is known of all sites but the label."""
    return {key: value for key, value in batch.items() if key != name}
