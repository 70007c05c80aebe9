"""Fuzzers: whatever is given as data, a public function gives the right result or a documented error."""

import functools
import math
from typing import Any

import hypothesis
import pyro
import strategies
import torch
import zoo
from hypothesis import strategies as st
from strategies import LAYOUTS, any_data, any_tensor, error_of, fuzz, layouts, quiet, state_kept, unchanged, wrong
from torch import Tensor
from torch.testing import assert_close

from pyrovae import (
    LatentModel,
    LocalGuide,
    attention,
    check,
    classify,
    compare,
    data,
    evaluate,
    fit,
    fit_guide,
    fit_map,
    indexed,
    log_weights,
    mcmc_em,
    one_hot,
    pad,
    posterior_draws,
    quadrant,
    reference,
    variational_em,
)
from pyrovae.conditionals import Conditional
from pyrovae.data import Data
from pyrovae.weights import WeightSums

ENTRIES = zoo.PROGRAMS | zoo.LABELED
programs = st.sampled_from(sorted(ENTRIES))
SHORT = {"epochs": 1, "batch_size": 3, "progress": False, "seed": 0}


@functools.cache
def _made(name: str) -> LatentModel:
    torch.manual_seed(0)
    return ENTRIES[name].make().eval()


def _trained(name: str) -> LatentModel:
    torch.manual_seed(0)
    return ENTRIES[name].make()


# What is done with a program and data; all of it with a seed, or without noise.
USES: dict[str, Any] = {
    "log_weights": lambda p, x: log_weights(p, x, 3),
    "evaluate": lambda p, x: vars(evaluate(p, x, 3, seed=0, progress=False)),
    "evaluate in parts": lambda p, x: vars(evaluate(p, x, 5, seed=0, batch_size=2, chunk_size=2, progress=False)),
    "encode": lambda p, x: p.encode(x),
    "encode a draw": lambda p, x: p.encode(x, sample=True),
    "reconstruct": lambda p, x: p.reconstruct(x),
    "predict": lambda p, x: p.predict(x),
    "analogies": lambda p, x: p.analogies(x),
    "classify": lambda p, x: classify(p, x, 2, seed=0, progress=False),
    "sample like": lambda p, x: p.sample(3, like=x),
    "log_prob": lambda p, x: p.log_prob(**x) if hasattr(p, "log_prob") and isinstance(x, dict) else None,
}
SLOW_USES: dict[str, Any] = {
    "compare": lambda p, x: compare(p, x, (1, 2), elbo_draws=2, seed=0, progress=False).bounds,
    "check": lambda p, x: check(p, x).findings,
    "posterior_draws": lambda p, x: posterior_draws(p, x, 2, warmup=2, seed=0, progress=False),
}
TRAINING: dict[str, Any] = {
    "fit": lambda p, x: fit(p, x, **SHORT),
    "fit with val": lambda p, x: fit(p, x, x, **SHORT),
    "fit_map": lambda p, x: fit_map(p, x, prior=pyro.distributions.Normal(0.0, 1.0), **SHORT),
    "variational_em": lambda p, x: variational_em(LocalGuide.of(p, x), x, **SHORT),
    "mcmc_em": lambda p, x: mcmc_em(p, x, warmup=1, draws=1, **SHORT),
    "fit_guide": lambda p, x: list(fit_guide(p, x, steps=2, seed=0, progress=False).parameters()),
}


def _no_times(result: Any) -> Any:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result] if _is_history(result) else result


def _is_history(result: Any) -> bool:
    return isinstance(result, list) and bool(result) and isinstance(result[0], dict)


