"""Activation transforms: what is computed."""

import copy
import logging
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import TransformError, mask_weight
from compress_core.transforms import (
    CallInput,
    CallOutput,
    CallPattern,
    ModuleInput,
    ModuleOutput,
)
from compress_core.transforms.call_sites import _NEVER_HIDDEN, explains
from tests.activation_helpers import Function, FusedScale, Scale, add, calls


def test_module_input_and_output(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    linear = copy.deepcopy(model[0])
    add(model, ModuleInput("0"), Scale(2.0))
    add(model, ModuleOutput("0"), Scale(3.0))
    assert torch.allclose(model(x), (3 * linear(2 * x)).relu())
    assert type(model) is nn.Sequential
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "Linear"


def test_arguments_are_found_by_position_and_by_keyword(x):
    class Two(nn.Module):
        def forward(self, a, b, *, c=None):
            return a + 10 * b + (0 if c is None else 100 * c)

    model = Two()
    add(model, ModuleInput("", (1,)), Scale(2.0))
    add(model, ModuleInput("", ("c", 0, "k")), Scale(3.0))
    assert torch.allclose(Two()(x, 2 * x), model(x, x))
    assert torch.allclose(Two()(x, 2 * x), model(x, b=x))

    def run(c):
        class Nested(nn.Module):
            def forward(self, a, b, *, c):
                return c[0]["k"]

        nested = Nested()
        add(nested, ModuleInput("", ("c", 0, "k")), Scale(3.0))
        return nested(x, x, c=c)

    given = [{"k": x}]
    assert torch.allclose(run(given), 3 * x)
    assert given[0]["k"] is x  # the caller's own containers stay as they are


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("make", "item"),
    [
        (lambda t: t, ()),
        (lambda t: (t, 1), (0,)),
        (lambda t: [0, [t]], (1, 0)),
        (lambda t: {"a": {"b": t}}, ("a", "b")),
        (lambda t: Pair(0, t), (1,)),
        (lambda t: torch.max(t, 1, keepdim=True), (0,)),
    ],
)
def test_item_of_a_nested_result(x, make, item):
    model = Function(make)
    add(model, ModuleOutput("", item), Scale(2.0))

    def read(value):
        for step in item:
            value = value[step]
        return value

    plain, result = make(x), model(x)
    assert torch.equal(read(result), 2 * read(plain))
    assert type(result) is type(plain)


def test_lists_that_grow_in_a_loop_are_transformed_where_they_have_the_item(x):
    def grow(t):
        parts = [t]
        for _ in range(3):
            parts.append(torch.cat(parts, 1))
        return parts[-1]

    model = Function(grow)
    add(model, CallInput("", "torch.cat", calls(0, (0, 0, 0)), (0, 2)))
    # The third list has a third item, which is twice as long as x.
    expected = torch.cat([x, x, torch.cat([x, x], 1) * 10], 1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("item", "value", "message"),
    [
        ((), lambda t: (t, t), r"model: output: the value is a tuple where the example input gave a tensor"),
        ((), lambda t: {"a": t}, r"model: output: the value is a dict where"),
        ((0,), lambda t: t, r"model: output 0: the value has no item 0: it is a Tensor where"),
    ],
)
def test_another_structure_is_named(item, value, message, x):
    model = Function(value)
    add(model, ModuleOutput("", item))
    with pytest.raises(TransformError, match=message):
        model(x)


def test_a_forward_that_sets_requires_grad_of_a_transformed_input_is_told(x):
    def forward(t):
        t = t[:, None]
        t.requires_grad = True
        return t * 2

    model = Function(forward)
    handle = add(model, ModuleInput("", (0,)))
    with pytest.raises(TransformError, match="sets requires_grad of a tensor that is transformed"):
        model(x)
    handle.remove()
    assert model(x).requires_grad


def test_missing_item_and_argument_are_named(x):
    model = Function(lambda t: {"b": t})
    handle = add(model, ModuleOutput("", ("a",)))
    with pytest.raises(TransformError, match=r"model: output a: the value has no item 'a'"):
        model(x)
    handle.remove()
    model.function = lambda t: torch.relu(input=t)
    add(model, CallInput("", "torch.relu", calls(), (0,)))
    with pytest.raises(TransformError, match=r"this call has no argument 0"):
        model(x)


