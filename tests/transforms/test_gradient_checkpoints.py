"""Transforms at call sites inside functions that `torch.utils.checkpoint` runs twice."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from compress_core import Stage
from compress_core.trace import trace
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms import add_activation_transform
from tests.activation_helpers import Scale

X = torch.linspace(-1, 2, 8).reshape(2, 4)

SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
OPTIONS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "reentrant without generators": {"use_reentrant": True, "preserve_rng_state": False},
    "without generators": {"use_reentrant": False, "preserve_rng_state": False},
    "to the end": {"use_reentrant": False, "early_stop": False},
    "contexts": {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), contextlib.nullcontext())},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(x)) + x)


class Net(nn.Module):
    def __init__(self, function, options=None):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.options = function, options
        self.first, self.second, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), Inner()
        self.parts = nn.Sequential(Inner(), nn.Tanh(), Inner())

    def call(self, function, *args):
        return function(*args) if self.options is None else checkpoint(function, *args, **self.options)

    def method(self, x):
        return torch.tanh(torch.tanh(self.second(x)) - 1)

    def forward(self, x):
        return self.function(self, torch.tanh(self.first(x)))


def nested_function(net, x):
    def inside(y):
        return torch.tanh(net.second(y) + y)

    return torch.tanh(net.call(inside, x) + 1)


def nested_checkpoints(net, x):
    def inside(y):
        return torch.tanh(net.second(y))

    def outside(y):
        y = net.call(inside, y)
        return net.call(inside, torch.tanh(y + 1))

    return torch.tanh(net.call(outside, x))


def loop(net, x):
    for layer in (net.first, net.second, net.first):
        x = torch.tanh(net.call(lambda y, layer=layer: torch.tanh(layer(y)) + y, x) - 0.1)
    return x


def several(net, x):
    y, z = net.call(lambda a, b: (torch.tanh(net.first(a)), torch.tanh(net.second(b))), x, 2 * x)
    return torch.tanh(y - z)


FUNCTIONS = {
    "nested function": nested_function,
    "method": lambda net, x: torch.tanh(net.call(net.method, x)),
    "lambda": lambda net, x: net.call(lambda y: torch.tanh(torch.tanh(net.second(y)) + y), x),
    "module": lambda net, x: torch.tanh(net.call(net.inner, x)),
    "nested checkpoints": nested_checkpoints,
    "loop": loop,
    "several tensors": several,
    "replaced activation": lambda net, x: F.relu(net.call(lambda y: F.relu(net.second(F.relu(y))), x)),
}


def transformed(function, options=None):
    """Returns a model with a different transform after each call."""
    net = Net(function, options)
    found = trace(net, X)
    sites = Sites(found)
    places = dict.fromkeys(sites.output_place(CallRef(0, call.index), ()) for call in found.forwards[0].calls)
    for number, place in enumerate(places):
        add_activation_transform(net, place, Scale(1 + number / 10), stage=Stage.PRECISION, key="q")
    return net


def gradients(net, called=None, times=1):
    for _ in range(times):
        net.zero_grad()
        (net if called is None else called)(X.clone().requires_grad_()).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_without_checkpoints(function, options):
    expected = gradients(transformed(FUNCTIONS[function]))
    net = transformed(FUNCTIONS[function], OPTIONS[options])
    assert_equal(gradients(net, times=2), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_sequential_checkpoints(reentrant):
    def function(net, x):
        if net.options is None:
            return torch.tanh(net.parts(x))
        return torch.tanh(checkpoint_sequential(net.parts, 2, x, use_reentrant=reentrant))

    assert_equal(gradients(transformed(function, {})), gradients(transformed(function)))


def test_a_graph_that_is_kept_is_recomputed_twice():
    expected = gradients(transformed(nested_checkpoints))
    net = transformed(nested_checkpoints, OPTIONS["not reentrant"])
    loss = net(X).square().sum()
    loss.backward(retain_graph=True)
    net.zero_grad()
    loss.backward()
    assert_equal({name: p.grad for name, p in net.named_parameters() if p.grad is not None}, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_autocast(reentrant):
    def run(net):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(X.clone().requires_grad_()).float().square().sum()
        loss.backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    expected = run(transformed(nested_function))
    assert_equal(run(transformed(nested_function, {"use_reentrant": reentrant})), expected)


@pytest.mark.parametrize("function", ["nested checkpoints", "replaced activation"])
def test_compiled_models_have_the_transforms_inside_of_checkpoints(function):
    expected = gradients(transformed(FUNCTIONS[function]))
    net = transformed(FUNCTIONS[function], {"use_reentrant": False})
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(net, compiled), expected)
