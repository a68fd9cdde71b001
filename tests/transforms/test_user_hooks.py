"""Hooks of users are not the model's forward: neither counted nor transformed, in the trace, at run time, compiled."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import prune, spectral_norm, weight_norm

from compress_core.batchnorm.estimators import CHOICES
from compress_core.channels import channel_groups
from compress_core.trace import trace
from compress_core.trace.hook_results import USER_HOOK
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms import CallInput, CallOutput, ModuleOutput
from tests.activation_helpers import FusedScale, Scale, add, calls

RELU, ADD = "torch.nn.functional.relu", "torch.add"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.act(torch.add(self.b(x), x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x, *, shift=None):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.relu(torch.add(x, x if shift is None else shift)))


def compute(tensor):
    """What hooks compute: calls of the functions that the model calls."""
    doubled = torch.add(tensor, tensor)
    return (F.relu(doubled) + F.linear(tensor, torch.eye(tensor.shape[-1])) + torch.relu(tensor)).abs().sum()


class Statistics:
    """A hook of any kind that notes what it sees and what it computes from it."""

    def __init__(self):
        self.seen = []

    def look(self, value):
        value = value[0] if isinstance(value, tuple) else value
        self.seen.append((value.detach().clone(), compute(value.detach())))

    def after(self, module, args, *rest):
        self.look(rest[-1])

    def before(self, module, args, *rest):
        self.look(args)

    def assert_exact(self):
        assert self.seen
        for tensor, computed in self.seen:
            assert torch.equal(computed, compute(tensor))


class AsObject:
    def __init__(self, statistics):
        self.statistics = statistics

    def __call__(self, module, args, output):
        self.statistics.after(module, args, output)


HOOKS = {
    "forward": lambda m, s: m.register_forward_hook(s.after),
    "forward, first": lambda m, s: m.register_forward_hook(s.after, prepend=True),
    "forward with keywords": lambda m, s: m.register_forward_hook(s.after, with_kwargs=True),
    "forward, always": lambda m, s: m.register_forward_hook(s.after, always_call=True),
    "forward, object": lambda m, s: m.register_forward_hook(AsObject(s)),
    "forward, partial": lambda m, s: m.register_forward_hook(functools.partial(Statistics.after, s)),
    "before": lambda m, s: m.register_forward_pre_hook(s.before),
    "before, first": lambda m, s: m.register_forward_pre_hook(s.before, prepend=True),
    "before with keywords": lambda m, s: m.register_forward_pre_hook(s.before, with_kwargs=True),
}
WHERE = ["stem", "blocks.0.b", "blocks.1.act", "blocks.0", "blocks", ""]
PLACES = [
    CallOutput("", RELU, calls(5, range(6))),
    CallOutput("", RELU, calls(3, range(6))),
    CallInput("", ADD, calls(2, range(3)), (0,)),
    CallOutput("blocks.0", RELU, calls(0, (0, 1))),
    CallOutput("blocks.1", ADD, calls()),
    CallInput("blocks.1", RELU, calls(1, (0, 1))),
    ModuleOutput("blocks.0.act"),
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def global_hooks():
    handles = []
    yield handles
    for handle in handles:
        handle.remove()


def transformed(model, kind=Scale):
    for number, place in enumerate(PLACES):
        add(model, place, kind(1.5 + number))
    return model


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


def assert_quiet(caplog):
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Hooks that look.


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", HOOKS)
def test_trace_is_that_without_the_hook(net, x, kind, where):
    expected = described(net, x)
    statistics = Statistics()
    HOOKS[kind](net.get_submodule(where), statistics)
    assert described(net, x) == expected
    assert statistics.seen  # it has run


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


# Hooks that change something.


CHANGES = {
    "output": lambda m: m.register_forward_hook(lambda m, i, o: torch.add(o, F.relu(o))),
    "output, in place": lambda m: m.register_forward_hook(lambda m, i, o: (o.add_(F.relu(o)), None)[1]),
    "input": lambda m: m.register_forward_pre_hook(lambda m, i: (torch.add(i[0], F.relu(i[0])),)),
    "input with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, i, k: ((torch.add(i[0], F.relu(i[0])),), k), with_kwargs=True
    ),
}


class Changing(nn.Module):
    """Does as a module of the model what a hook does."""

    def __init__(self, module, *, is_input):
        super().__init__()
        self.module, self.is_input = [module], is_input

    def forward(self, x, **kwargs):
        x = torch.add(x, F.relu(x)) if self.is_input else x
        y = self.module[0](x, **kwargs)
        return y if self.is_input else torch.add(y, F.relu(y))


@pytest.mark.parametrize("where", ["stem", "blocks.0.b", "blocks.1", ""])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_have_their_effect_and_are_not_counted(net, x, change, where, caplog):
    changed = copy.deepcopy(net)
    CHANGES[change](changed.get_submodule(where))
    for traced, same in zip(trace(changed, x).forwards, trace(net, x).forwards, strict=True):
        numbers = {c.index: n for n, c in enumerate(c for c in traced.calls if c.function != USER_HOOK)}
        assert {
            run: {f: [numbers[i] for i in found] for f, found in made.items()} for run, made in traced.sequences.items()
        } == same.sequences
    # As a stand-in of the module would compute it, with transforms that count no calls.
    plain = [ModuleOutput("blocks.0.act"), ModuleOutput("blocks.1"), ModuleOutput("stem")]
    for model in (changed, net):
        for place in plain:
            add(model, place, Scale(2.0), key="plain")
    wanted = Changing(net.get_submodule(where), is_input=change.startswith("input"))
    if where:
        parent, _, name = where.rpartition(".")
        setattr(net.get_submodule(parent), name, wanted)
        wanted = net
    assert torch.equal(changed(x), wanted(x))
    # And transforms that do count find their calls.
    add(changed, CallOutput("", RELU, calls(5, range(6))), Scale(3.0))
    bias = changed.head.bias
    y = changed(x) if where or not change.startswith("output") else None
    assert y is None or torch.allclose(y - bias, 3 * (wanted(x) - bias), atol=1e-5)
    assert_quiet(caplog)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_hook_has_changed_is_connected_in_the_trace(net, x, change):
    CHANGES[change](net.blocks[0].b)
    found = trace(net, x).forwards[0]
    (hook,) = [call for call in found.calls if call.function == USER_HOOK]
    (operator,) = [operator for operator in found.operators if operator.name == USER_HOOK]
    assert operator.call == hook.index
    assert hook.operators == [operator.index]
    assert hook.module == "blocks.0"  # the module that calls the one with the hook
    made = hook.outputs[0][1]
    readers = {found.calls[index].function for index, _ in found.consumers()[made]}
    before = {found.values[value].call for _, value in hook.inputs}
    if change.startswith("output"):
        assert readers == {ADD}
        assert [found.calls[c].module for c in before] == ["blocks.0.b"]
    else:
        assert "torch.nn.functional.linear" in readers
        assert [(found.calls[c].module, found.calls[c].function) for c in before] == [("blocks.0", RELU)]


def test_a_tensor_that_another_hook_hands_in(net, x):
    """One hook keeps a tensor, another one returns it: the trace says what it was computed from."""
    kept = []
    net.stem.register_forward_hook(lambda m, i, o: kept.append(F.relu(o)))
    net.blocks[0].a.register_forward_hook(lambda m, i, o: torch.add(o, kept.pop()))
    found = trace(net, x).forwards[0]
    (hook,) = [call for call in found.calls if call.function == USER_HOOK]
    assert {found.calls[found.values[value].call].module for _, value in hook.inputs} == {"stem", "blocks.0.a"}


def test_what_hooks_of_the_model_itself_change_are_its_inputs(net, x):
    net.register_forward_pre_hook(lambda m, i: (F.relu(torch.add(i[0], 1)),))
    found = trace(net, x).forwards[0]
    assert USER_HOOK not in {call.function for call in found.calls}
    (given,) = found.inputs
    assert found.calls[0].inputs[0][1] == given.index


def test_statistics_of_hooks_keep_no_channels(x):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    images = torch.ones(1, 1, 2, 2)
    assert any(group.obstacle is None for group in channel_groups(trace(model, images)).groups)
    handle = model[0].register_forward_hook(lambda m, i, o: (o.view(1, 2, 8).mean(1).sum(), None)[1])
    total = torch.zeros(4)
    model[0].register_forward_hook(lambda m, i, o: (total.add_(o.detach().mean((0, 2, 3))), None)[1])
    expected = len(channel_groups(trace(model, images)).prunable)
    handle.remove()
    assert expected == 1
    model[0].register_forward_hook(lambda m, i, o: o.flip(1))
    assert not channel_groups(trace(model, images)).prunable


# Hooks that compute parameters.


NORMS = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_hooks_of_torch_that_compute_parameters_are_the_model(net, x, norm):
    NORMS[norm](net.stem)
    found = trace(net, x).forwards[0]
    inside = [call for call in found.calls if call.module == "stem"]
    assert len(inside) > 1
    assert USER_HOOK not in {call.function for call in found.calls}
    weight = inside[-1].inputs[1][1]
    assert found.values[weight].call in {call.index for call in inside[:-1]}


@pytest.mark.parametrize("norm", ["spectral_norm", "prune"])  # the function of weight_norm has no public name
def test_what_computes_parameters_is_transformed(net, x, norm, caplog):
    NORMS[norm](net.eval().stem)
    forward = trace(net, x).forwards[0]
    name = next(call for call in forward.calls if call.module == "stem").function
    count = len(forward.sequences["", 0][name])
    with torch.no_grad():
        before = net(x)
        add(net, CallOutput("", name, calls(0, range(count))), Scale(3.0))
        after = net(x)
    assert not torch.allclose(before, after)
    assert_quiet(caplog)


# Compiled.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward with keywords", "before"])
def test_compiled_models_do_not_count_hooks(net, x, kind, training):
    expected = transformed(net).train(training)(x)
    statistics = Statistics()
    for where in ("stem", "blocks.0.b", "blocks.1.act", "blocks.0"):
        HOOKS[kind](net.get_submodule(where), statistics)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(x), expected)
    assert len(statistics.seen) == 8
    for tensor, computed in statistics.seen:
        assert torch.allclose(computed, compute(tensor))


def test_compiled_models_go_on_with_what_hooks_change(net, x):
    transformed(net)
    CHANGES["output"](net.blocks[0].b)
    CHANGES["input"](net.blocks[1].a)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


def test_hooks_that_call_compiled_functions(net, x, caplog):
    torch._dynamo.reset()
    compiled = torch.compile(compute, backend="eager")
    expected, found = transformed(net)(x), []
    net.blocks[0].b.register_forward_hook(lambda m, i, o: found.append((compiled(o), o.clone())))
    assert torch.equal(net(x), expected)
    assert torch.allclose(found[0][0], compute(found[0][1]))
    assert_quiet(caplog)


# Those who watch.


@pytest.mark.parametrize("estimator", CHOICES, ids=lambda choice: choice.name)
def test_estimators_do_not_see_what_hooks_call(estimator):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    model[2].register_forward_hook(lambda m, i, o: (model[1](o + 7), None)[1])
    watching = estimator.value("1", model[1])
    handles = watching.attach()
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        assert watching.compressed.count == 16
        assert torch.allclose(watching.compressed.mean.float(), model[0](x).mean(0), atol=1e-6)
