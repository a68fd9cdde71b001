"""Traces at two levels, with writes; nothing is computed, and nothing left behind."""

import copy
import gc
import logging
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.trace import trace
from tests.trace.traced_models import Function, branching, calls, forward_of
from tests.zoo import ZOO


def operators(forward):
    return [(operator.module, operator.name.removeprefix("aten.")) for operator in forward.operators]


def flows(forward):
    """Per call: the numbers of the values that it takes (parameters left out), and of those that it makes."""
    numbers = {}
    taken = []
    for call in forward.calls:
        given = [value for _, value in call.inputs if not forward.values[value].parameter]
        taken.append(tuple([numbers.setdefault(v, len(numbers)) for v in vs] for vs in (given, call.results)))
    return taken


def test_calls_and_the_operators_inside_each():
    model = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 5))
    forward = forward_of(model, torch.ones(2, 1, 6, 6))
    assert calls(forward) == [("0", "conv2d"), ("1", "batch_norm"), ("2", "flatten"), ("3", "linear")]
    # Flatten of contiguous memory is a view; linear is a transpose and a fused multiply-add.
    inside = [[operators(forward)[index] for index in call.operators] for call in forward.calls]
    assert [[name for _, name in names if not name.startswith("empty")] for names in inside] == [
        ["convolution.default"],
        ["native_batch_norm.default"],
        ["view.default"],
        ["t.default", "addmm.default"],
    ]
    assert all(forward.operators[index].call == call.index for call in forward.calls for index in call.operators)
    assert [tuple(forward.values[call.results[0]].shape) for call in forward.calls] == [
        (2, 6, 4, 4),
        (2, 6, 4, 4),
        (2, 96),
        (2, 5),
    ]


def test_values_know_where_they_come_from():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    forward = forward_of(model)
    linear, relu = forward.calls
    given, weight, bias = (forward.values[value] for _, value in linear.inputs)
    assert (given.inputs, given.call, given.operator, given.shape) == ([(0,)], None, None, (2, 4))
    assert (weight.parameter, bias.parameter, weight.shape) == ("0.weight", "0.bias", (3, 4))
    made = forward.values[linear.results[0]]
    assert (made.call, forward.operators[made.operator].name) == (linear.index, "aten.addmm.default")
    assert relu.inputs == [((0,), made.index)]
    assert [value.index for value in forward.outputs] == relu.results
    assert forward.outputs[0].outputs == [()]
    assert forward.consumers()[made.index] == [(relu.index, (0,))]
    assert [(run.module, run.cls) for run in forward.module_calls] == [
        ("", "Sequential"),
        ("0", "Linear"),
        ("1", "ReLU"),
    ]


def test_arguments_are_kept_with_tensors_replaced():
    forward = forward_of(Function(lambda model, x: torch.cat([x, x], dim=1).clamp(0, max=2)))
    cat, clamp = forward.calls
    assert (repr(cat.arguments), cat.keywords) == ("([%0, %0],)", {"dim": 1})
    assert [path for path, _ in cat.inputs] == [(0, 0), (0, 1)]
    assert (repr(clamp.arguments), clamp.keywords) == ("(%1, 0)", {"max": 2})


def test_module_called_twice():
    forward = forward_of(Function(lambda model, x: model.layer(model.layer(x)), layer=nn.Linear(4, 4)))
    assert calls(forward) == [("layer", "linear"), ("layer", "linear")]
    assert [call.frames[-1].invocation for call in forward.calls] == [0, 1]
    assert flows(forward) == [([0], [1]), ([1], [2])]
    weights = [dict(call.inputs)[1,] for call in forward.calls]
    assert weights[0] == weights[1]
    assert forward.calls[0].location != forward.calls[1].location
    assert forward.sequences["layer", 0] == {"torch.nn.functional.linear": [0]}
    assert forward.sequences["layer", 1] == {"torch.nn.functional.linear": [1]}
    assert forward.sequences["", 0] == {"torch.nn.functional.linear": [0, 1]}


def test_turns_of_a_loop_stand_in_one_place_and_other_calls_elsewhere():
    def loop(model, x):
        for _ in range(3):
            x = F.relu(x)
        return F.relu(x)

    forward = forward_of(Function(loop))
    assert flows(forward) == [([0], [1]), ([1], [2]), ([2], [3]), ([3], [4])]
    first, second, third, after = (call.location for call in forward.calls)
    assert first == second == third != after


def test_functional_add_takes_both_branches():
    forward = forward_of(Function(lambda model, x: x + model.branch(x), branch=nn.Linear(4, 4)))
    assert calls(forward) == [("branch", "linear"), ("", "add")]
    assert flows(forward) == [([0], [1]), ([0, 1], [2])]


