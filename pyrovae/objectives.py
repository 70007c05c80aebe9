"""Compiled ELBOs, each in the place of its namesake in Pyro."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Number
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.util import Dice
from pyro.util import warn_if_nan
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyrovae.bounds import IWAE_ELBO, STL_ELBO, FreeBits_ELBO
from pyrovae.compiled import Compile, Compiled, CompileError


class NewParameters(CompileError):
    """A program that makes parameters while it is traced, and must run uncompiled once before."""


class CompiledLoss:
    """A program's loss and its gradients as one compiled function of the program's arguments.

    Args:
        elbo: any `pyro.infer.ELBO`.
        model, guide: Pyro programs of static structure, which have run before, so that their parameters are there.
        compile: True, or "auto" as for `Compiled`.
        gradients: False for the loss alone.

    Attributes:
        graphs: the `Compiled`; its `num_traces` says how many times the program was traced.
    """

    def __init__(
        self,
        elbo: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        compile: Compile = True,
        gradients: bool = True,
    ):
        elbo = getattr(elbo, "uncompiled", elbo)
        self.elbo, self.model, self.guide, self.gradients = elbo, model, guide, gradients
        self._owner: Any = getattr(elbo, "__self__", elbo)
        self.graphs = Compiled(self._value_and_grads, (model, guide), compile)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss `()`; the parameters, as optimized, and arguments that it depends on; its gradients in these."""
        owner = self._owner
        if owner.max_plate_nesting == math.inf and (owner.vectorize_particles or isinstance(owner, TraceEnum_ELBO)):
            owner._guess_max_plate_nesting(self.model, self.guide, args, kwargs)
        settings = frozenset((key, value) for key, value in vars(owner).items() if isinstance(value, Number | str))
        loss, grads, origins = self.graphs(settings, *args, **kwargs)
        variables = origins.variables
        if any(isinstance(variable, int) for variable in variables):
            given = pytree.tree_leaves((args, kwargs))
            variables = [given[v] if isinstance(v, int) else v for v in variables]
        return loss, variables, grads

    def _value_and_grads(self, settings: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], "_Origins"]:
        with _traceable(self.elbo), torch.set_grad_enabled(torch.is_grad_enabled() or not self.gradients):
            loss = torch.as_tensor(self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs))
        given = {id(value): i for i, value in enumerate(pytree.tree_leaves((args, kwargs)))}
        variables = _variables(loss) if self.gradients else []
        if any(variable._backward_hooks for variable in variables):
            raise CompileError(
                "Expected parameters without hooks as they are traced; got one with a hook. Register it after the "
                "first compiled call, or run uncompiled (compile=False)"
            )
        grads = torch.autograd.grad(loss, variables) if variables else []
        return loss.detach(), list(grads), _Origins([given.get(id(v), v) for v in variables])


class _Origins:
    """Where gradients belong: tensors, or numbers of arguments. No container that torch would look into."""

    def __init__(self, variables: list[Any]):
        self.variables = variables


def _variables(loss: Tensor) -> list[Tensor]:
    """The leaves of an autograd graph."""
    variables: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                variables.append(node.variable)
            stack.extend(before for before, _ in node.next_functions)
    return variables


@contextmanager
def _traceable(elbo: Any) -> Iterator[None]:
    """While an ELBO of Pyro's is traced, its detours through Python numbers stay among the tensors."""
    classes = [
        cls
        for part in (elbo, *getattr(elbo, "parts", ()))
        for cls in getattr(part, "__self_class__", type(part)).__mro__
    ]
    modules = {sys.modules[cls.__module__] for cls in classes}
    store = pyro.get_param_store()
    before = set(store.keys())
    with ExitStack() as stack:
        for module in modules:
            for name, replacement in _REPLACED.items():
                if hasattr(module, name):
                    stack.enter_context(_replaced(module, name, replacement))
        stack.enter_context(_replaced(Dice, "compute_expectation", _expectation))
        yield
    new = set(store.keys()) - before
    for name in new:
        del store[name]
    if new:
        raise NewParameters(f"Expected a program that has made all its parameters; got {', '.join(sorted(new))} anew")


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _detached(value: Any) -> Any:
    """In the place of Pyro's `torch_item`."""
    return value if isinstance(value, Number) else value.detach()


