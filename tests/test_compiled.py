"""Compiled functions of tensors: the function's own results, and errors that say what cannot be compiled."""

import argparse
import functools
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from pyrovae import Compiled, CompileError, compiled
from pyrovae.conditionals import DiagonalNormal
from pyrovae.conditionals.conditional import networks_in
from pyrovae.watch import PythonState

pytestmark = pytest.mark.usefixtures("float64")
WEIGHT = 2.0
SETTINGS = types.ModuleType("settings")
OPTIONS = {"nested": [1.0, {"weight": 2.0}]}


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours, theirs):
    (mine, spec), (others, other_spec) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert spec == other_spec
    for value, other in zip(mine, others, strict=True):
        if isinstance(other, torch.Tensor):
            assert_close(value, other, rtol=1e-12, atol=1e-12)
        else:
            assert type(value) is type(other)
            assert value == other


def assert_same_noise(compiled_function, function, *args):
    """The results and the random state after, of both, from the same seed."""
    results = []
    for run in (compiled_function, function):
        torch.manual_seed(1)
        results.append((run(*args), torch.get_rng_state()))
    (ours, state), (theirs, other_state) = results
    assert_same(ours, theirs)
    assert torch.equal(state, other_state), "another amount of noise was drawn"


# Arguments and results


def test_arguments_and_results_may_be_nested():
    def function(pair, options, *, shift=0.0):
        a, b = pair
        first = options["weights"][0] * a + shift
        return {
            "sum": first + b,
            "rest": [(a - b, options["name"]), options["power"], None],
            "b": b ** options["power"],
        }

    compiled_function = Compiled(function)
    a, b = data(3, 2), data(3, 2, seed=1)
    for weight in (0.5, 2.0, math.pi):
        args = (a * weight, b), {"weights": [weight, 1.0], "name": "x", "power": 2}
        assert_same(compiled_function(*args), function(*args))
        assert_same(compiled_function(*args, shift=weight), function(*args, shift=weight))
    assert compiled_function.num_traces == 2  # with shift and without
    for options in ({"name": "y", "power": 2}, {"name": "x", "power": 3}):
        args = (a, b), {"weights": [0.5, 1.0], **options}
        assert_same(compiled_function(*args), function(*args))
    assert compiled_function.num_traces == 4  # strings and integers are constants
    args = (a[:2], b[:2]), {"weights": [0.1, 1.0], "name": "x", "power": 2}
    assert_same(compiled_function(*args), function(*args))
    assert compiled_function.num_traces == 5  # and so are shapes


def test_a_flag_is_another_constant_than_a_number():
    function = Compiled(lambda x, on: x * 2 if on is True else x)
    x = data(3)
    assert torch.equal(function(x, True), 2 * x)
    assert torch.equal(function(x, 1), x)


def test_a_float_keeps_its_precision_beside_a_tensor_of_less():
    """Must be a Python number's precision: 0.1 as float32 is wrong in the ninth digit."""
    x, y = data(3).float(), data(3)
    assert_same(Compiled(lambda x, y, weight: y * weight)(x, y, 0.1), y * 0.1)


def test_an_argument_that_is_no_constant_is_an_error():
    with pytest.raises(CompileError, match="got set"):
        Compiled(lambda x, chosen: x)(data(3), {1, 2})
    with pytest.raises(CompileError, match="got ndarray"):
        Compiled(lambda x, y: x)(data(3), np.ones(3))


def test_two_arguments_that_were_one_tensor_may_differ_later():
    x, y = data(3, 2), data(3, 2, seed=1)
    function = Compiled(lambda x, y: x - 2 * y)
    for args in ((x, x), (x, y), (y, x), (y, y)):
        assert_same(function(*args), args[0] - 2 * args[1])


def test_an_argument_that_was_a_captured_tensor_may_differ_later():
    captured, x = data(3, 2), data(3, 2, seed=1)
    function = Compiled(lambda x: x - 2 * captured)
    for argument in (captured, x, captured[:], x.clone()):
        assert_same(function(argument), argument - 2 * captured)


def test_inputs_need_not_be_contiguous():
    long = data(12, 3)
    function = Compiled(lambda x, y: torch.softmax(x @ y.T, -1).cumsum(0))
    for x in (data(4, 3), data(3, 4).T, long[1:5], long[::3], data(1, 3).expand(4, 3), data(4, 6)[:, 1:4]):
        assert_same(function(x, long), torch.softmax(x @ long.T, -1).cumsum(0))


