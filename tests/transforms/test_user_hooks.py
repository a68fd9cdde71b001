"""What forward hooks of users call is not the model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

from compress_core.trace import trace
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms import CallOutput
from tests.activation_helpers import FusedScale, Scale, add, calls
from tests.transforms.hooked_models import HOOKS, RELU, Net, Statistics, assert_quiet, compute, transformed


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


WHERE = ["stem", "blocks.0.b", "blocks.1.act", "blocks.0", "blocks", ""]


@pytest.fixture
def global_hooks():
    handles = []
    yield handles
    for handle in handles:
        handle.remove()


def described(model, x):
    """All that plans are made of."""
    found = trace(model, x, training=True)
    forwards = [*found.forwards, *found.training]
    sites = Sites(found)
    places = [
        str(sites.output_place(CallRef(0, call.index), path))
        for call in found.forwards[0].calls
        for path, _ in call.outputs
    ]
    contents = [
        (
            [(c.function, c.frames, c.inputs, c.outputs, c.writes, c.operators) for c in forward.calls],
            [(o.name, o.inputs, o.outputs, o.module, o.overwritten) for o in forward.operators],
            [(v.shape, v.inputs, v.outputs, v.call, v.parameter) for v in forward.values],
            [(m.module, m.invocation, m.inputs, m.outputs) for m in forward.module_calls],
            forward.sequences,
        )
        for forward in forwards
    ]
    return contents, places, found.reached


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", HOOKS)
def test_trace_is_that_without_the_hook(net, x, kind, where):
    expected = described(net, x)
    statistics = Statistics()
    HOOKS[kind](net.get_submodule(where), statistics)
    assert described(net, x) == expected
    assert next(statistics.runs)  # it has run,
    assert not statistics.seen  # and left no trace


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_outputs_are_those_without_the_hook(net, x, kind, training, caplog):
    expected = transformed(net).train(training)(x)
    statistics = Statistics()
    for where in WHERE:
        HOOKS[kind](net.get_submodule(where), statistics)
    assert torch.equal(net(x), expected)
    assert len(statistics.seen) == len(WHERE)
    statistics.assert_exact()
    assert_quiet(caplog)


@pytest.mark.parametrize("transform", [Scale, FusedScale])
@pytest.mark.parametrize("where", WHERE)
def test_hooks_on_one_module(net, x, transform, where, caplog):
    expected = transformed(net, transform)(x)
    statistics = Statistics()
    net.get_submodule(where).register_forward_hook(statistics.after)
    assert torch.equal(net(x), expected)
    statistics.assert_exact()
    assert_quiet(caplog)


def test_gradients_are_those_without_the_hook(net, x):
    twin = transformed(copy.deepcopy(net))
    transformed(net)
    for where in WHERE:
        net.get_submodule(where).register_forward_hook(Statistics().after)
        net.get_submodule(where).register_full_backward_hook(lambda m, g, o: (compute(o[0]), None)[1])
        net.get_submodule(where).register_full_backward_pre_hook(lambda m, o: (compute(o[0]), None)[1])
    for model in (net, twin):
        model(x).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_backward_hooks_leave_the_trace_alone(net, x):
    expected = described(net, x)
    for where in WHERE:
        net.get_submodule(where).register_full_backward_hook(lambda m, g, o: None)
        net.get_submodule(where).register_full_backward_pre_hook(lambda m, o: None)
    assert described(net, x) == expected


def test_hooks_for_all_modules(net, x, global_hooks, caplog):
    traced = described(net, x)
    statistics = Statistics()

    def register():
        global_hooks.append(register_module_forward_hook(statistics.after))
        global_hooks.append(register_module_forward_pre_hook(statistics.before))
        global_hooks.append(register_module_full_backward_hook(lambda m, g, o: None))

    register()
    assert described(net, x) == traced
    for handle in global_hooks:
        handle.remove()
    expected = transformed(net)(x)
    register()
    statistics.seen.clear()
    assert torch.equal(net(x), expected)
    statistics.assert_exact()
    assert_quiet(caplog)


def test_hooks_that_call_modules(net, x, caplog):
    """A module of the model computes in a hook what it computes elsewhere, and counts anew."""
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen = []

    def hook(module, args, output):
        seen.append((output.detach().clone(), other(output), net.blocks[1](output)))

    traced = described(net, x)
    handle = net.blocks[0].b.register_forward_hook(hook)
    assert described(net, x) == traced
    handle.remove()
    expected = transformed(net)(x)
    handle = net.blocks[0].b.register_forward_hook(hook)
    net.stem.register_forward_hook(hook)
    seen.clear()
    assert torch.equal(net(x), expected)
    # Calling a block alone is what a hook does, too.
    alone = [(other(tensor), net.blocks[1](tensor)) for tensor, *_ in list(seen)]
    assert len(alone) == 2
    for (_, *found), wanted in zip(seen, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert_quiet(caplog)


def test_nested_hooks(net, x, caplog):
    """A hook calls a module that has a hook itself."""
    inner, statistics = nn.Linear(4, 4), Statistics()
    inner.register_forward_hook(statistics.after)
    expected, traced = transformed(copy.deepcopy(net))(x), described(net, x)
    net.blocks[0].a.register_forward_hook(lambda m, i, o: (inner(o), net.stem(o), compute(o), None)[3])
    net.stem.register_forward_hook(statistics.after)
    assert described(net, x) == traced
    transformed(net)
    statistics.seen.clear()
    assert torch.equal(net(x), expected)
    statistics.assert_exact()
    assert_quiet(caplog)


def test_hooks_that_raise(net, x, caplog):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = net, nn.Linear(4, 2)

        def forward(self, x):
            try:
                y = self.net(F.relu(x))
            except ValueError:
                y = self.spare(F.relu(x))
            return F.relu(y)

    def failing(module, *args):
        compute(torch.add(args[0][0], 1))
        raise ValueError("no")

    for register in (
        net.blocks[0].b.register_forward_hook,
        net.blocks[0].b.register_forward_pre_hook,
        functools.partial(net.blocks[0].b.register_forward_pre_hook, prepend=True),
        net.register_forward_hook,
        net.register_forward_pre_hook,
    ):
        model = Careful()
        handle = register(failing)
        always = net.blocks[0].b.register_forward_hook(lambda m, i, o: (compute(i[0]), None)[1], always_call=True)
        found = trace(model, x).forwards[0]
        assert [c.frames[-1].module for c in found.calls][-3:] == ["", "spare", ""]
        numbers = len(found.sequences["", 0][RELU])
        place = CallOutput("", RELU, calls(numbers - 1, range(numbers)))
        transform = add(model, place, Scale(3.0))
        assert torch.equal(model(x), 3 * F.relu(model.spare(F.relu(x))))
        transform.remove()
        handle.remove()
        always.remove()
    assert_quiet(caplog)


def test_hooks_around_attention(x, caplog):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = self.inner(x)
            y, _ = self.attention(x, x, x, need_weights=False)
            return F.linear(y, torch.eye(4))

    torch.manual_seed(0)
    model, x = Attending().eval(), x[None]
    other = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    expected_trace, seen = described(model, x), []

    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append((output.detach().clone(), other(output, output, output)[0], compute(output)))

    def register():
        return [m.register_forward_hook(hook) for m in (model.inner, model.attention)]

    handles = register()
    assert described(model, x) == expected_trace
    for handle in handles:
        handle.remove()
    linear = "torch.nn.functional.linear"
    count = len(trace(model, x).forwards[0].sequences["", 0][linear])
    for number in (0, 1, count - 1):
        add(model, CallOutput("", linear, calls(number, range(count))), Scale(2.0 + number))
    expected = model(x)
    seen.clear()
    register()
    assert torch.equal(model(x), expected)
    assert len(seen) == 2
    for tensor, attended, computed in seen:
        assert torch.equal(computed, compute(tensor))
        assert torch.equal(attended, other(tensor, tensor, tensor)[0])
    assert_quiet(caplog)