def test_residual_network_of_the_zoo():
    make, inputs = ZOO["resnet"]
    forward = forward_of(make(), inputs())
    residual = [("conv2", "conv2d"), ("bn2", "batch_norm"), ("", "add")]
    assert calls(forward) == [
        *[("conv1", "conv2d"), ("bn1", "batch_norm"), ("relu", "relu")],
        *residual,
        *residual,
        *[("relu", "relu"), ("", "mean"), ("fc", "linear")],
    ]


@pytest.mark.parametrize("name", ["mobilenet", "transformer", "recurrent", "lstm"])
def test_networks_of_the_zoo_give_shapes_of_a_real_forward(name):
    make, inputs = ZOO[name]
    model = make().eval()
    found = trace(model, inputs())
    assert not found.forwards[0].real
    assert found.unreached == []
    with torch.no_grad():
        assert [value.shape for value in found.forwards[0].outputs] == [model(*inputs()).shape]


@pytest.mark.parametrize(
    ("need_weights", "products"), [(False, ["scaled_dot_product_attention"]), (True, ["bmm", "softmax", "bmm"])]
)
def test_multi_head_attention_is_seen_inside(need_weights, products):
    forward = forward_of(
        Function(
            lambda model, x: model.attention(x, x, x, need_weights=need_weights)[0],
            attention=nn.MultiheadAttention(4, 2),
        ),
        torch.ones(3, 2, 4),
    )
    seen = [name for _, name in calls(forward)]
    assert not any("multi_head" in name for name in seen)
    computing = [name for name in seen if name in {"linear", "softmax", "bmm", "scaled_dot_product_attention"}]
    assert computing == ["linear", "linear", "linear", *products, "linear"]
    assert {call.module for call in forward.calls} == {"attention"}
    read = [forward.values[value].parameter for call in forward.calls for _, value in call.inputs]
    assert [name for name in read if name.endswith("weight")] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


def test_questions_about_tensors_leave_no_record():
    def asks(model, x):
        rows = x.size(0) if x.dim() > 1 and x.is_floating_point() and x.device.type != "meta" else len(x)
        return x.reshape(rows, -1) * x.shape[-1]

    assert calls(forward_of(Function(asks))) == [("", "reshape"), ("", "mul")]


def test_in_place_call_makes_a_new_value_of_the_same_tensor():
    def forward_function(model, x):
        y = x * 2
        y.add_(1)
        return y

    forward = forward_of(Function(forward_function))
    mul, add = forward.calls
    assert (mul.writes, add.writes) == ([], mul.results)
    after = forward.values[add.results[0]]
    assert after.before == mul.results[0]
    assert forward.outputs == [after]


@pytest.mark.parametrize("real", [False, True])
def test_write_to_an_input_is_one_to_a_copy(real):
    x = torch.ones(2, 4)
    forward = forward_of(Function(lambda model, x: x.mul_(3) if not real or x[0, 0].item() else x), x)
    assert forward.real == real
    assert torch.equal(x, torch.ones(2, 4))
    call = forward.calls[-1]
    assert call.writes == [forward.inputs[0].index]
    assert forward.outputs != forward.inputs


def test_write_to_a_part_changes_the_whole():
    def forward_function(model, x):
        y = torch.zeros(2, 4)
        y[:, :2] = x[:, :2]
        return y + 1

    forward = forward_of(Function(forward_function))
    zeros, _, setitem, add = forward.calls
    assert [name for _, name in calls(forward)] == ["zeros", "__getitem__", "__setitem__", "add"]
    assert setitem.writes == zeros.results
    assert [value for _, value in add.inputs] == setitem.overwritten
    whole = forward.values[setitem.overwritten[0]]
    assert (whole.shape, whole.before) == ((2, 4), zeros.results[0])
    assert forward.operators[whole.operator].name == "aten.copy_.default"
    assert forward.operators[whole.operator].overwritten == [whole.index]


def test_write_to_a_view_changes_what_overlaps_and_nothing_else():
    def forward_function(model, x):
        y = x * 2
        left, right = y.chunk(2, 1)
        left.mul_(3)
        return y, left, right

    forward = forward_of(Function(forward_function))
    mul, chunk, write = forward.calls
    (_, left), (_, right) = chunk.outputs
    y, new_left, same_right = sorted(forward.outputs, key=lambda value: value.outputs)
    assert (y.before, y.call) == (mul.results[0], write.index)
    assert (new_left.before, new_left.call) == (left, write.index)
    assert same_right.index == right
    assert set(write.writes) == {left, mul.results[0]}