# Tensors that a function refers to


def test_captured_tensors_are_read_anew():
    """Scalars, single entries and constant vectors too, which a compiler likes to copy into its code."""
    tensors = [torch.tensor(2.0), torch.ones(1), torch.ones(2), torch.zeros(3, 2), nn.Parameter(torch.tensor(0.5))]
    integer = torch.tensor([1, 1])

    def function(x):
        scalar, entry, ones, zeros, parameter = tensors
        return x * scalar.exp() + entry + ones * 2 + (zeros + ones * scalar) * parameter + integer + x[integer].sum()

    compiled_function, x = Compiled(function, [function]), data(3, 2)
    assert_same(compiled_function(x), function(x).detach())
    for tensor in tensors:
        tensor.detach().add_(0.25)
        assert_same(compiled_function(x), function(x).detach())
    tensors[-1].data = torch.tensor(7.0)
    integer.copy_(torch.tensor([0, 2]))
    assert_same(compiled_function(x), function(x).detach())
    assert compiled_function.num_traces == 1
    tensors[2] = data(2, seed=2)  # another object
    assert_same(compiled_function(x), function(x).detach())
    assert compiled_function.num_traces == 2


def test_captured_buffers_are_changed_once_in_each_call():
    """Must hold for a counter and for running averages, in the call that traces too."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("ones", torch.zeros(2))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.count += 1
            self.ones.add_(1.0)
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            return (x - self.mean) * self.count

    ours, theirs = Running(), Running()
    compiled_function = Compiled(ours, [ours])
    for seed in range(3):
        x = data(3, 2, seed=seed)
        assert_same(compiled_function(x), theirs(x))
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_an_argument_that_is_changed_in_place_is_changed():
    def function(x, y):
        x.add_(1.0)
        return (x * y).sum()

    compiled_function = Compiled(function)
    for seed in range(2):
        ours, theirs = data(3, seed=seed), data(3, seed=seed)
        assert_same(compiled_function(ours, ours.clone()), function(theirs, theirs.clone()))
        assert_same(ours, theirs)


def test_networks_have_a_train_and_an_eval_mode():
    """Batch norm's statistics and dropout's noise are those of the network itself."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU()) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    compiled_function = Compiled(lambda x: ours(x).detach(), [ours])
    for mode in (True, True, False, True, False):
        ours.train(mode)
        theirs.train(mode)
        assert_same_noise(compiled_function, lambda x: theirs(x).detach(), data(6, 3))
        assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert compiled_function.num_traces == 2


def test_a_captured_distribution_is_as_it_was():
    """Must not keep what it computes on first use, here its logits, from the trace: they would be no numbers."""
    prior = dist.Categorical(probs=torch.tensor([0.2, 0.8]))
    function, y = Compiled(lambda y: prior.log_prob(y)), torch.tensor([0, 1, 1])
    expected = torch.tensor([0.2, 0.8, 0.8]).log()
    assert_same(function(y), expected)
    assert_same(prior.log_prob(y), expected)
    assert_same(function(y[:2]), expected[:2])


def test_labels_are_made_one_hot():
    function = Compiled(lambda y: F.one_hot(y, 4).double() @ torch.arange(4.0))
    for y in (torch.tensor([0, 3, 1]), torch.tensor([2, 2, 2])):
        assert_same(function(y), y.double())