FUNCTIONS = {
    "torch.Tensor.add": lambda t: 1 + t,
    "torch.Tensor.mul": lambda t: t * 3,
    "torch.Tensor.sub": lambda t: t - 1,
    "torch.Tensor.__rsub__": lambda t: 1 - t,
    "torch.Tensor.matmul": lambda t: t @ torch.ones(3, 2),
    "torch.cat": lambda t: torch.cat([t, t]),
    "torch.nn.functional.relu": F.relu,
    "torch.nn.functional.gelu": F.gelu,
    "torch.nn.functional.softmax": lambda t: F.softmax(t, 1),
    "torch.nn.functional.layer_norm": lambda t: F.layer_norm(t, (3,)),
    "torch.nn.functional.linear": lambda t: F.linear(t, torch.ones(2, 3)),
    "torch.Tensor.mean": lambda t: t.mean(1),
    "torch.sigmoid": torch.sigmoid,
    "torch.nn.functional.hardtanh": F.hardtanh,
    "torch.stack": lambda t: torch.stack([t, t]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_call_output_eager_compiled_and_exported(x, name):
    model, expected = Function(FUNCTIONS[name]), 10 * FUNCTIONS[name](x)
    add(model, CallOutput("", name, calls()))
    torch.compiler.reset()
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    assert torch.equal(torch.export.export(model, (x,), strict=False).module()(x), expected)


@pytest.mark.parametrize("name", ["torch.nn.functional.hardswish", "torch.nn.functional.pad"])
def test_function_that_dynamo_hides_is_never_left_uncompressed(x, name, caplog):
    function = F.hardswish if "hardswish" in name else lambda t: F.pad(t, (1, 1))
    model = Function(function)
    add(model, CallOutput("", name, calls()))
    expected = 10 * function(x)
    assert torch.equal(model(x), expected)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match="hides calls of"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert torch.equal(torch.export.export(model, (x,), strict=False).module()(x), expected)


VISIBLE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    **{
        name: getattr(F, name) for name in ("hardtanh", "elu", "leaky_relu", "selu", "celu", "mish", "glu", "normalize")
    },
    "group_norm": lambda x: F.group_norm(x[None], 1),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "interpolate": lambda x: F.interpolate(x[None], 8),
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "max_pool2d": lambda x: F.max_pool2d(x[None], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x[None], 2),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_functions_that_a_module_may_skip_are_never_hidden(name):
    """Where a trace has runs without a call, none in a compiled graph says nothing."""
    assert {f"torch.nn.functional.{known}" for known in VISIBLE} == _NEVER_HIDDEN
    model, x = Function(VISIBLE[name]), torch.randn(1, 4, 4)
    add(model, CallOutput("", f"torch.nn.functional.{name}", CallPattern(0, (0,), counts=(0,), training_counts=(0,))))
    torch.compiler.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), 10 * VISIBLE[name](x))


def test_one_argument_of_one_call(x):
    model = Function(lambda t: torch.cat([t, torch.cat([t, t])]))
    add(model, CallInput("", "torch.cat", calls(1, (0, 1)), (0, 1)), Scale(2.0))
    assert torch.equal(model(x), torch.cat([x, 2 * torch.cat([x, x])]))


def test_calls_in_modules_below_are_counted(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Function(lambda t: torch.relu(t) + torch.relu(-t))

        def forward(self, t):
            return torch.relu(self.inner(torch.relu(t)))

    model = Net()
    sites = (0, 1, 2, 3)
    add(model, CallOutput("", "torch.relu", calls(2, sites)), Scale(5.0))
    # The same call once more, as seen from the module that makes it.
    add(model, CallOutput("inner", "torch.relu", calls(1, (0, 1))), Scale(3.0))
    add(model, CallOutput("", "torch.relu", calls(3, sites)), Scale(2.0))
    r = torch.relu
    inner = r(r(x)) + 15 * r(-r(x))
    assert torch.equal(model(x), 2 * r(inner))
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), 2 * r(inner))


def test_transforms_and_weight_chains_are_not_counted(x):
    class Multiplies(nn.Module):
        def forward(self, t):
            return t.mul(2).mul(2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3, bias=False)

        def forward(self, t):
            return self.fc(t).mul(1.0) + t.mul(1.0)

    model = Net()
    mask_weight(model, "fc.weight", torch.eye(3))
    add(model, ModuleOutput("fc"), Multiplies())
    add(model, CallOutput("", "torch.Tensor.mul", calls(0, (0, 1))), Scale(5.0))
    diagonal = model.fc.weight.detach().diagonal()
    expected = 5 * 4 * x * diagonal + x
    torch.compiler.reset()
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        assert torch.allclose(run(x), expected)


def test_loop_of_any_length(x, caplog):
    class Net(nn.Module):
        def forward(self, t, turns):
            for _ in range(turns):
                t = torch.sigmoid(torch.tanh(t))
            return t

    def expected(turns):
        t = x
        for _ in range(turns):
            t = 2 * torch.sigmoid(torch.tanh(t))
        return t

    model = Net()
    add(model, CallOutput("", "torch.sigmoid", calls(0, (0, 0))), Scale(2.0))
    torch.compiler.reset()
    with caplog.at_level(logging.WARNING):
        for turns in (1, 2, 5):
            assert torch.allclose(model(x, turns), expected(turns))
            assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x, turns), expected(turns))
    assert not [record for record in caplog.records if record.name.startswith("compress_core")]


