"""What the fuzzers feed to public functions, and what they hold against what comes back."""

import atexit
import contextlib
import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae import CompileError, LatentModel
from pyrovae.data import Data

HOME = tempfile.mkdtemp(prefix="hypothesis-")  # nothing is left beside the tests
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
set_hypothesis_home_dir(HOME)

DOCUMENTED = (ValueError, OSError, FloatingPointError, CompileError)
CALL_PROTOCOL = ("missing", "unexpected keyword", "positional argument")  # Python's own words for a wrong call
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}


def fuzz(cases: int, many: int, **drawn: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Two tests of a property: with so many cases, always the same ones, and slow, with many new ones each time."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        profiles = {"ci": {"max_examples": cases, "derandomize": True}, "long": {"max_examples": many}}
        runs = {name: settings(**COMMON, **profile)(given(**drawn)(check)) for name, profile in profiles.items()}

        @pytest.mark.parametrize("profile", ["ci", pytest.param("long", marks=pytest.mark.slow)])
        def test(profile: str) -> None:
            runs[profile]()

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate


# What stands in the place of a right argument. Counts are small, so that what is accepted is soon done.
WRONG: list[Any] = [
    None, "", "3", "mean", b"x", True, False, -1, 0, 1, 2, 0.0, 0.5, 1.0, 2.5, -2.0, float("nan"), float("inf"),
    -float("inf"), 1 + 2j, np.int64(2), np.float32(0.5), np.array([1.0, 2.0]), [], [1.0], (2,), (2, 0.5), (2, 3, 4, 5),
    ["tanh"], {}, {"x": 1}, {1: torch.zeros(2, 3)}, object(), int, len, torch.tensor(2), torch.tensor(0.5),
    torch.tensor([1, 2]), torch.zeros(0), torch.zeros(2, 3), torch.float64, nn.Linear(2, 3), iter([3, 4]),
]  # fmt: skip
HUGE = [2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1e30]
wrong = st.sampled_from(WRONG)
wrong_seed = st.sampled_from([*WRONG, *HUGE])
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.int64, torch.bool,
    torch.complex64,
]  # fmt: skip


def error_of(call: Callable[[], Any]) -> Exception | None:
    """The documented error of a call, or none; any other error goes on."""
    try:
        call()
    except (*DOCUMENTED, TypeError) as error:
        own_words = isinstance(error, TypeError) and any(words in str(error) for words in CALL_PROTOCOL)
        if not (str(error).startswith("Expected") or own_words):
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        return error
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two objects hold the same, NaN being the same as NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(*(torch.nan_to_num(v.detach(), 7e7) for v in (a, b)))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def _about(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    without_grad = not tensor.is_leaf or tensor.grad is None
    return tensor.dtype, tensor.shape, strides, tensor.requires_grad, tensor._version, without_grad


@contextlib.contextmanager
def unchanged(*inputs: Any) -> Iterator[None]:
    """No tensor among these is changed, in values, layout or gradient."""
    tensors = [t for value in inputs for t in _tensors(value)]
    before = [(_about(t), t.detach().clone()) for t in tensors if t.device.type != "meta"]
    try:
        yield
    finally:
        for (about, values), t in zip(before, (t for t in tensors if t.device.type != "meta"), strict=True):
            assert _about(t) == about, f"{about} became {_about(t)}"
            assert t.layout != torch.strided or same(t, values), f"{values} became {t}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, list | tuple):
        return [t for each in value for t in _tensors(each)]
    return _tensors(value.tensors) if isinstance(value, Data) else []


@contextlib.contextmanager
def state_kept(program: Any = None, seeded: bool = True, weights: bool = True) -> Iterator[None]:
    """Nothing global is changed, nor the program's modes and, unless it is trained, its weights."""

    def state() -> dict[str, Any]:
        found = {
            "dtype": torch.get_default_dtype(),
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "validation": is_validation_enabled(),
            "store": sorted(pyro.get_param_store().keys()),
            "stack": len(pyro.poutine.runtime._PYRO_STACK),
        }
        if seeded:
            found["noise"] = torch.get_rng_state().clone()
        if isinstance(program, LatentModel):
            found["modes"] = [module.training for module in program.modules()]
            found["fixed"] = [p.requires_grad for p in program.parameters()]
            if weights:
                found["weights"] = {name: value.clone() for name, value in program.state_dict().items()}
        return found

    before = state()
    try:
        yield
    finally:
        after = state()
        changed = [name for name in before if not same(before[name], after[name])]
        pyro.poutine.runtime._PYRO_STACK.clear()
        assert not changed, f"changed: {changed}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that `fit` gives of programs that are not trained, and torch's of what a machine lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


def _offset(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[:1], 9), x, torch.full_like(x[:1], 9)])[1:-1] if x.dim() else x


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def _read_only(x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:  # which NumPy does not have
        return x
    values = x.detach().clone().numpy()
    values.setflags(write=False)
    with quiet():
        return torch.from_numpy(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": _strided,
    "offset": _offset,
    "transposed": _transposed,
    "read-only": _read_only,
    "flipped twice": lambda x: x.flip(0).flip(0),
    "requires grad": lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x,
    "not a leaf": lambda x: (x.detach().clone().requires_grad_() * 1) if x.is_floating_point() else x,
    "parameter": lambda x: nn.Parameter(x.detach().clone()) if x.is_floating_point() else x,
}  # fmt: skip
layouts = st.sampled_from(sorted(LAYOUTS))


STRANGE = ["sparse", "meta", "numpy", "list"]


@st.composite
def any_tensor(draw: Callable[..., Any], strange: bool = True) -> Any:
    """A tensor of any rank to 4, small or empty, of any dtype, layout and values; or a strange one."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 30]), max_size=4))
    if np.prod(shape) > 1000:
        shape = shape[:2]
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1.0, 1e4, 1e38, 0.0]))
    values = x > 0 if draw(st.booleans()) else x
    if not dtype.is_floating_point and not dtype.is_complex:
        values = values.clamp(-100, 100) if values.dtype != torch.bool else values
    x = values.to(torch.int32).to(dtype) if dtype == torch.uint8 else values.to(dtype)
    kind = draw(st.sampled_from([*sorted(LAYOUTS), "plain", "plain", "nan", *(STRANGE if strange else [])]))
    if kind in LAYOUTS:
        return LAYOUTS[kind](x)
    if kind == "nan" and x.is_floating_point() and x.numel():
        return x.flatten().index_fill(0, torch.tensor([x.numel() - 1]), float("nan")).reshape(shape)
    if kind == "sparse":
        return x.to_sparse()
    if kind == "meta":
        return x.to("meta")
    if kind == "numpy" and dtype != torch.bfloat16:
        return x.numpy()
    return x.tolist() if kind == "list" else x


@st.composite
def any_data(draw: Callable[..., Any]) -> Any:
    """What might be given as data: a tensor, a pair, a dict that may be empty or have keys that nobody knows."""
    kind = draw(st.sampled_from(["tensor", "tensor", "pair", "dict", "wrong"]))
    if kind == "tensor":
        return draw(any_tensor())
    if kind == "pair":
        return tuple(draw(st.lists(any_tensor(), min_size=2, max_size=2)))
    if kind == "dict":
        return draw(st.dictionaries(st.sampled_from(["x", "y", "c", "lengths", "other"]), any_tensor(), max_size=3))
    return draw(wrong)


def fresh(value: Any) -> Any:
    """A copy of a wrong argument, as far as there can be one: an iterator is used up once."""
    return iter([3, 4]) if hasattr(value, "__next__") else copy.copy(value)