def _unchanged(value: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of Pyro's `warn_if_nan`."""
    return value


def _common_scale(scales: list[Any]) -> Any:
    """In the place of Pyro's `_get_common_scale`: scales that are tensors are compared as the graph runs."""
    first = torch.as_tensor(scales[0])
    same = torch.stack([torch.as_tensor(scale) == first for scale in scales]).all()
    torch.ops.aten._assert_async.msg(same, "Expected one scale for all enumerated sites; got different ones")
    return scales[0]


_REPLACED = {"torch_item": _detached, "warn_if_nan": _unchanged, "_get_common_scale": _common_scale}
_EXPECTATION = Dice.compute_expectation


def _expectation(self: Dice, costs: Any) -> Any:
    """In the place of Dice's expectation: costs of probability zero are put to zero, and not left out."""
    with _MaskedToZero(), _replaced(torch._C, "_get_tracing_state", lambda: True):
        return _EXPECTATION(self, costs)


class _MaskedToZero(TorchFunctionMode):
    """`masked_select`, whose result's shape depends on values, becomes `where`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.masked_select:
            value, mask = args
            return torch.where(mask, value, torch.zeros_like(value))
        return func(*args, **(kwargs or {}))


class _Given(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *variables: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        return None, None, *(outer[0] * grad for grad in ctx.saved_tensors)


@torch.no_grad()
def accumulate(variables: list[Tensor], grads: list[Tensor]) -> None:
    """What `backward` does: add gradients to those that the variables have."""
    others, memory = [], set()
    for variable, grad in zip(variables, grads, strict=True):
        hooks: Any = variable._backward_hooks or variable._post_accumulate_grad_hooks
        if not variable.is_leaf or hooks:
            others.append((variable, grad))
        elif variable.grad is not None:
            variable.grad.add_(grad)
        else:  # two gradients may be one tensor, whom its first owner would change for the second
            variable.grad = grad.clone() if grad.data_ptr() in memory else grad
            memory.add(grad.data_ptr())
    if others:
        torch.autograd.backward([variable for variable, _ in others], [grad for _, grad in others])


class _CompiledELBO(ELBO):
    """What the compiled ELBOs share."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # for each model and guide, their compiled methods and their entries in the parameter store
        self._losses: dict[Any, tuple[dict[str, CompiledLoss], dict[str, Any]]] = {}

    @property
    def num_traces(self) -> int:
        """How many times programs were traced."""
        return sum(loss.graphs.num_traces for losses, _ in self._losses.values() for loss in losses.values())

    @property
    def uncompiled(self) -> Any:
        """This ELBO with the methods of its namesake."""
        return super()

    def _run(self, method: str, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Run compiled; None where the program has not run before, or not with these parameters in the store."""
        losses, params = self._losses.get((model, guide), ({}, {}))
        known = pyro.get_param_store()._params
        if not losses or any(known.get(name) is not value for name, value in params.items()):
            return None
        try:
            loss, *rest = losses[method](*args, **kwargs)
        except NewParameters:
            return None
        for name in params:
            pyro.param(name)  # for handlers around, as SVI's, which gathers parameters by them
        warn_if_nan(loss, "loss")
        return loss, *rest

    def _first(self, method: str, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """The first call of a program makes its parameters; it runs uncompiled."""
        with poutine.trace(param_only=True) as capture:
            result = getattr(self.uncompiled, method)(model, guide, *args, **kwargs)
        params = {name: pyro.get_param_store()._params.get(name) for name in capture.trace.nodes}
        losses = CompiledLoss(self, model, guide), CompiledLoss(self, model, guide, gradients=False)
        self._losses[model, guide] = dict(zip(("differentiable_loss", "loss"), losses, strict=True)), params
        return result

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss `()`, to be differentiated once."""
        found = self._run("differentiable_loss", model, guide, args, kwargs)
        if found is None:
            return self._first("differentiable_loss", model, guide, args, kwargs)
        loss, variables, grads = found
        return _Given.apply(loss, grads, *variables) if variables else loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss alone."""
        with torch.no_grad():
            found = self._run("loss", model, guide, args, kwargs)
        return self._first("loss", model, guide, args, kwargs) if found is None else found[0].item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; its gradients are added to those that the parameters have, declared by `pyro.module` or not."""
        found = self._run("differentiable_loss", model, guide, args, kwargs)
        if found is None:
            loss = torch.as_tensor(self._first("differentiable_loss", model, guide, args, kwargs))
            if loss.requires_grad:
                loss.backward()
        else:
            loss, variables, grads = found
            accumulate(variables, grads)
        return loss.item()


class CompiledTrace_ELBO(_CompiledELBO, Trace_ELBO):
    """`pyro.infer.Trace_ELBO`, compiled: loss and gradients of a program of static structure as one graph.

    It takes the place of its namesake in `pyro.infer.SVI(model, guide, optim, loss=...)` and in `elbo(model, guide)`,
    has its arguments, draws the same random numbers and gives the same numbers up to rounding. The first call of a
    program runs uncompiled and makes its parameters; the second traces and compiles, in seconds; so does a
    call with arguments of a new shape. Tensors and Python floats among the arguments may change from call to call.
    Pyro's checks of values (`pyro.enable_validation`) are made in the first call alone. `loss_and_grads` differentiates
    in all that the loss depends on, also in networks that no `pyro.module` declares, as `elbo(model, guide)` does.

    Raises:
        CompileError: in a call, where the program cannot be compiled, with the site or the operation and a remedy.

    Source:
        As its namesake: Ranganath et al. (2014), Kingma and Welling (2014).

    Example:
        >>> elbo = CompiledTrace_ELBO(num_particles=2)
        >>> elbo.num_traces
        0
    """


class CompiledTraceMeanField_ELBO(_CompiledELBO, TraceMeanField_ELBO):
    """`pyro.infer.TraceMeanField_ELBO`, whose KL terms are analytic where they can be; compiled, see above."""


class CompiledTraceEnum_ELBO(_CompiledELBO, TraceEnum_ELBO):
    """`pyro.infer.TraceEnum_ELBO`, which sums over discrete latents in parallel; compiled, see above."""


class CompiledIWAE_ELBO(_CompiledELBO, IWAE_ELBO):
    """`IWAE_ELBO`, the importance-weighted bound for each datum, with either gradient; compiled, see above."""


class CompiledSTL_ELBO(_CompiledELBO, STL_ELBO):
    """`STL_ELBO`, the ELBO without the score of q in its gradient; compiled, see above."""


class CompiledFreeBits_ELBO(_CompiledELBO, FreeBits_ELBO):
    """`FreeBits_ELBO`, in which some nats of KL are free; compiled, see above."""