def test_warnings_of_the_compiler_are_no_errors():
    """torch's inductor warns of itself as it compiles a diagonal, which is nothing that a user could mend."""
    x = data(2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(Compiled(lambda x: x.tril().diagonal(dim1=-2, dim2=-1).exp())(x), x.diagonal(dim1=1, dim2=2).exp())


# Noise

ONE = torch.ones(3, dtype=torch.float64)
DRAWN = {
    "normal": lambda: dist.Normal(ONE, ONE),
    "uniform": lambda: dist.Uniform(0 * ONE, ONE),
    "gamma": lambda: dist.Gamma(ONE, ONE),
    "beta": lambda: dist.Beta(ONE, ONE),
    "dirichlet": lambda: dist.Dirichlet(ONE),
    "poisson": lambda: dist.Poisson(3 * ONE),
    "binomial": lambda: dist.Binomial(5, ONE / 2),
    "categorical": lambda: dist.Categorical(ONE / 3),
    "student": lambda: dist.StudentT(3 * ONE),
}


def test_draws_in_a_row_are_those_of_the_function():
    """Each kind, in two shapes."""

    def function(x):
        drawn = {}
        for name, make in DRAWN.items():
            drawn[name] = make().sample((2,)), make().sample((3,))
        return drawn, torch.randn(3) + x, torch.randperm(5), torch.randint(9, (4,))

    assert_same_noise(Compiled(function), function, data(3))


def test_the_order_of_draws_does_not_depend_on_their_memory():
    """Large and small in turn, and results in another order, so that a compiler would like to move them."""

    def function(x):
        large, small = torch.randn(300, 50), torch.rand(3)
        mean = large.sum(0)
        other, few = torch.randn(200, 50), torch.randn(4)
        gamma = torch._standard_gamma(torch.ones(5))
        last = torch.rand(100, 50)
        return (other @ mean).sum() + few.sum(), gamma, x + small, last.sum() * mean

    assert_same_noise(Compiled(function), function, data(3))


def test_bernoulli_draws_are_those_of_the_function_also_where_the_environment_has_ci(monkeypatch):
    monkeypatch.setenv("CI", "1")

    def function(x):
        return torch.bernoulli(x), dist.Bernoulli(x).sample((2,)), torch.rand(3)

    assert_same_noise(Compiled(function), function, data(3).sigmoid())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_log_sigmoid_is_right_to_rounding_with_its_gradient(dtype, tolerance):
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])]).to(dtype)

    def function(x):
        (gradient,) = torch.autograd.grad((value := F.logsigmoid(x)).sum(), x)
        return value.detach(), gradient

    ours = Compiled(function)(x.requires_grad_())
    exact = F.logsigmoid(x.detach().double()), torch.sigmoid(-x.detach().double())
    for value, other in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert_close(value.double(), other, rtol=tolerance, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.randn(n),
        lambda n: torch.randperm(n),
        lambda n: dist.Normal(ONE, ONE).sample((n,)),
        lambda n: dist.Uniform(0 * ONE, ONE).sample((n,)),
        lambda n: dist.Gamma(ONE, ONE).sample((n,)),
        lambda n: dist.StudentT(3 * ONE).sample((n,)),
        lambda n: F.dropout(torch.ones(n), 0.5),
    ],
    ids=["randn", "randperm", "normal", "uniform", "gamma", "student", "dropout"],
)
def test_draws_that_nobody_looks_at_are_made_in_their_place(draw):
    """As a plate draws the rows of a minibatch, also where it is there for the scale alone."""

    def function(x):
        first = draw(2)
        draw(3)
        return first, draw(2), torch.rand(3) + x

    assert_same_noise(Compiled(function), function, data(3))


# Python values that a function refers to


class Reader(nn.Module):
    """Reads a number in each of the places where one may be kept."""

    scale = 2.0

    def __init__(self):
        super().__init__()
        self.weight = 2.0
        self.options = {"nested": [1.0, {"weight": 2.0}]}
        self.child = nn.Dropout(0.5)

    def forward(self, x):
        return WEIGHT * x

    def by_helper(self, x):
        return self.forward(x)

    def by_class(self, x):
        return self.scale * x

    def by_attribute(self, x):
        return self.weight * x * self.options["nested"][1]["weight"]


@dataclass(slots=True)
class Slots:
    weight: float = 2.0


def reads_a_global(x):
    return WEIGHT * x


def reads_a_container(x):
    return OPTIONS["nested"][1]["weight"] * x


def reads_a_global_in_a_comprehension(x):
    return sum(WEIGHT * row for row in x)


def reads_a_global_in_a_lambda(x):
    return (lambda row: WEIGHT * row)(x)


def reads_through_a_helper(x):
    return reads_a_global(x) + 1


def reads_a_module(x):
    return SETTINGS.weight * x


def closure(value, read):
    return lambda x: read(value) * x


def cell():
    weight = 2.0

    def change():
        nonlocal weight
        weight = 3.0

    return lambda x: weight * x, change


