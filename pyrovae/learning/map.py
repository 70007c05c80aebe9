"""Priors on the parameters of a model: the mode of theta in the place of the likeliest."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.batches import Batch, as_data, count, stream
from pyrovae.bounds import bound, check_bound
from pyrovae.fit import _check_objects, fit
from pyrovae.learning.local import FIRST
from pyrovae.noise import forked
from pyrovae.objectives import _variables
from pyrovae.program import LatentModel, device_of
from pyrovae.run import History
from pyrovae.supervision import EnumeratedELBO
from pyrovae.survey import Survey
from pyrovae.traces import Cut, check_arguments


def model_parameters(program: LatentModel, batch: Batch) -> dict[str, nn.Parameter]:
    """The parameters theta that log p(x, z) depends on, z being fixed, by their names in the program.

    They are the leaves of its graph of gradients, whatever their names; those that are kept fixed
    (`requires_grad_(False)`) are not among them. What the model shares with the guide, as the encoder within a
    `VampPrior`, is the model's.

    Args:
        program: a `LatentModel`.
        batch: data, a dict of tensors.

    Raises:
        ValueError: for a model without parameters to train.
    """
    with forked(), pyro.validation_enabled(False):
        with program.inference():
            program.model(**batch)  # makes what pyro.param declares
        with torch.enable_grad(), program.scope(), program.modes_kept(), Cut():
            program.eval()
            trace = poutine.trace(program.model).get_trace(**batch)
            leaves = set(map(id, _variables(torch.as_tensor(trace.log_prob_sum()))))
    theta = {name: p for name, p in program.named_parameters() if id(p) in leaves}
    if not theta:
        raise ValueError(f"Expected a model with parameters to train; got none in {type(program).__name__}")
    return theta


class _WithPrior(ELBO):
    """An ELBO whose loss has -(B/N) log p(theta) added, B the data of the minibatch: over an epoch -log p(theta).

    Args:
        elbo: of which only `differentiable_loss` is asked.
        terms: parameters, each with its prior.
        num_data: N.
    """

    def __init__(self, elbo: Any, terms: list[tuple[nn.Parameter, Any]], num_data: int):
        super().__init__()
        self.elbo, self.terms, self.num_data = elbo, terms, num_data
        self.parts = (elbo, *getattr(elbo, "parts", ()))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss `()` of a minibatch, to be differentiated."""
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        log_prior = sum((fn.log_prob(parameter).sum() for parameter, fn in self.terms), torch.zeros(()))
        return self.elbo.differentiable_loss(model, guide, *args, **kwargs) - rows / self.num_data * log_prior

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the ELBO within draws its own traces")


def fit_map(
    program: LatentModel,
    train: Any,
    val: Any = None,
    *,
    prior: Distribution | Mapping[str, Distribution],
    elbo: ELBO | None = None,
    **settings: Any,
) -> History:
    """`fit` with a prior on the model's parameters: a bound on log p(D, theta) is maximised, not one on log p(D).

        sum_i L(x_i) + log p(theta),   of which a minibatch of B data takes   sum_M L(x) + (B/N) log p(theta)

    without bias. The guide's parameters phi have no prior; which are the model's is told by `model_parameters`.

    Where it comes to rest: at the mode of p(theta | D) where the guide holds the posterior, and O(1/N) beside maximum
    likelihood. The density is that of the numbers that torch holds, for a constrained `pyro.param` the unconstrained
    ones; the mode is another in other coordinates. Beside that there is the noise of `fit`.

    Args:
        program, train, val: as for `fit`; train must be of known length.
        prior: of every number of the model's parameters; or a dict of such by the parameters' names, as
            `program.named_parameters()` has them. Parameters that it does not name have a flat prior.
        elbo: as for `fit`.
        settings: all others of `fit` but `labeled`.

    Returns:
        As `fit`; `loss` is minus (bound + log p(theta)) / N, `elbo` the ELBO alone.

    Raises:
        ValueError: as `fit`; for a prior that is no distribution, gives a parameter no density or has another shape,
            or is that of no parameter of the model.

    Source:
        Kingma and Welling (2014), appendix F, of which this is the mode in theta.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyrovae import LinearGaussian
        >>> program, x = LinearGaussian(5, 2), torch.randn(64, 5)
        >>> history = fit_map(program, x, prior=dist.Normal(0.0, 1.0), epochs=1, progress=False)
        >>> history[0]["loss"] > -history[0]["elbo"]
        True
    """
    check_arguments(program)
    if settings.get("labeled") is not None:
        raise ValueError("Expected train and val alone with a prior; got labeled")
    check_bound(elbo, settings.get("kl_weight", 1.0), settings.get("free_bits"), None)
    inner: Any = bound(settings.pop("free_bits", None)) if elbo is None else elbo
    _check_objects(inner, torch.optim.Adam)
    train = as_data(train, "train")
    num_data = count(train)
    if num_data is None:
        raise ValueError("Expected train of known length with a prior; got an iterable data set")
    with forked():
        first = next(stream(train, FIRST, device=device_of(program), name="train"), None)
    if first is None:
        raise ValueError("Expected train to hold at least one datum; got an empty DataLoader")
    survey = Survey.of(program, first, "train")
    if survey.label is not None and settings.get("labels", "enumerate") == "enumerate":
        inner = EnumeratedELBO(inner, survey.label, survey.nesting)
        settings["labels"] = "sample"  # what fit would sum over is summed over within
    terms = _terms(model_parameters(program, first), prior)
    return fit(program, train, val, elbo=_WithPrior(inner, terms, num_data), **settings)


def _terms(theta: dict[str, nn.Parameter], prior: Any) -> list[tuple[nn.Parameter, Any]]:
    """Parameters with their priors."""
    terms = []
    for name, fn in (prior if isinstance(prior, Mapping) else dict.fromkeys(theta, prior)).items():
        if name not in theta:
            raise ValueError(f"Expected prior for parameters of the model, {', '.join(theta)}; got one for {name!r}")
        if not isinstance(fn, Distribution):
            raise ValueError(f"Expected prior to be a distribution, or a dict of them; got {type(fn).__name__}")
        shape = tuple(theta[name].shape)
        try:
            fits = tuple(torch.broadcast_shapes(fn.batch_shape + fn.event_shape, shape)) == shape
        except RuntimeError:
            fits = False
        if not fits:
            given = tuple(fn.batch_shape + fn.event_shape)
            raise ValueError(f"Expected prior of shape {shape}, or one number's, for {name!r}; got {given}")
        if not bool(torch.isfinite(fn.log_prob(theta[name]).sum())):
            raise ValueError(f"Expected prior to give {name!r} a density as it begins; got {type(fn).__name__}")
        terms.append((theta[name], fn))
    return terms
