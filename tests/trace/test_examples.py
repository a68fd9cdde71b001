"""Training mode, example inputs, and errors of traces."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError
from compress_core.config.document import InputInfo
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_core.trace import Example, TraceError, trace
from tests.trace.traced_models import Function, branching, calls, forward_of
from tests.zoo import ResidualNet, trained_model


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


class Keyed(nn.Module):
    def forward(self, inputs):
        return inputs["pixels"]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Keyed(), Example.of({"image": torch.ones(1)}), "fails on the given example: KeyError: 'pixels'"),
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
    products = [module.partition(".")[0] for module, name in masks if name == "mul"]
    assert products == ["conv1", "conv2", "conv2", "fc"]
