"""The Python values that functions refer to: noticing that they have changed."""

import functools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

LARGEST = 1000  # entries of a container, beyond which it is not looked into


class PythonState:
    """The Python values that functions and modules refer to, and whether they are what they were.

    Args:
        roots: where to begin: functions, methods, modules, containers.
    """

    def __init__(self, roots: Iterable[Any]):
        self._places: list[tuple[str, Callable[[], Any], Callable[[], Any], list[Any]]] = []
        self._seen: dict[int, Any] = {}  # holds what it saw, so that no other object takes its id
        for root in roots:
            self._walk(getattr(root, "__qualname__", type(root).__name__), root)
        # what distributions, transforms and guides of torch and Pyro keep of what they computed last
        keepers = [value for value in self._seen.values() if type(value).__module__.startswith(_KEEPERS)]
        self._kept = [(vars(value), dict(vars(value))) for value in keepers if hasattr(value, "__dict__")]

    def _walk(self, name: str, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, _LEAVES):
            return
        self._seen[id(value)] = value
        for keys, values in _places(value):
            before = list(values())
            if not type(value).__module__.startswith(_KEEPERS):
                self._places.append((name, keys, values, before))
            elif isinstance(value, nn.Module):  # whose notes of itself are no change
                self._places.append((name, lambda: ["training"], lambda: [value.training], [value.training]))
            if len(before) <= LARGEST:
                for key, part in zip(list(keys()), before, strict=True):
                    if not isinstance(value, nn.Module) or key not in _NOT_FOLLOWED:
                        self._walk(type(part).__name__ if key == "__self__" else f"{name}.{key}", part)

    def generators(self) -> list[str]:
        """The states of NumPy's and Python's generators of random numbers, the global ones and those referred to."""
        own = [value.getstate() for value in self._seen.values() if isinstance(value, random.Random)]
        own += [value.bit_generator.state for value in self._seen.values() if isinstance(value, np.random.Generator)]
        return [str(value) for value in (random.getstate(), np.random.get_state(), *own)]

    def put_back(self) -> None:
        """Forget what distributions, transforms and guides have kept since."""
        for now, before in self._kept:
            if now.keys() != before.keys() or not all(map(operator.is_, now.values(), before.values())):
                now.clear()
                now.update(before)

    def changed(self) -> str | None:
        """The name of a value that is not what it was; None where there is none."""
        for name, keys, values, before in self._places:
            now = values()
            if len(now) == len(before) and all(map(operator.is_, now, before)):
                continue
            now = list(now)
            for key, old, new in zip(keys(), before, now, strict=False):
                if old is not new and not _equal(old, new):
                    return f"{name}.{key}"
            if len(now) != len(before):
                return name
            before[:] = now
        return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, types.MethodType):  # made anew each time that it is looked up
        return isinstance(b, types.MethodType) and a == b
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes | None) and a == b


_LIBRARIES = sys.stdlib_module_names - {"types", "argparse"} | {"torch", "pyro", "numpy", "pyrovae"}
_KEEPERS = "torch.distributions", "pyro.distributions", "pyro.infer.autoguide"
_LEAVES = type | Tensor | str | bytes
_NOT_FOLLOWED = {key for key in vars(nn.Module()) if "hook" in key} - {"_forward_hooks", "_forward_pre_hooks"}


def _places(value: Any) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """Where a value refers to others: functions that give their names, and them."""
    library = _is_library(getattr(value, "__module__", None) or type(value).__module__)
    if isinstance(value, functools.partial):
        yield lambda: ("func", "args", "keywords"), lambda: (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield lambda: ("__self__", "__func__"), lambda: (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        if value.__closure__:
            cells = value.__closure__
            yield lambda: value.__code__.co_freevars, lambda: [_contents(cell) for cell in cells]
        if not library:
            yield from _globals(value)
            if value.__defaults__:
                yield lambda: range(len(value.__defaults__ or ())), lambda: value.__defaults__ or ()
            if value.__kwdefaults__:
                yield value.__kwdefaults__.keys, value.__kwdefaults__.values
    elif isinstance(value, dict):
        yield value.keys, value.values
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield lambda: range(len(value)), lambda: list(value)
    elif isinstance(value, types.ModuleType):
        return
    elif isinstance(value, nn.Module) or not library:
        if hasattr(value, "__dict__"):
            yield vars(value).keys, vars(value).values
        for cls in type(value).__mro__:
            slots = [key for key in getattr(cls, "__slots__", ()) if hasattr(value, key)]
            if slots:
                yield functools.partial(list, slots), functools.partial(_attributes, value, slots)
            if not _is_library(cls.__module__):
                yield vars(cls).keys, vars(cls).values


def _is_library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES


def _globals(function: types.FunctionType) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """The globals that a function names, and what it names of modules among them that are no library's."""
    space = function.__globals__
    named = _names(function.__code__)
    names = [name for name in named if name in space]
    yield lambda: names, lambda: [space.get(name) for name in names]
    for module in [space[name] for name in names if isinstance(space[name], types.ModuleType)]:
        if not _is_library(module.__name__):
            own = [name for name in named if name in vars(module)]
            yield functools.partial(list, own), functools.partial(_attributes, module, own)


def _names(code: types.CodeType) -> list[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for part in inner for name in _names(part))]))


def _attributes(value: Any, names: list[str]) -> list[Any]:
    return [getattr(value, name, None) for name in names]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
