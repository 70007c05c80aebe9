"""A function of tensors whose Python runs once for each shape; from then on its tensor operations run, compiled."""

import functools
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyrovae.conditionals.conditional import network_dtype
from pyrovae.inductor import CompileError, compile_graph, copy_views, first_line, keep_draws
from pyrovae.program import ParamStatements
from pyrovae.watch import PythonState

Compile = bool | Literal["auto"]
MANY_TRACES = 8
_TENSOR = object()


class Compiled:
    """A function of tensors, traced once for each shape into one graph and compiled.

    Where the shapes are known, a call runs no Python of the function, only the tensor operations of its graph; they
    draw the random numbers that the function itself would draw. Parameters, buffers and other tensors that the
    function refers to are read, and changed, where they are.

    Tensors and Python floats among the arguments may change from call to call. All else is constant in a graph (other
    arguments, shapes, train and eval mode, Python values that `watch` refers to), and where it differs from what
    the graphs so far hold, the function is traced once more. A NumPy array is constant as a whole: another array in
    its place is noticed, a change within it is not.

    Args:
        function: its arguments and its result may nest tensors in dicts, lists and tuples.
        watch: functions and modules; the Python values that they refer to, through attributes, closures and globals,
            are constants of a graph.
        compile: True, or "auto", which calls the function itself, after a warning, where compiling fails.

    Attributes:
        num_traces: how many times the function was traced.

    Raises:
        ValueError: for another value of `compile`.
        CompileError: in a call, unless "auto", where the function's Python depends on values of tensors, changes
            Python values that it refers to, or draws random numbers outside torch, or where there is no C++ compiler.
    """

    def __init__(self, function: Callable[..., Any], watch: Sequence[Any] = (), compile: Compile = True):
        if compile is not True and not (isinstance(compile, str) and compile == "auto"):
            raise ValueError(f"Expected compile to be True, False or 'auto'; got {compile!r}")
        self.function = function
        self.watch = (function, *watch)
        self._may_fail, self._failed = compile == "auto", False
        self.num_traces = 0
        self._graphs: dict[Any, list[_Graph]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if self._failed:
            return self.function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        graphs = self._graphs.setdefault((spec, *map(_signature, leaves), *_surroundings()), [])
        graph = next((graph for graph in graphs if graph.changed() is None), None)
        if graph is None:
            if self.num_traces >= MANY_TRACES:
                why = graphs[-1].changed() if graphs else "a shape, or an argument that is no tensor or float,"
                warnings.warn(
                    f"Compiled {self.num_traces} times, now because {why} changed. What changes from call to call "
                    "belongs among the arguments, as a tensor or a float",
                    stacklevel=2,
                )
            try:
                graph = self._trace(leaves, spec)
            except CompileError as error:
                if not self._may_fail:
                    raise
                self._failed = True
                warnings.warn(f"Goes on uncompiled. {error}", stacklevel=2)
                return self.function(*args, **kwargs)
            graphs[:] = [*graphs[1 - MANY_TRACES :], graph]
        return graph(leaves)

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Trace the function, and compile nothing: whether it could be.

        Raises:
            CompileError: as a call.
        """
        self._make(*pytree.tree_flatten((args, kwargs)))

    def _trace(self, leaves: list[Any], spec: Any) -> "_Graph":
        graph, tensors, inputs, like, state, (out, out_spec) = self._make(leaves, spec)
        keep_draws(graph)
        copy_views(graph)
        constants = [_TENSOR if isinstance(value, Tensor) else value for value in out]
        captured = [*graph.parameters(), *graph.buffers()]
        facts = list(map(_facts, captured))
        return _Graph(compile_graph(graph, tensors), inputs, like, constants, out_spec, state, captured, facts)

    def _make(self, leaves: list[Any], spec: Any) -> Any:
        """The graph, tensors like its inputs, which leaves these are, and what else a `_Graph` needs."""
        from torch.fx.experimental.proxy_tensor import make_fx

        inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor | float)]
        like = _widest([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        results: list[Any] = []
        untouched = _Untouched()

        def flat(*tensors: Tensor) -> list[Tensor]:
            values = list(leaves)
            for i, tensor in zip(inputs, tensors, strict=True):
                values[i] = tensor
            args, kwargs = pytree.tree_unflatten(values, spec)
            with untouched, _NoExport():
                results[:] = pytree.tree_flatten(self.function(*args, **kwargs))
            return [value for value in results[0] if isinstance(value, Tensor)]

        self.num_traces += 1
        # of their own, for what is true of these arguments (two that are one tensor) need not be true of others
        tensors = [_stand_in(_as_tensor(leaves[i], like)) for i in inputs]
        try:
            with _tracing(self.watch) as state:
                graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        finally:
            untouched.put_back()
        return graph, tensors, inputs, like, state, results


@dataclass(frozen=True)
class _Graph:
    """A compiled graph, and how arguments and results fit it."""

    run: Callable[..., Sequence[Tensor]]
    inputs: list[int]
    like: Tensor
    constants: list[Any]
    spec: Any
    state: PythonState
    captured: list[Tensor]
    facts: list[Any]

    def changed(self) -> str | None:
        """What is constant in the graph and not so any more; None where nothing is."""
        if list(map(_facts, self.captured)) != self.facts:
            return "a parameter's or buffer's shape, dtype, device or requires_grad"
        return self.state.changed()

    def __call__(self, leaves: list[Any]) -> Any:
        with torch.no_grad(), torch._C._DisableAutocast():  # the graph has its casts
            tensors = iter(self.run(*[_as_tensor(leaves[i], self.like) for i in self.inputs]))
        return pytree.tree_unflatten([next(tensors) if v is _TENSOR else v for v in self.constants], self.spec)


def _widest(tensors: list[Tensor]) -> Tensor:
    """A scalar of the kind that Python floats become: of the widest floating dtype among these, on their device."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return torch.zeros(())
    dtypes = [tensor.dtype for tensor in floating]
    return floating[0].new_zeros((), dtype=functools.reduce(torch.promote_types, dtypes))


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor like this, of unknown values."""
    other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return other.requires_grad_(tensor.requires_grad)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _as_tensor(leaf: Tensor | float, like: Tensor) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=like.dtype, device=like.device)


def _signature(leaf: Any) -> Any:
    """What of an argument is constant in a graph."""
    if isinstance(leaf, Tensor):
        return leaf.stride(), *_facts(leaf)
    if isinstance(leaf, float):
        return float
    try:
        hash(leaf)
    except TypeError:
        raise CompileError(f"Expected arguments of tensors, numbers or strings; got {type(leaf).__name__}") from None
    return type(leaf), leaf


def _surroundings() -> tuple[Any, ...]:
    """What else is constant in a graph: torch's modes, and the handlers of Pyro around a call."""
    handlers = tuple(
        handler
        for handler in _PYRO_STACK
        if not isinstance(handler, ParamStatements) and not getattr(handler, "param_only", False)
    )
    autocast = tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.get_default_dtype(), network_dtype(), autocast, handlers


@contextmanager
def _tracing(watch: Sequence[Any]) -> Iterator[PythonState]:
    """Around a trace: errors that say what stands in its way, also what would make its result wrong."""
    state = PythonState(watch)
    drawn, seed = state.generators(), torch.get_rng_state()
    sites = _Sites()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings(), sites:
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
            try:
                yield state
            finally:
                state.put_back()
                torch.set_autocast_cache_enabled(caching)
    except Exception as error:
        where = "" if sites.last is None else f", after site {sites.last!r}"
        if not _depends_on_values(error):
            error.add_note(f"(while the program was traced, in order to compile it{where})")
            raise
        raise CompileError(
            f"Expected a program whose Python does not depend on values of tensors; got {_operation(error)}"
            f"{where}{_users_line(error)}. Write the choice with torch.where or a mask, or run uncompiled "
            "(compile=False)"
        ) from error
    changed = state.changed()
    if changed is not None:
        raise CompileError(
            f"Expected a program that leaves Python values alone; got {changed}, which it changes as it runs: "
            "compiled, that would happen once. Keep the value in a buffer, or run uncompiled (compile=False)"
        )
    if not torch.equal(torch.get_rng_state(), seed):
        torch.set_rng_state(seed)
        raise CompileError(
            "Expected a program that leaves torch's generator to its caller; got one that sets its seed or state: "
            "compiled, that would happen once. Set it outside, or run uncompiled (compile=False)"
        )
    if state.generators() != drawn:
        raise CompileError(
            "Expected a program that draws random numbers by torch; got one that draws them by NumPy or Python: "
            "compiled, they would be the same in each call. Draw them by torch, or run uncompiled (compile=False)"
        )


def _depends_on_values(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    marks = (
        "SymInt",
        "data-dependent",
        "DataDependent",
        "DynamicOutputShape",
        "tracing tensor",
        "for tensor subclasses",
    )
    return any(mark in text for mark in marks)


def _operation(error: Exception) -> str:
    by_value = "SymNode" in type(error).__name__ or "_local_scalar_dense" in str(error)
    return "the value of a tensor as a number" if by_value else first_line(error)


def _users_line(error: Exception) -> str:
    """The last line of an error's traceback that is neither a library's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(
            part in frame.filename for part in ("site-packages", "pyrovae/compiled.py", "pyrovae/objectives.py")
        ):
            return f", at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""


class _Sites(Messenger):
    """Notes the last sample site that a program passed."""

    last: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.last = msg["name"]


class _NoExport(TorchFunctionMode):
    """Forbids what reads the memory of a tensor without torch's operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise RuntimeError(f"data-dependent operation {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Untouched(TorchDispatchMode):
    """Keeps a trace from the values of tensors that were there before.

    The tracer would take a value that is read for a constant, so that is an error; and it runs operations on such
    tensors alone for real, so that what it changes is put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        outside = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        # a whole number may be read that nothing depends on, as Pyro's loops over a plate read their index
        if torch.Tag.data_dependent_output in func.tags and (outside or tensors[0].dtype != torch.int64):
            raise RuntimeError(f"data-dependent operation {func}")
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor or any(i.dtype in (torch.bool, torch.uint8) for i in tensors[1:])
        ):
            raise RuntimeError(f"data-dependent shape of {func}")
        if outside and func._schema.is_mutable:
            with _disable_current_modes():
                for tensor in outside:
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        return func(*args, **(kwargs or {}))

    def put_back(self) -> None:
        """Give what was changed the values from before."""
        with torch.no_grad():
            for tensor, before in self.before.values():
                tensor.copy_(before)
