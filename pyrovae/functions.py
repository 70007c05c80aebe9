"""as_program: two functions as one object."""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

from pyrovae.program import LatentModel


class FunctionProgram(LatentModel):
    """A model and a guide that are plain functions: what `as_program` returns."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        plate: str,
        params: Mapping[str, Tensor] | None,
        label: str,
    ):
        super().__init__()
        self.plate_name, self.label = plate, label
        # a copy: the store itself has other contents while a program runs
        self._initial = None if params is None else {name: value.detach().clone() for name, value in params.items()}
        self.nets = nn.ModuleDict()
        for role, function in (("model", model), ("guide", guide)):
            for name, module in _modules_of(function):
                while (name in self.nets and self.nets[name] is not module) or hasattr(nn.ModuleDict, name):
                    name = f"{role}_{name}"
                self.nets[name] = module
        self.__dict__.update(model=model, guide=guide)


def as_program(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *,
    plate: str = "data",
    params: Mapping[str, Tensor] | None = None,
    label: str = "y",
) -> LatentModel:
    """A `LatentModel` from two plain Pyro functions, which stay as they are.

    Every network that the functions refer to (as a global, through a closure, a helper or a container, or as an
    attribute of the object whose methods they are) and every `pyro.param` becomes part of the program: trained, saved,
    moved and switched between train and eval. To keep a network fixed, set `requires_grad_(False)` on it. Networks are
    shared with the functions, not copied; Pyro's global parameter store is neither read nor written.

    Args:
        model: called with a batch as keyword arguments.
        guide: likewise.
        plate: name of the functions' plate over the data.
        params: values to begin from for names given to `pyro.param`; after training with `pyro.infer.SVI`,
            `pyro.get_param_store()`.
        label: name of the functions' label, where they have one.

    Raises:
        ValueError: for a model or guide that cannot be called, names that are none, params that are no dict of tensors.

    Example:
        >>> import pyro, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", pyro.distributions.Normal(0., 1.))
        ...         pyro.sample("x", pyro.distributions.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     scale = pyro.param("scale", torch.tensor(0.7), constraint=pyro.distributions.constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", pyro.distributions.Normal(x / 2, scale))
        >>> as_program(model, guide).encode(torch.tensor([2., 4.]))
        tensor([1., 2.])
    """
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise ValueError(f"Expected {name} to be a function; got {type(function).__name__}")
    for name, value in (("plate", plate), ("label", label)):
        if not isinstance(value, str):
            raise ValueError(f"Expected {name} to be a name; got {value!r}")
    if params is not None and not (
        isinstance(params, ParamStoreDict | Mapping) and all(isinstance(value, Tensor) for _, value in params.items())
    ):
        raise ValueError(f"Expected params to be a dict of tensors; got {type(params).__name__}")
    return FunctionProgram(model, guide, plate, params, label)


def _modules_of(function: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a function refers to, itself or through other functions, with its names for them."""
    yield from _search("self", function, set())


def _search(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(value) in seen or isinstance(value, type | types.ModuleType | Tensor | str | bytes):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield name, value
        return
    for key, part in _parts(value):
        yield from _search(key, part, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a function, a method, a handler around one, a container or an object refers to."""
    if isinstance(value, functools.partial):
        yield from _numbered([value.func, *value.args, *value.keywords.values()])
    elif inspect.ismethod(value):
        yield "self", value.__self__
        yield "self", value.__func__
    elif inspect.isfunction(value):
        yield from inspect.getclosurevars(value).nonlocals.items()
        used = {step.argval for step in dis.get_instructions(value) if step.opname == "LOAD_GLOBAL"}
        yield from ((name, value.__globals__.get(name)) for name in sorted(used))
    elif isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from _numbered(value)
    elif not type(value).__module__.startswith(("builtins", "torch", "numpy")):
        yield from getattr(value, "__dict__", {}).items()  # __wrapped__ among them
        yield "call", getattr(type(value), "__call__", None)  # noqa: B004


def _numbered(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Names for what has none."""
    return ((f"part_{i}", value) for i, value in enumerate(values))