def test_view_sees_what_is_written_to_the_whole():
    def forward_function(model, x):
        y = x * 2
        row = y[0]
        y.add_(1)
        return row.relu()

    forward = forward_of(Function(forward_function))
    _, getitem, add, relu = forward.calls
    ((_, seen),) = relu.inputs
    assert (forward.values[seen].before, forward.values[seen].call) == (getitem.results[0], add.index)


def test_parameter_that_the_forward_writes_to_stays_as_it_is():
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    wrapped = Function(lambda model, x: (model.layer.weight.data.mul_(2), model.layer(x))[1], layer=model)
    for example in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.float64)):
        wrapped.to(example.dtype)
        forward_of(wrapped, example)
    assert torch.equal(model.weight, before.double())


@torch.overrides.wrap_torch_function(lambda x: (x,))
def _writes_and_fails(x):
    x[:, :2].mul_(2)
    raise RuntimeError("half way")


def test_call_that_writes_and_fails_is_not_recorded_but_its_write_is():
    def forward_function(model, x):
        y = x * 2
        column = y[:, :1]
        try:
            _writes_and_fails(y)
        except RuntimeError:
            return y, column.relu()
        raise AssertionError

    forward = forward_of(Function(forward_function))
    assert not forward.real
    assert [name for _, name in calls(forward)] == ["mul", "__getitem__", "relu"]
    ((_, seen),) = forward.calls[2].inputs
    whole = next(value for value in forward.outputs if value.outputs == [(0,)])
    for value, before in ((forward.values[seen], 1), (whole, 0)):
        assert value.call is None
        assert value.before == forward.calls[before].results[0]
        assert forward.operators[value.operator].name == "aten.mul_.Tensor"


@pytest.mark.parametrize("real", [False, True])
def test_model_is_untouched(real):
    def forward_function(model, x):
        model.seen = x.shape
        model.cache.append(x)
        model.nested["masks"].append(x)
        x = model.norm(model.drop(model.layer(x)))
        x = x + torch.rand(4) + random.random() + np.random.rand()
        return x * x.sum().item() if real else x

    model = Function(forward_function, layer=nn.Linear(4, 4), drop=nn.Dropout(), norm=nn.BatchNorm1d(4))
    model.cache = []
    model.nested = {"masks": []}
    model.layer.weight.requires_grad_(False)
    model.train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = trace(model, torch.ones(2, 4), training=True)
    assert [f.real for f in (*found.forwards, *found.training)] == [real, real]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
    assert (model.cache, model.nested, hasattr(model, "seen")) == ([], {"masks": []}, False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_backward_after_a_trace_finds_buffers_unchanged():
    model = Function(lambda model, x: model.norm(x) * (1 + 0 * x.sum().item()), norm=nn.BatchNorm1d(4))
    model.norm.running_mean.fill_(float("nan"))  # never equal to itself
    loss = model.eval()(torch.ones(2, 4)).sum()
    assert trace(model, torch.ones(2, 4), training=True).training[0].real
    loss.backward()
    assert model.norm.weight.grad is not None
    assert model.norm.running_mean.isnan().all()


def test_forward_on_fake_tensors_computes_nothing():
    # 2**40 numbers would be 4 TiB.
    forward = forward_of(Function(lambda model, x: (x.expand(2**20, 2**20) + 1).sum()), torch.ones(1))
    assert not forward.real
    assert max(value.shape for value in forward.values) == (2**20, 2**20)


def test_trace_keeps_no_tensor_alive():
    model = Function(lambda model, x: model.layer(x).mul_(2), layer=nn.Linear(4, 4))
    x = torch.ones(2, 4)
    found = trace(model, x)
    alive = [weakref.ref(x), weakref.ref(model.layer.weight)]
    del x, model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert len(found.forwards[0].calls) == 2


def test_model_on_the_meta_device_takes_an_example_on_the_cpu():
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    forward = forward_of(model)
    assert forward.outputs[0].shape == (2, 3)
    assert not forward.real


@pytest.mark.parametrize("sign", [1, -1])
def test_forward_that_needs_values_gets_them(sign, caplog, capfd):
    caplog.set_level(logging.WARNING)
    model = branching()
    found = trace(model, sign * torch.ones(2, 4))
    assert found.forwards[0].real
    taken, other = ("positive", "negative") if sign > 0 else ("negative", "positive")
    assert calls(found.forwards[0]) == [("", "sum"), (taken, "linear")]
    assert found.unreached == [other]
    assert operators(found.forwards[0])[1] == ("", "_local_scalar_dense.default")
    assert (caplog.records, capfd.readouterr().err) == ([], "")


def test_shape_that_depends_on_values():
    forward = forward_of(Function(lambda model, x: x[x > 0].relu()), torch.tensor([1.0, -1.0, 2.0]))
    assert forward.real
    assert forward.outputs[0].shape == (2,)
