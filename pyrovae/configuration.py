"""Configurations: how a program is made, as JSON, and the program made again from it.

Every class keeps each argument of its constructor under the argument's own name, so that it can be read back.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyrovae import conditionals, models, nets

CALLS = 1000, 100  # of torch that building a program may take, and more for each of its tensors
NUMBERS = 2**26  # that it may have in fixed tensors beside those of its file


def _own_classes() -> dict[str, type[nn.Module]]:
    return {
        name: value
        for room in (nets, conditionals, models)
        for name, value in vars(room).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("pyrovae.")
    }


def describe(value: Any) -> Any:
    """A module of pyrovae's own classes as JSON: `{"class": ..., "arguments": {...}}`; None for any other.

    A module that comes again, as a posterior that a prior shares, is `{"shared": "prior.posterior"}`, its first place.

    Example:
        >>> from pyrovae.conditionals import UnitNormal
        >>> from pyrovae.nets import MLP
        >>> describe(UnitNormal(MLP(2, 3, hidden=())))["arguments"]["net"]["arguments"]["out_dim"]
        3
    """
    try:
        return _describe(value, "", {})
    except LookupError:
        return None


def _describe(value: Any, place: str, seen: dict[int, str]) -> Any:
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_describe(item, f"{place}.{i}", seen) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return {"shared": seen[id(value)]}
    name = type(value).__name__
    if _own_classes().get(name) is not type(value):
        raise LookupError(name)
    seen[id(value)] = place.removeprefix(".")
    arguments = inspect.signature(type(value)).parameters
    return {"class": name, "arguments": {a: _describe(getattr(value, a), f"{place}.{a}", seen) for a in arguments}}


def build(config: Any) -> Any:
    """The module that `describe` described, newly initialised.

    Raises:
        ValueError: for a class that is not pyrovae's own, a shared module that is in no place before, or anything but
            a module where one is expected.
    """
    return _build(config, "", {})


def _build(config: Any, place: str, built: dict[str, nn.Module]) -> Any:
    if isinstance(config, list):
        return [_build(item, f"{place}.{i}", built) for i, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if "shared" in config:
        if config["shared"] not in built:
            raise ValueError(f"Expected a module that is shared to be described before; got {config['shared']!r}")
        return built[config["shared"]]
    classes = _own_classes()
    if config.get("class") not in classes:
        raise ValueError(f"Expected one of pyrovae's own classes; got {config.get('class')!r}")
    arguments = {name: _build(value, f"{place}.{name}", built) for name, value in config["arguments"].items()}
    made = classes[config["class"]]
    for name, argument in inspect.signature(made).parameters.items():
        kind = argument.annotation
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and not isinstance(arguments.get(name), kind):
            raise ValueError(f"Expected {name} of {made.__name__} to be a {kind.__name__}; got {arguments.get(name)!r}")
    module = built[place.removeprefix(".")] = made(**arguments)
    return module


def build_for(config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The module that a file's configuration describes, whose weights are the file's tensors.

    A configuration may ask for anything. It is first built without memory, in bounded time, and made in earnest only
    if it has no more numbers than its file has, twice over for masks, and 2^26.

    Raises:
        ValueError: as `build`; for a configuration that asks for more than the file can hold.
    """
    size = sum(value.numel() for value in tensors.values())
    _check_sizes(config, max(size, 2**20))
    calls, more = CALLS
    with torch.device("meta"), _Bounded(calls + more * len(tensors)):
        empty = build(config)
    if isinstance(empty, nn.Module):
        values = {id(value): value for part in (empty.parameters(), empty.buffers()) for value in part}
        if (numbers := sum(value.numel() for value in values.values())) > 2 * size + NUMBERS:
            raise ValueError(f"Expected a configuration for the {size} numbers of its file; got one for {numbers}")
    return build(config)


def _check_sizes(config: Any, most: int) -> None:
    if isinstance(config, int | float) and math.isfinite(config) and abs(config) > most:
        raise ValueError(f"Expected sizes of at most {most}, for what the file holds; got {config:.6g}")
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        _check_sizes(value, most)


class _Bounded(TorchFunctionMode):
    """Stops what calls torch more than so many times."""

    def __init__(self, calls: int):
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("Expected a configuration for what its file holds; got one that makes more modules")
        return func(*args, **(kwargs or {}))