def _close(a: Any, b: Any) -> None:
    """As close as another order of summation leaves them."""
    if isinstance(a, Tensor):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert_close(a.detach().double(), b.detach().double(), rtol=1e-3, atol=1e-4, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _close(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            _close(one, other)
    elif isinstance(a, float):
        assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
    elif hasattr(a, "__dataclass_fields__"):
        _close(vars(a), vars(b))
    else:
        assert a == b


def _result(use: Any, name: str, batch: Any, trained: bool) -> Any:
    program = _trained(name) if trained else _made(name)
    torch.manual_seed(1)
    found = []
    with quiet(), unchanged(batch), state_kept(program, seeded=False, weights=not trained):
        error = error_of(lambda: found.append(_no_times(use(program, batch))))
    return error, found[0] if found else None


def _layouts_agree(name: str, use: Any, n: int, layout: str, trained: bool) -> None:
    """The same numbers, whatever the memory format: contiguous copies are the truth."""
    batch = ENTRIES[name].batch(n)
    other = {key: LAYOUTS[layout](value) for key, value in batch.items()}
    error, expected = _result(use, name, batch, trained)
    other_error, found = _result(use, name, other, trained)
    assert (error is None) == (other_error is None), f"{error} and {other_error}"
    if error is None:
        _close(found, expected)


@fuzz(60, 3000, name=programs, use=st.sampled_from(sorted(USES)), n=st.integers(1, 5), layout=layouts)
def test_memory_format_does_not_matter(name, use, n, layout):
    _layouts_agree(name, USES[use], n, layout, trained=False)


@fuzz(4, 150, name=programs, use=st.sampled_from(sorted(SLOW_USES)), n=st.integers(1, 4), layout=layouts)
def test_memory_format_does_not_matter_to_slow_uses(name, use, n, layout):
    _layouts_agree(name, SLOW_USES[use], n, layout, trained=False)


@fuzz(6, 300, name=programs, use=st.sampled_from(sorted(TRAINING)), n=st.integers(1, 5), layout=layouts)
def test_memory_format_does_not_matter_to_training(name, use, n, layout):
    _layouts_agree(name, TRAINING[use], n, layout, trained=True)


@st.composite
def almost_right(draw, name):
    """A batch of a program's own, of which something is wrong: an argument, a size, a type, a value."""
    batch = ENTRIES[name].batch(draw(st.integers(1, 4)))
    key = draw(st.sampled_from(sorted(batch)))
    x, kind = batch[key], draw(st.sampled_from(["other", "shape", "dtype", "dtype", "value", "key", "missing"]))
    if kind == "other":
        batch[key] = draw(st.one_of(any_tensor(), wrong))
    elif kind == "shape":
        change = draw(st.sampled_from(["wider", "narrower", "one", "none", "rank", "scalar", "row", "empty", "longer"]))
        batch[key] = {
            "wider": lambda: torch.cat([x, x[..., :1]], -1),
            "narrower": lambda: x[..., :-1],
            "one": lambda: x[..., :1],
            "none": lambda: x[..., :0],
            "rank": lambda: x.unsqueeze(1),
            "scalar": lambda: x.flatten()[0],
            "row": lambda: x[0],
            "empty": lambda: x[:0],
            "longer": lambda: torch.cat([x, x]),
        }[change]()
    elif kind == "dtype":
        batch = {k: v.to(draw(st.sampled_from(strategies.DTYPES))) for k, v in batch.items()}
    elif kind == "value":
        value = draw(st.sampled_from([float("nan"), float("inf"), 1e38, -1e38, 1e20, 300.0, -1.0, 0.5]))
        batch[key] = (
            x.flatten().index_fill(0, torch.tensor([0]), value).reshape(x.shape) if x.is_floating_point() else x - 100
        )
    elif kind == "key":
        batch[draw(st.sampled_from(["y", "c", "other", "lengths"]))] = draw(any_tensor())
    else:
        del batch[key]
    return batch


@st.composite
def bad_cases(draw, uses):
    name = draw(programs)
    return (
        name,
        draw(st.sampled_from(sorted(uses))),
        draw(st.one_of(almost_right(name), almost_right(name), any_data())),
    )


def _is_nan(result: Any) -> bool:
    return any(bool(t.isnan().any()) for t in strategies._tensors(result))


def _right_or_documented(uses: Any, name: str, use: str, batch: Any, trained: bool = False) -> None:
    error, found = _result(uses[use], name, batch, trained)
    if error is None and use in ("encode", "reconstruct", "log_prob", "posterior_draws"):
        assert not _is_nan(found), "a silent NaN"


@fuzz(150, 8000, case=bad_cases(USES))
def test_any_data_give_a_result_or_a_documented_error(case):
    _right_or_documented(USES, *case)


@fuzz(10, 500, case=bad_cases(SLOW_USES))
def test_any_data_give_slow_uses_a_result_or_a_documented_error(case):
    _right_or_documented(SLOW_USES, *case)


@fuzz(15, 1000, case=bad_cases(TRAINING))
def test_any_data_give_training_a_result_or_a_documented_error(case):
    _right_or_documented(TRAINING, *case, trained=True)


# Functions of data alone.
@st.composite
def plain_calls(draw):
    kind = draw(
        st.sampled_from(["Data", "dynamic", "batches", "split_labels", "quadrant", "pad", "indexed", "one_hot"])
    )
    tensor = any_tensor()
    given = draw(st.one_of(any_data(), tensor, wrong))
    number = draw(st.one_of(wrong, st.integers(-2, 5)))
    seed = draw(strategies.wrong_seed)
    shape = draw(st.one_of(wrong, st.tuples(*[st.integers(-1, 4)] * 3)))
    many = draw(st.one_of(wrong, st.lists(st.one_of(tensor, wrong), max_size=4)))
    which = draw(st.one_of(wrong, st.sampled_from(["top-left", "top-right", "bottom-left", "bottom-right"])))
    calls = {
        "Data": lambda: Data(given),
        "dynamic": lambda: list(Data(given, dynamic=True).batches(2)),
        "batches": lambda: list(Data(torch.zeros(3, 2)).batches(number)),
        "split_labels": lambda: data.split_labels(given, number, seed),
        "quadrant": lambda: quadrant(given, shape, which),
        "pad": lambda: pad(many),
        "indexed": lambda: indexed(given),
        "one_hot": lambda: one_hot(given, number),
    }
    return kind, (given, number, seed, shape, many, which), calls[kind]


@fuzz(200, 10000, case=plain_calls())
def test_functions_of_data_give_a_result_or_a_documented_error(case):
    _, given, call = case
    with unchanged(list(given)), state_kept(seeded=False):
        error_of(call)


# Conditionals: parents of any leading shapes.
def _density(conditional: Conditional, *parents: Any) -> Any:
    """p(a | parents); of no rows torch's distributions know none, and eta is all that there is."""
    eta = conditional.eta(*parents)
    return conditional.distribution(eta) if eta.numel() or not parents else eta


seeds = st.integers(0, 999)
leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def _parents(conditional: Conditional) -> int | None:
    """How many numbers the parents have; None for a root."""
    return getattr(conditional.net, "in_dim", None) if _takes_parents(conditional) else None


def _takes_parents(conditional: Conditional) -> bool:
    try:
        conditional()
    except TypeError:
        return True
    return False


@functools.cache
def _conditional(name: str, dtype: torch.dtype) -> Conditional:
    torch.manual_seed(0)
    return zoo.CONDITIONALS[name]().to(dtype).eval()


@fuzz(
    100,
    5000,
    name=st.sampled_from(sorted(zoo.CONDITIONALS)),
    shape=leading,
    other=leading,
    split=st.integers(0, 3),
    layout=layouts,
)
def test_conditionals_take_parents_of_any_leading_shape(name, shape, other, split, layout):
    """As if each combination of rows had been given by itself."""
    conditional = _conditional(name, torch.float64)
    size = _parents(conditional)
    if size is None:
        p = conditional()
        shape = tuple(size or 1 for size in shape)
        value = p.sample(shape)
        assert value.shape == shape + p.event_shape
        assert p.log_prob(value).shape == shape
        assert torch.isfinite(p.log_prob(LAYOUTS[layout](value))).all()
        return
    try:
        batch_shape = torch.broadcast_shapes(shape, other) if split else shape
    except RuntimeError:
        hypothesis.assume(False)
    generator = torch.Generator().manual_seed(0)
    sizes = [(*shape, split), (*other, size - split)] if split else [(*shape, size)]
    parents = [LAYOUTS[layout](torch.randn(each, generator=generator, dtype=torch.float64)) for each in sizes]
    with unchanged(parents), state_kept():
        eta = conditional.eta(*parents)
        assert eta.shape[:-1] == batch_shape
    if 0 in batch_shape:  # of which torch's distributions know no density
        return
    p = conditional(*parents)
    assert p.batch_shape == batch_shape
    rows = torch.cat([each.detach().expand(*batch_shape, -1) for each in parents], -1).reshape(-1, size)
    torch.manual_seed(0)
    value = p.sample()
    assert value.shape == batch_shape + p.event_shape
    log_p = p.log_prob(value)
    assert log_p.shape == batch_shape
    assert torch.isfinite(log_p).all()
    for row, one, expected in zip(rows, value.reshape(len(rows), -1), log_p.reshape(-1), strict=True):
        assert_close(conditional(row).log_prob(one), expected, rtol=1e-9, atol=1e-9)


@fuzz(
    100,
    5000,
    name=st.sampled_from(sorted(zoo.CONDITIONALS)),
    given=st.lists(st.one_of(any_tensor(strange=False), wrong), max_size=2),
)
def test_conditionals_give_any_parents_a_density_or_a_documented_error(name, given):
    conditional = _conditional(name, torch.float32)
    with unchanged(given), state_kept(seeded=False):
        error_of(lambda: _density(conditional, *given))


# What is plain torch: float32 in any layout against float64.
DENSITIES: dict[str, tuple[Any, tuple[int, ...]]] = {  # functions of values, and the sizes of these
    "log_standard_normal": (reference.log_standard_normal, (3,)),
    "log_bernoulli": (lambda x, eta: reference.log_bernoulli((x > 0).to(x), eta), (3, 3)),
    "log_unit_normal": (reference.log_unit_normal, (3, 3)),
    "log_diagonal_normal": (reference.log_diagonal_normal, (3, 6)),
    "log_full_normal": (reference.log_full_normal, (3, 9)),
    "log_one_hot": (lambda x, eta: reference.log_one_hot((x == x.amax(-1, True)).to(x), eta), (3, 3)),
    "log_floor_normal": (lambda x, eta: reference.log_floor_normal(x, eta, floor=0.1), (3, 6)),
    "log_mixture_of_normals": (lambda x, eta: reference.log_mixture_of_normals(x, eta, num_components=2), (3, 14)),
    "log_continuous_bernoulli": (lambda x, eta: reference.log_continuous_bernoulli(x.sigmoid(), eta), (3, 3)),
    "kl_diagonal_standard": (reference.kl_diagonal_standard, (6,)),
    "kl_full_standard": (reference.kl_full_standard, (9,)),
    "importance_bound": (lambda log_w: reference.importance_bound(log_w.reshape(4, -1)), (4,)),
    "filters": (lambda numbers: attention.filters(numbers, 3, 4, 2).x.flatten(-2), (5,)),
    "window": (lambda numbers: attention.window(numbers, 3, 4, 2), (5,)),
}


@fuzz(
    60, 3000, name=st.sampled_from(sorted(DENSITIES)), rows=st.integers(1, 4), seed=st.integers(0, 999), layout=layouts
)
def test_plain_functions_of_float32_in_any_layout_are_those_of_float64(name, rows, seed, layout):
    function, sizes = DENSITIES[name]
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, size, generator=generator) for size in sizes]
    given = [LAYOUTS[layout](value) for value in values]
    with unchanged(given), state_kept():
        found = function(*given)
    expected = function(*(value.double() for value in values))
    assert found.dtype == torch.float32
    assert_close(found.detach().double(), expected, rtol=1e-3, atol=1e-4)


weight = st.one_of(st.floats(-50, 50), st.sampled_from([0.0, 1e30, -1e30, 700.0, -700.0, -float("inf")]))


@fuzz(
    60,
    3000,
    values=st.lists(weight, min_size=1, max_size=30),
    parts=st.lists(st.integers(1, 9), max_size=9),
    layout=layouts,
)
def test_sums_of_weights_do_not_depend_on_how_they_come(values, parts, layout):
    log_w = torch.tensor(values, dtype=torch.float64).unsqueeze(1).expand(-1, 2).contiguous()
    whole, pieces = WeightSums(len(log_w)), WeightSums(len(log_w))
    whole.add(log_w)
    rest = len(log_w) - sum(parts)
    for chunk in log_w.split([*parts, rest]) if rest >= 0 else log_w.split(parts[0]):
        if len(chunk):
            pieces.add(LAYOUTS[layout](chunk).detach())
    assert_close(whole.log_mean(), log_w.logsumexp(0) - math.log(len(log_w)), rtol=1e-9, atol=1e-9)
    for name in ("log_mean", "elbo", "ess", "standard_error", "k_hat"):
        assert_close(getattr(pieces, name)(), getattr(whole, name)(), rtol=1e-6, atol=1e-7, equal_nan=True)