def places():
    """For each place: what to watch, and a function that changes the number there."""
    reader, namespace, slots, chosen = Reader(), argparse.Namespace(weight=2.0), Slots(), {"a"}
    partial, net = functools.partial(lambda weights, x: weights[0] * x, [2.0]), nn.Linear(2, 2)
    function, change = cell()
    nested, queue = OPTIONS["nested"][1], deque([2.0])

    def by_default(x, options={"weight": 2.0}, *, more=2.0):  # noqa: B006
        return x * options["weight"] * more

    def the_global():
        globals()["WEIGHT"] = 3.0

    return {
        "a closure's variable": (function, change),
        "an attribute": (reader.by_attribute, lambda: setattr(reader, "weight", 3.0)),
        "a container of an attribute": (reader, lambda: reader.options["nested"][1].update(weight=3.0)),
        "a module's mode": (reader, reader.child.eval),
        "a module in the place of another": (reader, lambda: setattr(reader, "child", nn.Identity())),
        "a forward hook": (reader, lambda: reader.child.register_forward_hook(lambda *args: None)),
        "a parameter in the place of another": (net, lambda: setattr(net, "weight", nn.Parameter(torch.ones(2, 2)))),
        "a partial's argument": (partial, lambda: partial.args[0].__setitem__(0, 3.0)),
        "a longer list": (reader, lambda: reader.options["nested"].append(1)),
        "a global": (reads_a_global, the_global),
        "a container that is global": (reads_a_container, lambda: nested.update(weight=3.0)),
        "a global of a helper": (reads_through_a_helper, the_global),
        "a global in a comprehension": (reads_a_global_in_a_comprehension, the_global),
        "a global in a lambda": (reads_a_global_in_a_lambda, the_global),
        "a global in a module's forward": (reader, the_global),
        "a global in a method's helper": (reader.by_helper, the_global),
        "an attribute of the class": (reader.by_class, lambda: setattr(Reader, "scale", 3.0)),
        "a namespace": (closure(namespace, attrgetter("weight")), lambda: setattr(namespace, "weight", 3.0)),
        "a dataclass with slots": (closure(slots, attrgetter("weight")), lambda: setattr(slots, "weight", 3.0)),
        "a settings module": (reads_a_module, lambda: setattr(SETTINGS, "weight", 3.0)),
        "a container among the defaults": (by_default, lambda: by_default.__defaults__[0].update(weight=3.0)),
        "the default of a keyword": (by_default, lambda: by_default.__kwdefaults__.update(more=3.0)),
        "a deque": (closure(queue, lambda value: value[0]), lambda: queue.appendleft(3.0)),
        "a set": (closure(chosen, lambda value: 3.0 if "b" in value else 2.0), lambda: chosen.add("b")),
    }


@pytest.fixture
def _numbers_put_back():
    SETTINGS.weight = 2.0
    yield
    globals()["WEIGHT"], Reader.scale, OPTIONS["nested"][1]["weight"] = 2.0, 2.0, 2.0


@pytest.mark.usefixtures("_numbers_put_back")
@pytest.mark.parametrize("place", places())
def test_a_python_value_that_changes_is_noticed(place):
    root, change = places()[place]
    state = PythonState([root])
    assert state.changed() is None
    change()
    assert state.changed() is not None


def test_a_python_value_that_is_set_to_what_it_was_has_not_changed():
    reader = Reader()
    state = PythonState([reader.by_attribute])
    reader.weight = float("2")
    reader.options["nested"][0] = 1.0
    assert state.changed() is None
    reader.weight = 3.0
    assert state.changed() == "Reader.weight"
    reader.weight = 2.0
    assert state.changed() is None


def test_changed_values_have_graphs_of_their_own_and_find_them_again():
    reader = Reader()
    function = Compiled(reader.by_attribute, [reader.by_attribute])
    x = data(3)
    for weight in (2.0, 3.0, 2.0, 3.0):
        reader.weight = weight
        assert_same(function(x), reader.by_attribute(x))
    assert function.num_traces == 2


