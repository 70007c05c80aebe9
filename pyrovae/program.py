"""LatentModel and data_plate: a model and a guide as one object."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import OneHotCategorical

from pyrovae.arguments import check_seed, check_whole, is_number
from pyrovae.batches import Batch, as_batch
from pyrovae.labels import Fixed, Label, site_of, without
from pyrovae.noise import forked

MEAN_DRAWS = 1000  # for the mean of a latent whose family knows none, as a flow
_DOT = "%2E"  # torch forbids "." in a parameter's name; Pyro's names have it


def data_plate(x: Tensor | None) -> AbstractContextManager[Any]:
    """The plate named "data", at dimension -1, as long as the batch x `(N, D)`; nothing where x is None.

    Example:
        >>> with data_plate(torch.zeros(5, 2)):
        ...     pyro.sample("z", pyro.distributions.Normal(0., 1.)).shape
        torch.Size([5])
    """
    return nullcontext() if x is None else pyro.plate("data", len(x), dim=-1)


class LatentModel(nn.Module):
    """A generative model and a guide, both plain Pyro programs.

    A subclass writes `model(self, x=None)`, log p(x, z), and `guide(self, x)`, log q(z | x); their latent sites have
    the same names and lie, as x does, in the plate "data". More observed variables are more arguments; a batch is a
    dict whose keys are the arguments' names. `model` returns its data, and draws them where it is called without.

    A latent that some data show, a label, is an argument of both that may be left out; in `model` it is then a latent,
    and `guide` draws it: `model(self, x=None, y=None)`, `guide(self, x, y=None)`.

    Attributes:
        plate_name: name of the plate over the data.
        label: name of the label, where there is one.
    """

    plate_name = "data"
    label = "y"

    def __init__(self) -> None:
        super().__init__()
        # What pyro.param and pyro.module declare, found as the program runs: see scope().
        self.pyro_params = nn.ParameterDict()
        self._constraints: dict[str, Any] = {}
        self._initial: Mapping[str, Tensor] | None = None

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """p(x, z)."""
        raise NotImplementedError(f"{type(self).__name__} has no model")

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """q(z | x)."""
        raise NotImplementedError(f"{type(self).__name__} has no guide")

    def sample(self, n: int, *, mean: bool = False, like: Any = None, **given: Tensor | int) -> Any:
        """Draw n data from the generative model: z ~ p(z), x ~ p(x | z).

        Args:
            n: how many.
            mean: E[x | z] in the place of x, which is what pictures usually show; a draw where it has no closed form.
            like: a batch, needed only for a model that cannot be called without its data: shapes are taken
                from it, and what it gives to observed sites is drawn anew.
            given: arguments of `model` to be held fixed, each `(n, ...)` or one number for all, as y=3: labels,
                conditions; what comes before them in the graph is drawn from its prior all the same.

        Returns:
            What `model` returns, `(n, D)`; with `like`, the value of its data site.

        Raises:
            ValueError: for n < 1, arguments of another length, that are no tensors or numbers or that the model cannot
                run on, or where the data site cannot be told.
        """
        check_whole(n=n)
        required = [
            p.name
            for p in inspect.signature(self.model).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
        ]
        if required and like is None:
            given_as = ", ".join(f"{name}=..." for name in required)
            raise ValueError(
                f"Expected like=a batch, or as conditions {given_as}, for the model needs {', '.join(required)}; "
                "got none"
            )
        fixed = {key: _for_all(key, value, n).to(device_of(self)) for key, value in given.items()}
        rows = {k: v[:1].expand(n, *v.shape[1:]) for k, v in self._on_device(like).items()} if required else {}
        check_keys(rows | fixed, self.model)
        with self.inference(), told(rows | fixed), _Reader() as reader:
            if required:
                poutine.uncondition(self.model)(**rows | fixed)
                sites = [site for site in reader.sites.values() if site["infer"].get("was_observed")]
            else:
                with pyro.plate(self.plate_name, n, dim=-1):
                    value = self.model(**fixed)
                if value is not None and not mean:
                    return value
                sites = [site for site in reader.sites.values() if site["value"] is value]
        return _data_value(sites, mean)

    def encode(self, x: Any, site: str | None = None, *, sample: bool = False) -> Tensor:
        """The posterior mean E_q[z | x] (of a class the mode), `(N, D)`, or a draw from q(z | x).

        A flow's mean has no closed form: it is estimated by 1000 draws, the same ones at every call.

        Args:
            x: data `(N, D)`, a batch or a `Data`.
            site: the latent, where the guide has several; those that it depends on are put at their means.
            sample: draw from the posterior in the place of its mean.

        Raises:
            ValueError: for an unknown site, or none named where there are several.
        """
        batch = self._on_device(x, self.guide)
        with self.inference(), told(batch), _Reader(means=not sample) as reader:
            self.guide(**batch)
        if site is None and len(reader.sites) == 1:
            site = next(iter(reader.sites))
        if not isinstance(site, str) or site not in reader.sites:
            raise ValueError(f"Expected site to be one of {', '.join(reader.sites)}; got {site!r}")
        return reader.sites[site]["value"]

    def reconstruct(self, x: Any) -> Tensor:
        """E[x | z], or a draw where that has no closed form, at the posterior means of all latents, `(N, D)`.

        Args:
            x: data `(N, D)`, a batch or a `Data`.
        """
        batch = self._on_device(x, self.model, self.guide)
        with self.inference(), told(batch), _Reader(means=True) as latents:
            self.guide(**batch)
        values = {name: site["value"] for name, site in latents.sites.items()}
        with self.inference(), told(batch):
            return self._mean_given(values, batch)

    def _mean_given(self, values: dict[str, Tensor], batch: Batch) -> Tensor:
        """The mean of the data site, the latents being these values."""
        with _Reader() as reader:
            poutine.condition(self.model, data=values)(**batch)
        sites = [site for name, site in reader.sites.items() if site["is_observed"] and name not in values]
        return _data_value(sites, mean=True)

    def analogies(self, x: Any) -> Tensor:
        """E[x | y, z] for every class y, each datum's z at its posterior mean: one style, all classes; `(N, C, D)`.

        Args:
            x: data `(N, D)`, a batch or a `Data`; z is that of the label where one is given, else of the likeliest.

        Raises:
            ValueError: for a program without a label.
        """
        batch = self._on_device(x, self.model, self.guide)
        hidden = without(self.label, batch)
        with self.inference(), told(batch), pyro.validation_enabled(False):
            site, label = self._label_site(hidden)
            own = label.values[label.log_prob(site["fn"]).argmax(1)]
            if self.label in batch:
                own = site_of(self.model, self.label, batch)["value"]
            with Fixed(self.label, own), _Reader(means=True) as latents:
                self.guide(**hidden)
            values = {name: site["value"] for name, site in latents.sites.items()}
            means = [self._mean_given({**values, self.label: value.expand_as(own)}, hidden) for value in label.values]
        return torch.stack(means, 1)

    def predict(self, x: Any) -> Tensor:
        """q(y | x), the guide's probability of each class, `(N, C)`; latents drawn before it are at their means.

        Args:
            x: data `(N, D)`, a batch or a `Data`; labels among them are not looked at.

        Raises:
            ValueError: for a program without a label.
        """
        batch = self._on_device(without(self.label, as_batch(x, "x")), self.guide)
        with self.inference(), told(batch), pyro.validation_enabled(False):
            site, label = self._label_site(batch)
            return label.log_prob(site["fn"]).exp()

    def _label_site(self, batch: Batch) -> tuple[Any, Label]:
        """The guide's site of the label, and the label."""
        with _Reader(means=True):
            site = site_of(self.guide, self.label, batch)
        label = None if site is None else Label.of(site)
        if label is None:
            raise ValueError(
                f"Expected a program with a label {self.label!r}; got {type(self).__name__}, whose guide draws none"
            )
        return site, label

    def _on_device(self, x: Any, *functions: Callable[..., Any]) -> Batch:
        device = device_of(self)
        batch = {key: value.to(device) for key, value in as_batch(x, "x").items()}
        check_keys(batch, *functions)
        return batch

    @contextmanager
    def inference(self, seed: int | None = None) -> Iterator[None]:
        """Run in eval mode, without gradients, in this program's own parameter scope; all restored after.

        Args:
            seed: run with torch's generators at this seed, and put them back after; None leaves them alone.
        """
        with ExitStack() as stack:
            if seed is not None:
                check_seed(seed)
                stack.enter_context(forked(seed))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.scope())
            stack.enter_context(self.modes_kept())
            self.eval()
            yield

    @contextmanager
    def modes_kept(self) -> Iterator[None]:
        """Put train and eval mode of every module back after, however it ends."""
        modes = [(module, module.training) for module in self.modules()]
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give this program a parameter store of its own, so that no two programs meet in Pyro's global one.

        What `pyro.param` creates inside becomes a parameter of this module, in its unconstrained form.
        """
        state: Any = {
            "params": {_pyro_name(key): value for key, value in self.pyro_params.items()},
            "constraints": dict(self._constraints),
        }
        store = pyro.get_param_store()
        with store.scope(state), ParamStatements(self._initial or {}):
            yield
        own = {id(parameter) for parameter in self.parameters()}
        for name, value in state["params"].items():
            if id(value) not in own:
                if name in store and self._initial is None:
                    warnings.warn(
                        f"pyro.param {name!r} exists in Pyro's global parameter store too; this program begins with "
                        "its own initial value. For the stored one: as_program(..., params=pyro.get_param_store())",
                        stacklevel=4,
                    )
                if isinstance(value, nn.Parameter):
                    warnings.warn(
                        f"{name!r} was met by pyro.module alone: its network was not found, so that buffers are not "
                        "saved and train and eval mode not switched. Let model or guide refer to the network",
                        stacklevel=4,
                    )
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())
                self.pyro_params[name.replace(".", _DOT)] = parameter
        kept = {_pyro_name(key) for key in self.pyro_params}
        constraints = {name: value for name, value in state["constraints"].items() if name in kept}
        if constraints != self._constraints:  # what is compiled watches over this dict
            self._constraints = constraints


def device_of(program: nn.Module) -> torch.device | None:
    """Where a program's parameters are; None for one that has none."""
    return next((p.device for p in program.parameters()), None)