def test_training_and_eval_make_other_calls(x):
    class Net(nn.Module):
        def forward(self, t):
            return torch.sigmoid(torch.tanh(torch.sigmoid(t))) if self.training else torch.sigmoid(t)

    model = Net()
    add(model, CallOutput("", "torch.sigmoid", calls(1, (1,), (0, 1))), Scale(2.0))
    assert torch.equal(model(x), 2 * torch.sigmoid(torch.tanh(torch.sigmoid(x))))
    assert torch.equal(model.eval()(x), 2 * torch.sigmoid(x))


def test_other_number_of_calls_warns_once_with_the_remedy(x, caplog):
    class Net(nn.Module):
        def forward(self, t, twice):
            return torch.sigmoid(torch.sigmoid(t)) if twice else torch.sigmoid(t)

    model = nn.Sequential()
    model.body = Net()
    add(model, CallOutput("body", "torch.sigmoid", calls(0, (0,))))
    torch.compiler.reset()
    with caplog.at_level(logging.WARNING):
        torch.compile(model.body, backend="eager")(x, True)
        assert not [record for record in caplog.records if record.name.startswith("compress_core")]
        model.body(x, True)
        model.body(x, True)
    (record,) = [record for record in caplog.records if record.name.startswith("compress_core")]
    message = record.getMessage()
    for part in ("body", "training mode", "torch.sigmoid", "2 times", "1 calls", "example input for each path"):
        assert part in message, message


@pytest.mark.parametrize(
    ("sites", "seen", "explained"),
    [
        ((0,), 1, True),
        ((0,), 2, False),
        ((0,), 0, False),
        ((0, 0), 7, True),
        ((0, 0, 0), 1, True),
        ((0, 0), 0, False),
        ((0, 1, 0, 1), 6, True),
        ((0, 1, 0, 1), 5, False),
        ((2, 0, 1, 0, 1), 3, True),
        ((2, 0, 1, 0, 1), 1, False),
        ((0, 1), 1, False),
    ],
)
def test_which_counts_a_loop_explains(sites, seen, explained):
    assert explains(calls(0, sites), seen, training=False) is explained


def in_place_sum(t, other):
    t = t * 1.0
    t += other
    return t


def ignored_result(t, other):
    t = t * 1.0
    t.add_(other)
    return t


def ignored_relu(t, other):
    t = t + other
    torch.relu_(t)
    return t


def view_in_place(t, other):
    t = t * 1.0
    t[0] += other[0]
    return t


def out_argument(t, other):
    result = torch.empty(2, 3)
    torch.add(t.detach(), other.detach(), out=result)
    return result


def first_row(t, other):
    total = t + other
    return torch.stack([10 * total[0], t[1]])


IN_PLACE = {
    "+=": (in_place_sum, "torch.Tensor.add_", lambda t, o: 10 * (t + o)),
    "add_": (ignored_result, "torch.Tensor.add_", lambda t, o: 10 * (t + o)),
    "relu_": (ignored_relu, "torch.nn.functional.relu_", lambda t, o: 10 * F.relu(t + o)),
    "view": (view_in_place, "torch.Tensor.add_", first_row),
    "relu inplace=True": (
        lambda t, o: F.relu(t + o, inplace=True),
        "torch.nn.functional.relu",
        lambda t, o: 10 * F.relu(t + o),
    ),
}


@pytest.mark.parametrize("transform", [Scale, FusedScale])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_functions_hand_out_the_transformed_value(x, name, transform):
    function, called, expected = IN_PLACE[name]
    other = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    model = Function(function)
    add(model, CallOutput("", called, calls()), transform())
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for run in (model, compiled) if name != "relu_" else (model,):
        inputs = [t.clone().requires_grad_() for t in (x, other)]
        wanted = [t.clone().requires_grad_() for t in (x, other)]
        out = run(*inputs)
        assert torch.allclose(out, expected(*wanted))
        out.square().sum().backward()
        expected(*wanted).square().sum().backward()
        for a, b in zip(inputs, wanted, strict=True):
            assert torch.allclose(a.grad, b.grad)
        with torch.no_grad():
            assert torch.allclose(run(x.clone(), other), expected(x, other))


def test_input_of_an_in_place_function_is_written_back(x):
    model = Function(ignored_result)
    add(model, CallInput("", "torch.Tensor.add_", calls(), (0,)), Scale(3.0))
    add(model, CallInput("", "torch.Tensor.add_", calls(), (1,)), Scale(2.0))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            t = x.clone().requires_grad_(grad)
            out = model(t, torch.ones(2, 3))
            assert torch.allclose(out, 3 * x + 2)
    t = x.clone().requires_grad_()
    model(t, torch.ones(2, 3)).sum().backward()
    assert torch.equal(t.grad, torch.full((2, 3), 3.0))


def test_out_argument_gets_the_transformed_value(x):
    model = Function(out_argument)
    add(model, CallOutput("", "torch.add", calls()))
    assert torch.equal(model(x, x), 20 * x)
