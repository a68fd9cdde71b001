"""What a trace of a model holds; expectations are counted by hand from the forwards."""

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

from compress_core import ConfigError
from compress_core.config.document import InputInfo
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_core.trace import Example, TraceError, trace
from tests.zoo import ZOO, ResidualNet, trained_model


class Function(nn.Module):
    """A model whose forward is a function of it and its arguments."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def forward_of(model, *examples):
    (forward,) = trace(model, list(examples) or torch.ones(2, 4)).forwards
    return forward


def calls(forward):
    """(module, last part of the function's name) of each call."""
    return [(call.module, call.function.rpartition(".")[2]) for call in forward.calls]


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


def branches(model, x):
    if x.sum().item() > 0:
        return model.positive(x)
    return model.negative(x)


def branching():
    return Function(branches, positive=nn.Linear(4, 3), negative=nn.Linear(4, 3))


# Two levels.


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


# Writes.


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


# Nothing is computed, and nothing is left behind.


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


# Training mode.


def test_training_mode_is_recorded_on_demand():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    found = trace(model, torch.ones(2, 4))
    assert found.training == []
    found = trace(model, torch.ones(2, 4), training=True)
    (evaluation,), (training,) = found.forwards, found.training
    assert (evaluation.training, training.training) == (False, True)
    assert calls(evaluation) == [("0", "linear"), ("1", "batch_norm"), ("2", "dropout")]
    assert calls(training) == [("0", "linear"), ("1", "add_"), ("1", "batch_norm"), ("2", "dropout")]
    # In eval mode dropout hands its argument on; in training mode it makes a new value.
    assert evaluation.calls[-1].results == []
    assert len(training.calls[-1].results) == 1
    counter = training.values[training.calls[1].writes[0]]
    assert counter.parameter == "1.num_batches_tracked"


def test_model_that_fails_in_training_mode_has_a_trace_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    found = trace(model, torch.ones(1, 4), training=True)  # batch norm refuses one value for each channel
    assert found.training == [None]
    assert len(found.forwards[0].calls) == 2


def test_auxiliary_head_is_reached_in_training_mode_only():
    def forward_function(model, x):
        return (model.main(x), model.aux(x)) if model.training else model.main(x)

    model = Function(forward_function, main=nn.Linear(4, 2), aux=nn.Linear(4, 2))
    assert trace(model, torch.ones(2, 4)).unreached == ["aux"]
    assert trace(model, torch.ones(2, 4), training=True).unreached == []


# Examples.


def test_several_examples_give_the_union():
    found = trace(branching(), [torch.ones(2, 4), -torch.ones(3, 4)])
    assert [[module for module, _ in calls(forward)] for forward in found.forwards] == [
        ["", "positive"],
        ["", "negative"],
    ]
    assert [forward.inputs[0].shape for forward in found.forwards] == [(2, 4), (3, 4)]
    assert found.unreached == []
    assert found.reached == {"", "positive", "negative"}


def test_unreached_modules_are_listed_by_their_outermost_name():
    used = nn.ModuleDict({"a": nn.Linear(4, 4), "empty": nn.ModuleList()})
    unused = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = Function(lambda model, x: F.linear(model.used["a"](x), model.tied.weight), used=used, unused=unused)
    model.add_module("tied", nn.Linear(4, 4))
    model.add_module("list", nn.ModuleList([nn.Identity(), nn.Identity()]))
    found = trace(model, torch.ones(2, 4))
    # `tied` never runs, but its weight is used; an empty list holds nothing that could be reached.
    assert found.unreached == ["unused", "list"]
    assert found.modules["unused"] == "Sequential"


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        (torch.ones(2, 4), [[(0,)]]),
        ((torch.ones(2, 4), torch.ones(1)), [[(0,)], [(1,)]]),
        ({"x": torch.ones(2, 4)}, [[("x",)]]),
        (Example.of(torch.ones(2, 4), scale=torch.ones(1)), [[(0,)], [("scale",)]]),
        (Example.of([torch.ones(2, 4), torch.ones(1)]), [[(0, 0)], [(0, 1)]]),
    ],
)
def test_examples_that_are_given(given, inputs):
    def forward_function(model, x, scale=2):
        return x[0] * x[1] if isinstance(x, list) else x * scale

    forward = forward_of(Function(forward_function), given)
    assert [value.inputs for value in forward.inputs] == inputs
    assert calls(forward)[-1] == ("", "mul")


def test_argument_of_any_name():
    example = Example.of(cls=torch.ones(2, 4))
    forward = forward_of(Function(lambda model, cls: cls + 1), example)
    assert forward.inputs[0].inputs == [("cls",)]


def info(*size, **values):
    return InputInfo(sample_size=list(size), **values)


def test_input_info_says_shape_dtype_and_keyword():
    infos = [info(2, 3), info(2, 3, type="long"), info(2, type="half", keyword="scale")]
    forward = forward_of(
        Function(lambda model, x, index, *, scale: x.gather(1, index) * scale[:, None].float()),
        Example.from_input_info(infos),
    )
    assert [(value.inputs, value.shape, value.dtype) for value in forward.inputs] == [
        ([(0,)], (2, 3), torch.float32),
        ([(1,)], (2, 3), torch.int64),
        ([("scale",)], (2,), torch.float16),
    ]