@contextmanager
def told(batch: Batch, name: str = "data") -> Iterator[None]:
    """Around a program's run on a batch: what torch or Pyro find amiss becomes a ValueError that tells of the batch."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, ValueError) and said.startswith("Expected")):
            raise
        found = ", ".join(f"{key} {tuple(value.shape)} of {value.dtype}" for key, value in batch.items())
        raise ValueError(f"Expected {name} that the program runs on; got {found}, where it fails: {said}") from error


def _for_all(name: str, value: Any, n: int) -> Tensor:
    """A condition of n data: given for each of them, or once."""
    if not isinstance(value, Tensor) and not is_number(value):
        raise ValueError(f"Expected {name} to be a tensor or a number; got {value!r}")
    value = torch.as_tensor(value)
    if value.dim() == 0:
        return value.expand(n)
    if len(value) != n:
        raise ValueError(f"Expected {name} to have n={n} rows, one for each datum; got {tuple(value.shape)}")
    return value


def check_keys(batch: Batch, *functions: Callable[..., Any]) -> None:
    """Raises ValueError where the keys of a batch are not arguments of these functions."""
    for function in functions:
        signature = inspect.signature(function)
        try:
            signature.bind(**batch)
        except TypeError as error:
            raise ValueError(
                f"Expected a batch for {getattr(function, '__name__', 'a function')}{signature}; got "
                f"{', '.join(batch)}: {error}. Data.select(...) leaves what is not needed out"
            ) from None


def _pyro_name(key: str) -> str:
    return key.replace(_DOT, ".")


def _data_value(sites: list[Any], mean: bool) -> Tensor:
    if len(sites) != 1:
        names = ", ".join(site["name"] for site in sites) or "none"
        raise ValueError(f"Expected one data site, whose value the model returns; got {names}")
    if not mean:
        return sites[0]["value"]
    try:
        return sites[0]["fn"].mean
    except NotImplementedError:  # an autoregressive likelihood's has no closed form
        return sites[0]["fn"].sample()


def _estimated_mean(fn: Any) -> Tensor:
    """The mean of MEAN_DRAWS draws, the same at every call: torch's generators are left as they were."""
    at_once = max(1, min(MEAN_DRAWS, 10_000 // max(1, fn.batch_shape.numel())))
    with forked(0):
        parts = torch.ones(MEAN_DRAWS).split(at_once)
        return torch.stack([fn.sample(part.shape).sum(0) for part in parts]).sum(0) / MEAN_DRAWS


class _Reader(Messenger):
    """Notes the sample sites that a program passes; on request puts each latent at its mean."""

    def __init__(self, means: bool = False):
        super().__init__()
        self.means = means
        self.sites: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not self.means or msg["is_observed"] or msg["done"] or poutine.util.site_is_subsample(msg):
            return
        try:
            mean = msg["fn"].mean
        except NotImplementedError:
            mean = _estimated_mean(msg["fn"])
        # that of a class is no class, or NaN
        is_class = isinstance(msg["fn"], OneHotCategorical) or bool(mean.isnan().all())
        msg["value"] = msg["fn"].mode if is_class else mean
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not poutine.util.site_is_subsample(msg):
            self.sites[msg["name"]] = msg.copy()


class ParamStatements(Messenger):
    """Gives pyro.param its initial values, and weights from a file, which come without them, their constraints."""

    def __init__(self, initial: Mapping[str, Tensor]):
        super().__init__()
        self.initial = initial

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) < 2:
            return
        name, store = msg["name"], pyro.get_param_store()
        if name in store:
            store._constraints.setdefault(name, msg["kwargs"]["constraint"])
        elif name in self.initial:
            msg["args"] = (name, self.initial[name].detach())
