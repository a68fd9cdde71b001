"""Hooks that change something, compute parameters, or are compiled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from compress_core.batchnorm.estimators import CHOICES
from compress_core.channels import channel_groups
from compress_core.trace import trace
from compress_core.trace.hook_results import USER_HOOK
from compress_core.transforms import CallOutput, ModuleOutput
from tests.activation_helpers import Scale, add, calls
from tests.transforms.hooked_models import ADD, HOOKS, RELU, Net, Statistics, assert_quiet, compute, transformed


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


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