def test_gradients_dtypes_and_precisions_have_graphs_of_their_own():
    torch.set_default_dtype(torch.float32)
    conditional = DiagonalNormal.mlp(2, 2, hidden=(3,))
    net, x = nn.Linear(2, 2), data(3, 2).float()

    def function(x):
        return net(x).requires_grad, net(x).detach(), conditional(x).mean.detach(), x.new_ones(()) + torch.ones(2)

    compiled_function = Compiled(function)
    for context in (nullcontext(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), networks_in("bf16-mixed")):
        with context:
            ours, theirs = compiled_function(x), function(x)
        for value, other in zip(ours, theirs, strict=True):
            assert_close(value, other, rtol=0.02, atol=0.02)  # which checks dtypes exactly
        assert ours[0] is theirs[0]
    torch.set_default_dtype(torch.float64)
    assert compiled_function(x)[3].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    compiled_function(x)
    assert compiled_function.num_traces == 5


def test_many_traces_are_told_with_what_changed(monkeypatch):
    monkeypatch.setattr(compiled, "MANY_TRACES", 2)
    reader, x = Reader(), data(3)
    function = Compiled(reader.by_attribute, [reader.by_attribute])
    for number in range(2):
        reader.weight = float(number)
        function(x)
    reader.weight = 7.0
    with pytest.warns(UserWarning, match=r"Compiled 2 times.*Reader\.weight"):
        function(x)
    function(x)


@pytest.mark.parametrize("arguments", [(1, 2, 3), ("a", "b", "c")], ids=["integers", "strings"])
def test_many_traces_are_told_where_arguments_are_to_blame(monkeypatch, arguments):
    monkeypatch.setattr(compiled, "MANY_TRACES", 2)
    function, x = Compiled(lambda x, constant: 2 * x), data(3)
    for constant in arguments[:2]:
        function(x, constant)
    with pytest.warns(UserWarning, match="Compiled 2 times"):
        function(x, arguments[2])


# Errors


def raises(function, *args, match):
    with pytest.raises(CompileError, match=match) as caught:
        Compiled(function, [function])(*args)
    assert "compile=False" in str(caught.value)
    return str(caught.value)


def names_its_line(message, code):
    """The file, the line's number and the line itself, of the line that has this code."""
    line = re.search(re.escape(__file__) + r":(\d+): (.*)", message)
    assert line, message
    assert code in line[2], message
    with open(__file__) as file:
        assert code in file.read().splitlines()[int(line[1]) - 1]


def test_a_choice_by_an_argument_is_an_error():
    def function(x):
        if x.sum() > 0:
            return x
        return -x

    names_its_line(raises(function, data(3), match="depend on values"), "if x.sum() > 0:")


def test_a_choice_by_a_float_argument_is_an_error():
    def function(x, weight):
        return x if weight > 0.5 else -x

    names_its_line(raises(function, data(3), 0.3, match="depend on values"), "if weight > 0.5")


def test_a_choice_by_a_captured_parameter_is_an_error():
    parameter = nn.Parameter(torch.tensor(1.0))

    def function(x):
        return x if parameter > 0 else -x

    names_its_line(raises(function, data(3), match="depend on values"), "if parameter > 0")


def test_an_item_of_a_captured_buffer_is_an_error():
    buffer = torch.tensor(2.0)

    def function(x):
        return x * buffer.item()

    names_its_line(raises(function, data(3), match="depend on values"), "buffer.item()")


def test_an_item_of_what_was_computed_is_an_error():
    def function(x):
        return x * x.mean().item()

    names_its_line(raises(function, data(3), match="depend on values"), "x.mean().item()")


def test_an_item_in_the_result_is_an_error():
    def function(x):
        return x, x.mean().item()

    raises(function, data(3), match="depend on values")


def test_a_list_of_a_captured_buffer_is_an_error():
    """`tolist` reads memory without passing by torch's operations."""
    buffer = torch.tensor([2.0, 3.0])

    def function(x):
        return x * buffer.tolist()[0]

    raises(function, data(3), match="depend on values")


def test_a_boolean_mask_is_an_error():
    def function(x):
        return x[x > 0].sum()

    names_its_line(raises(function, data(3), match="depend on values"), "x[x > 0]")


def test_a_numpy_array_of_an_argument_is_an_error():
    def function(x):
        return x * float(x.numpy()[0])

    names_its_line(raises(function, data(3), match="depend on values"), "x.numpy()")