def test_fillers_of_input_info():
    infos = [info(9, filler=filler, type=kind) for filler in ("zeros", "ones", "random") for kind in ("float", "bool")]
    before = torch.get_rng_state()
    (zeros, no, ones, yes, noise, both), _ = Example.from_input_info(infos).batch
    assert torch.equal(zeros, torch.zeros(9))
    assert torch.equal(ones, torch.ones(9))
    assert not no.any()
    assert yes.all()
    assert ((noise >= 0) & (noise < 1)).all()
    assert len(noise.unique()) == 9
    assert both.dtype == torch.bool
    assert both.unique().tolist() == [False, True]
    assert torch.equal(torch.get_rng_state(), before)


def test_filler_decides_which_branch_a_forward_on_values_takes():
    for filler, module in (("zeros", "negative"), ("ones", "positive")):
        example = Example.from_input_info([info(2, 4, filler=filler)])
        assert calls(forward_of(branching(), example))[-1] == (module, "linear")


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([InputInfo()], "input_info.0.sample_size: is missing"),
        ([info(2), info(2, type="flot")], "input_info.1.type: 'flot' is not the name of a torch dtype"),
        ([info(2, type="Tensor")], "input_info.0.type: 'Tensor' is not the name of a torch dtype"),
        ([info(2, type="bits8")], "input_info.0: cannot make a bits8 tensor of the shape \\[2\\]"),
        ([info(10**12, 10**12)], "input_info.0: cannot make a float tensor of the shape"),
        ([info(2, keyword="x"), info(3, keyword="x")], "input_info.1.keyword: the argument 'x' is described twice"),
    ],
)
def test_unusable_input_info_is_a_config_error(infos, message):
    with pytest.raises(ConfigError, match=message):
        Example.from_input_info(infos)


def test_batch_of_a_loader_is_taken_as_calibration_takes_it():
    loader = [(torch.ones(8, 3, 8, 8), torch.zeros(8))]
    example = Example.from_batch(CalibrationData(InitArgs(loader), "section"), loader[0])
    forward = forward_of(ResidualNet(), example)
    assert [value.shape for value in forward.inputs] == [(8, 3, 8, 8)]  # the target is not for the model
    assert [value.shape for value in forward.outputs] == [(8, 5)]


# Errors.


def test_error_names_the_module_the_example_and_the_reason(caplog, capfd):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2)))
    with pytest.raises(TraceError) as caught:
        trace(model, torch.ones(2, 4))
    assert str(caught.value) == (
        "Sequential cannot be traced: its forward fails in '1.1' (Linear) on the given example: mat1 and mat2 shapes "
        "cannot be multiplied (2x4 and 5x2). Give example inputs that the model takes: input_info in the config, or a "
        "data loader"
    )
    # Torch would report the failing operator at length, on stderr.
    assert (caplog.records, capfd.readouterr().err) == ([], "")


def test_error_on_a_batch_of_a_loader_names_the_module_too():
    model = Function(lambda model, x: model.layer(x), layer=nn.Linear(4, 4))
    loader = [torch.ones(2, 3)]
    example = Example.from_batch(CalibrationData(InitArgs(loader), "section"), loader[0])
    with pytest.raises(TraceError, match=r"in 'layer' \(Linear\) on a batch of the data loader: section: the model"):
        trace(model, example)


def test_failed_trace_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 2)).train()
    before = copy.deepcopy(model.state_dict())
    level = logging.getLogger("torch._subclasses.fake_tensor").level
    with pytest.raises(TraceError, match="'1'"):
        trace(model, torch.ones(2, 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert logging.getLogger("torch._subclasses.fake_tensor").level == level


class Uncalled(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Linear(4, 4), [], "there is no example input"),
        (nn.Linear(4, 4), Example.of(), "its forward fails on the given example: .*missing 1 required positional"),
        (nn.LazyLinear(4), torch.ones(2, 4), "the parameter 'weight' is lazy"),
        (nn.DataParallel(nn.Linear(4, 4)), torch.ones(2, 4), r"wrapped in DataParallel: .* attribute \.module"),
        (torch.relu, torch.ones(2, 4), r"a model is a torch\.nn\.Module, got builtin_function_or_method"),
        (Uncalled(), Example(torch.ones(1), lambda model, x: model.forward(x)), r"not model\.forward"),
    ],
)
def test_what_cannot_be_traced_is_refused(model, example, message):
    with pytest.raises(TraceError, match=message):
        trace(model, example)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_script_is_refused():
    with pytest.raises(TraceError, match="TorchScript hides its forward"):
        trace(torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)), torch.ones(2, 4))


def test_branch_that_fails_and_is_caught_does_not_disturb_what_follows():
    def forward_function(model, x):
        try:
            x = model.broken(x)
        except RuntimeError:
            x = model.works(x)
        return x

    model = Function(forward_function, broken=nn.Sequential(nn.ReLU(), nn.Linear(9, 4)), works=nn.Linear(4, 4))
    forward = forward_of(model)
    assert calls(forward) == [("broken.0", "relu"), ("works", "linear")]
    assert [frame.module for frame in forward.calls[1].frames] == ["", "works"]


def test_compressed_model_is_the_model_and_its_masks():
    from compress_core import create_compressed_model

    model = trained_model("resnet")
    plain = calls(forward_of(model, torch.ones(1, 3, 8, 8)))
    config = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}}
    create_compressed_model(model, config)
    compressed = calls(forward_of(model, torch.ones(1, 3, 8, 8)))
    masks = [call for call in compressed if ".weight_transforms." in call[0]]
    assert [call for call in compressed if call not in masks] == plain
    # conv2 runs twice, and its weight is masked each time.
    assert [(module.partition(".")[0], name) for module, name in masks] == [
        (layer, "mul") for layer in ("conv1", "conv2", "conv2", "fc")
    ]