def test_a_numpy_array_of_a_captured_buffer_is_an_error():
    buffer = torch.tensor([2.0, 3.0])

    def function(x):
        return x * float(buffer.numpy()[0])

    names_its_line(raises(function, data(3), match="depend on values"), "buffer.numpy()")


def test_a_loop_as_long_as_a_value_is_an_error():
    def function(x):
        return sum(x[0] for _ in range(int(x.max())))

    names_its_line(raises(function, data(3), match="depend on values"), "range(int(x.max()))")


def test_an_error_names_the_site_before_it():
    def function(x):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        return pyro.sample("never", dist.Normal(z, 1.0)) if z.sum() > 0 else z

    raises(function, data(3), match="after site 'z', at ")


def test_a_counter_is_an_error_that_names_it():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = 0

        def forward(self, x):
            self.steps += 1
            return x / self.steps

    raises(Counter(), data(3), match=r"got Counter\.steps, which it changes")


def test_a_list_that_grows_is_an_error_that_names_it():
    seen = []

    def function(x):
        seen.append(x)
        return x

    raises(function, data(3), match=r"got .*function\.seen, which it changes")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: np.random.rand(),
        functools.partial(lambda own: own.random(), random.Random(0)),
        functools.partial(lambda own: own.random(), np.random.default_rng(0)),
    ],
    ids=["random", "numpy", "a random.Random", "a numpy Generator"],
)
def test_noise_that_torch_does_not_draw_is_an_error(draw):
    raises(lambda x: x + draw(), data(3), match="NumPy or Python")


def test_a_program_that_sets_torchs_seed_is_an_error():
    def function(x):
        torch.manual_seed(1)
        return x + torch.rand(3)

    state = torch.manual_seed(0).get_state()
    raises(function, torch.ones(3), match="generator to its caller")
    assert torch.equal(torch.get_rng_state(), state)


def test_an_ordinary_mistake_stays_the_ordinary_error():
    function, x = Compiled(lambda x, y: x @ y), data(3, 2)
    with pytest.raises(RuntimeError, match=r"3.?, ?2|3x2") as caught:
        function(x, x)
    assert not isinstance(caught.value, CompileError)
    assert any("traced" in note for note in caught.value.__notes__)
    with pytest.raises(KeyError, match="absent"):
        Compiled(lambda x: {}["absent"])(x)
    assert_same(function(x, x.T), x @ x.T)


def test_a_function_that_was_mended_is_called_again():
    class Mended(nn.Module):
        def __init__(self):
            super().__init__()
            self.by_value = True

        def forward(self, x):
            return x if self.by_value and x.sum() > 0 else 2 * x

    net, x = Mended(), data(3).abs()
    function = Compiled(net, [net])
    for _ in range(2):
        with pytest.raises(CompileError):
            function(x)
    net.by_value = False
    assert_same(function(x), 2 * x)
    net.by_value = True
    with pytest.raises(CompileError):
        function(x)


def test_auto_goes_on_uncompiled_after_a_warning():
    """With the right result, wherever tracing fails."""
    x = data(3)
    for function in (lambda x: x if x.sum() > 0 else -x, lambda x: x[x > 0]):
        auto = Compiled(function, compile="auto")
        with pytest.warns(UserWarning, match="Goes on uncompiled. Expected"):
            assert_same(auto(x), function(x))
        assert_same(auto(-x), function(-x))
    good = Compiled(lambda x: 2 * x, compile="auto")
    assert_same(good(x), 2 * x)
    with pytest.raises(ValueError, match="'sometimes'"):
        Compiled(lambda x: x, compile="sometimes")


def test_a_machine_without_a_compiler_is_told_so(tmp_path):
    script = textwrap.dedent("""
        import torch
        from pyrovae import Compiled, CompileError
        try:
            Compiled(lambda x: (x * 2).exp().sum())(torch.ones(8))
        except CompileError as error:
            print("CompileError:", error)
        print(Compiled(lambda x: (x * 2).sum(), compile="auto")(torch.ones(8)))
    """)
    (tmp_path / "bin").mkdir()
    environment = os.environ | {
        "CXX": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": str(tmp_path / "bin"),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "CompileError: Expected a C++ compiler" in run.stdout
    for remedy in ("g++", "CXX", "compile=False"):
        assert remedy in run.stdout
    assert "tensor(16.)" in run.stdout
    assert "Goes on uncompiled" in run.stderr
