"""Export to ONNX: what the file holds, that a runtime computes what torch does, and what is left when that fails."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.onnx._internal.exporter import _registration

from compress_core import DataError, ExportError, UsageError, create_compressed_model
from compress_core.export import ExportReport
from compress_core.export import onnx as export_module
from tests.conftest import ROOT
from tests.onnx_helpers import File, Wired, create, norm
from tests.zoo import images, tokens, trained_model

ROUNDING = 1e-3  # of the mean absolute output: single values that rounding sent to the neighbouring integer


@pytest.fixture(autouse=True, scope="module")
def fast_exporter():
    # The exporter parses the source of its 500 operators in each call, which is half of the time of these tests.
    registry = _registration.ONNXRegistry
    original = registry.__dict__["from_torchlib"]
    cached = functools.cache(original.__func__)
    registry.from_torchlib = classmethod(lambda cls, *args, **kwargs: cached(registry, *args, **kwargs))
    yield
    registry.from_torchlib = original


@pytest.fixture
def export(tmp_path):
    def run(controller, args=None, **options) -> tuple[ExportReport, File]:
        report = controller.export_onnx(tmp_path / "model.onnx", args, **options)
        return report, File(tmp_path / "model.onnx")

    return run


@functools.cache
def small():
    """Convolution, ReLU, convolution; with overflow_fix, as by default."""
    torch.manual_seed(0)
    return create(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)))


def agrees(report: ExportReport, tolerance=ROUNDING) -> bool:
    return report.worst(optimized=False).relative_mean < tolerance and report.worst().relative_mean < tolerance


def relative(actual, expected) -> float:
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# Numbers.


def integer_convolution(x, weight, stride):
    """A convolution of integers in int64, with a padding of 1."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", patches, weight.astype(np.int64))


def test_runtime_and_torch_compute_what_integer_arithmetic_says(export):
    controller, x = small(), images(8)
    _, file = export(controller, x)
    scales = {
        name: quantizer.scale.detach().double().numpy() for name, quantizer in controller.all_quantizations.items()
    }
    first, _, second = controller.model
    layers = []
    for name, layer in (("0", first), ("2", second)):
        step = scales[f"{name}|WEIGHT"].reshape(-1, 1, 1, 1) / 63  # half range: 7 bits
        stored = dict(layer.named_parameters())["weight"].detach().double().numpy()
        layers.append((np.clip(np.rint(stored / step), -64, 63).astype(np.int64), step.reshape(1, -1, 1, 1)))
    (weight, weight_step), (weight2, weight2_step) = layers
    x_step = scales["model/input 0|OUTPUT"] / 127
    hidden_step = scales["1|OUTPUT"] / 255

    integers = np.clip(np.rint(x.double().numpy() / x_step), -128, 127).astype(np.int64)
    unit = x_step * weight_step
    bias = first.bias.detach().double().numpy().reshape(1, -1, 1, 1)
    hidden = {}
    for kind, added in (("runtime", np.rint(bias / unit)), ("torch", bias / unit)):
        sums = (integer_convolution(integers, weight, 2) + added) * unit
        hidden[kind] = np.clip(np.rint(np.maximum(sums, 0) / hidden_step), 0, 255).astype(np.int64)
    bias2 = second.bias.detach().double().numpy().reshape(1, -1, 1, 1)
    expected = {
        kind: integer_convolution(values, weight2, 1) * (hidden_step * weight2_step) + bias2
        for kind, values in hidden.items()
    }
    for optimized in (False, True):
        assert relative(file.run(x, optimized=optimized)[0], expected["runtime"]) < 2e-6
    with torch.no_grad():
        assert relative(controller.model(x).numpy(), expected["torch"]) < 2e-6
    # What the runtime's integer bias is worth: no more than one step, in a few places.
    assert np.abs(hidden["runtime"] - hidden["torch"]).max() <= 1
    assert (hidden["runtime"] != hidden["torch"]).mean() < 0.01

    for found, (integers, step) in zip(file.nodes("Conv"), layers, strict=True):
        values, scale, zero_point = file.dequantized(found.input[1])
        assert np.array_equal(values, integers) and values.dtype == np.int8 and not zero_point.any()
        np.testing.assert_allclose(scale, step.ravel(), rtol=1e-6)
    assert [zero_point for _, zero_point in file.activations()] == [128, 0]  # signed, and behind a ReLU
    np.testing.assert_allclose([s for s, _ in file.activations()], np.ravel([x_step, hidden_step]), rtol=1e-6)


# What the file holds.


def test_a_residual_network_is_integers_throughout(export):
    controller = create(trained_model("resnet"))
    report, file = export(controller, images(8))
    assert agrees(report)
    assert [entry.version for entry in file.proto.opset_import if entry.domain == ""] == [21]
    assert file.floats() == {}
    assert file.count("BatchNormalization") == 0
    for node in file.nodes("Conv", "Gemm"):
        weight, bias = file.dequantized(node.input[1]), file.dequantized(node.input[2])
        assert (weight[0].dtype, bias[0].dtype) == (np.int8, np.int32)
    for node in file.nodes("Add"):
        assert [file.makers[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
        assert [reader.op_type for reader in file.readers(node.output[0])] == ["QuantizeLinear"]
    assert {zero_point.dtype.name for _, zero_point in file.activations()} == {"uint8"}
    assert {int(zero_point) for _, zero_point in file.activations()} == {0, 128}
    # All of it runs on integers: a convolution, one that is called twice, two additions and a linear layer.
    assert {k: v for k, v in report.runtime_operators.items() if k.startswith("Q") and k != "QuantizeLinear"} == {
        "QLinearConv": 3,
        "QLinearAdd": 2,
        "QGemm": 1,
    }
    assert not {"Conv", "Gemm", "Add"} & set(report.runtime_operators)


def test_a_layer_that_is_called_twice_is_stored_once(export):
    _, file = export(create(trained_model("resnet")), images(8), verify=False)
    calls = [node for node in file.nodes("Conv") if file.dequantized(node.input[1])[0].shape == (8, 8, 3, 3)]
    assert len(calls) == 2
    assert len({file.makers[node.input[1]].input[0] for node in calls}) == 1


def test_nothing_is_stored_twice_and_names_are_those_of_the_model(export):
    _, file = export(create(trained_model("resnet")), images(8), verify=False)
    tensors = [(tensor.data_type, *tensor.dims, bytes(tensor.raw_data)) for tensor in file.proto.graph.initializer]
    assert len(set(tensors)) == len(tensors)
    assert not any("activation_transforms" in name or "parametrizations" in name for name in file.constants)


def test_a_file_tells_nothing_about_the_machine(export):
    report, file = export(small(), images(8))
    assert str(ROOT).encode() not in file.path.read_bytes()
    assert b"site-packages" not in file.path.read_bytes()
    assert file.proto.producer_name == "compress-core"
    assert "2.weight.integers" in file.constants  # names are those of the model
    assert report.size == file.path.stat().st_size


def test_the_same_model_gives_the_same_bytes(export):
    first = export(small(), images(8))[1].path.read_bytes()
    assert export(small(), images(8))[1].path.read_bytes() == first


@pytest.mark.parametrize("size", [1, 3, 7])
def test_any_batch_size_runs(size, tmp_path):
    path = _dynamic(tmp_path.parent)
    file = File(path)
    assert [dim.dim_param or dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        8,
        8,
    ]
    x = images(size)
    with torch.no_grad():
        expected = small().model(x)
    assert relative(file.run(x, optimized=True)[0], expected) < 0.02


@functools.cache
def _dynamic(folder: Path) -> Path:
    small().export_onnx(folder / "dynamic.onnx", images(2), input_names=["pixels"], output_names=["scores"])
    return folder / "dynamic.onnx"


def test_one_batch_size_where_that_is_asked_for(export):
    class Reshaping(nn.Sequential):
        def forward(self, x):
            return super().forward(x).reshape(4, -1)

    controller = create(Reshaping(nn.Conv2d(3, 2, 3)), [images(4)])
    with pytest.raises(ExportError, match=r"pass dynamic_batch=False"):
        export(controller, images(4))
    report, file = export(controller, images(4), dynamic_batch=False, input_names=["pixels"], output_names=["scores"])
    assert (report.inputs, report.outputs) == (("pixels",), ("scores",))
    assert [dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 8, 8]


def test_names_that_the_file_has_already(export):
    controller, x = create(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.randn(8, 4)]), torch.randn(8, 4)
    _, file = export(controller, x)
    taken = [next(iter(file.constants)), file.graph.node[0].output[0]]
    report, again = export(controller, x, input_names=taken[:1], output_names=taken[1:])
    assert (report.inputs, report.outputs) == ((taken[0],), (taken[1],))
    assert agrees(report)
    assert [value.name for value in (*again.graph.input, *again.graph.output)] == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "input_names: 2 names for 1 input"),
        ({"output_names": []}, "output_names: 0 names for 1 output"),
        ({"input_names": ["x"], "output_names": ["x"]}, "'x' is given twice"),
        ({"input_names": [""]}, "input_names: '' is no name"),
    ],
)
def test_names_that_cannot_be_given(export, tmp_path, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        export(small(), images(2), **options)
    assert not (tmp_path / "model.onnx").exists()


# The report.


def test_the_report_is_what_is_measured_and_is_in_the_file(export):
    x = images(8)
    report, file = export(small(), x, tolerance=0.01, output_names=["scores"])
    stored = json.loads(file.metadata["compress_core.export"])
    whole = json.loads(json.dumps(report.to_dict()))
    assert stored == {key: value for key, value in whole.items() if key not in ("path", "size")}
    assert (report.opset, report.tolerance, report.algorithms) == (21, 0.01, ("quantization",))
    assert report.runtime.startswith("ONNX Runtime 1.")
    assert report.operators == {"Conv": 2, "DequantizeLinear": 5, "QuantizeLinear": 2, "Relu": 1}
    assert [(a.batch_size, a.optimized) for a in report.agreements] == [(8, False), (1, False), (8, True), (1, True)]
    with torch.no_grad():
        expected = small().model(x).double().numpy()
    for found in (a for a in report.agreements if a.batch_size == 8):
        actual = file.run(x, optimized=found.optimized)[0].astype(np.float64)
        difference = np.abs(actual - expected)
        assert found.output == "scores"
        assert found.largest == pytest.approx(difference.max())
        assert found.relative_mean == pytest.approx(difference.mean() / np.abs(expected).mean())
        assert found.steps == pytest.approx(difference.max() / ((expected.max() - expected.min()) / 255))
        assert found.top1 == (actual.argmax(-1) == expected.argmax(-1)).mean()
    text = report.to_str()
    for part in ("QLinearConv", "top-1", "opset 21", "scores"):
        assert part in text


def test_without_verification_the_report_says_so(export):
    report, file = export(small(), images(8), verify=False)
    assert report.agreements == () and report.worst() is None and report.runtime == ""
    assert "not compared" in report.to_str()
    assert json.loads(file.metadata["compress_core.export"])["agreements"] == []


# What is left when it fails.


@pytest.mark.parametrize("existing", [None, b"precious"])
def test_worse_than_the_tolerance_is_an_error_and_touches_no_file(existing, tmp_path):
    path = tmp_path / "model.onnx"
    if existing is not None:
        path.write_bytes(existing)
    message = r"output '.*' of ONNX Runtime .* differs from torch by .* tolerance is 0\. No file was written"
    with pytest.raises(ExportError, match=message):
        small().export_onnx(path, images(8), tolerance=0)
    assert [file.name for file in tmp_path.iterdir()] == ([] if existing is None else ["model.onnx"])
    assert existing is None or path.read_bytes() == existing


def test_a_wrong_graph_is_noticed(tmp_path, monkeypatch):
    def double_a_scale(graph):
        import onnx_ir

        name, value = next((n, v) for n, v in graph.graph.initializers.items() if n.endswith("weight.scale"))
        value.const_value = onnx_ir.tensor(2 * value.const_value.numpy(), name=name)

    controller = small()
    rewrite = controller._lifecycle.export
    monkeypatch.setattr(controller._lifecycle, "export", lambda *args: [*rewrite(*args), double_a_scale])
    with pytest.raises(ExportError, match="differs from torch"):
        controller.export_onnx(tmp_path / "model.onnx", images(8))
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"precious")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        small().export_onnx(path, images(8), verify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and path.read_bytes() == b"precious"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ExportError, match=rf"ONNX export needs {missing}: pip install 'compress-core\[onnx\]'"):
        small().export_onnx(tmp_path / "model.onnx", images(8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, r"path: '.*' must name a file in a folder that exists"),
        ("nowhere/model.onnx", {}, r"path: '.*nowhere/model.onnx' must name a file"),
        ("model.onnx", {"opset": 20}, r"opset: 20: quantized models need an integer of 21 or more"),
        ("model.onnx", {"opset": "21"}, r"opset: '21'"),
        ("model.onnx", {"opset": 999}, r"opset: this version of torch does not write 999"),
        ("model.onnx", {"tolerance": -0.1}, r"tolerance: -0.1 must be a number of at least 0"),
        ("model.onnx", {"tolerance": float("nan")}, r"tolerance: nan"),
        ("model.onnx", {"tolerance": "small"}, r"tolerance: 'small'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(name, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        small().export_onnx(tmp_path / name, images(8), **options)
    assert not list(tmp_path.iterdir())


class TwoWays(nn.Module):
    """Which layer is used depends on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.a(x) if float(x.sum()) > 0 else self.b(x)


def test_a_model_that_cannot_be_exported_says_why_in_a_few_words(tmp_path):
    controller = create(TwoWays(), [images(4) + 3])
    with pytest.raises(ExportError, match=r"torch cannot export TwoWays to ONNX: .*data-dependent") as caught:
        controller.export_onnx(tmp_path / "model.onnx", images(4) + 3)
    assert len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_the_runtime_cannot_compute_in_is_an_error(tmp_path):
    controller = create(nn.Sequential(nn.Conv2d(3, 2, 3)).double(), [images(4).double()])
    with pytest.raises(ExportError, match=r"ONNX Runtime .* cannot load what was exported"):
        controller.export_onnx(tmp_path / "model.onnx", images(4).double())
    assert not list(tmp_path.iterdir())


def test_arguments_that_the_model_does_not_take(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        small().export_onnx(tmp_path / "model.onnx", torch.ones(2, 7, 8, 8))
    assert any("pass args= to export_onnx" in note for note in caught.value.__notes__)


def test_a_model_without_example_or_after_strip(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(3, 2, 3))

    controller = create(make(), [images(4)])
    config = {"compression": {"algorithm": "quantization"}}
    resumed, _ = create_compressed_model(make(), config, controller.get_compression_state())
    with pytest.raises(DataError, match="input_info"):
        resumed.export_onnx(tmp_path / "model.onnx")
    controller.strip(do_copy=False)
    with pytest.raises(UsageError, match="stripped"):
        controller.export_onnx(tmp_path / "model.onnx", images(4))
    assert not list(tmp_path.iterdir())


# The model stays as it is.


def test_the_model_is_the_same_afterwards_and_goes_on_training(export):
    controller = create(trained_model("resnet"))
    model = controller.model.train()
    twin = copy.deepcopy(model)
    modes = {name: module.training for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    export(controller, images(8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(p.grad is None for p in model.parameters())
    for trainee in (model, twin):
        optimizer = torch.optim.SGD(trainee.parameters(), 0.05)
        trainee(images(8)).square().mean().backward()
        optimizer.step()
    before, after = twin.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_example_of_creation_is_exported_with_and_is_not_written_to(export):
    data = images(4)
    controller = create(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)), [data])
    report, _ = export(controller)
    assert report.agreements[0].batch_size == 4
    assert torch.equal(data, images(4))


# Networks of every kind.


def depthwise(activation=nn.ReLU6):
    layers = [nn.Conv2d(3, 4, 3, bias=False), norm(4), activation()]
    layers += [nn.Conv2d(4, 8, 3, groups=4, bias=False), norm(8), activation(), nn.Flatten(), nn.Linear(128, 5)]
    return nn.Sequential(*layers)


def test_scales_of_channels_before_depthwise_convolutions_move_into_the_weights(export):
    controller = create(depthwise())
    quantizer = controller.non_weight_quantizers["2|OUTPUT"]
    assert quantizer.shape == (1, 4, 1, 1) and len(quantizer.scale.unique()) > 2
    report, file = export(controller, images(8))
    assert agrees(report)
    assert all(scale.ndim == 0 for scale, _ in file.activations())
    assert file.count("BatchNormalization") == file.count("Clip") == 0 and file.floats() == {}
    assert report.runtime_operators["QLinearConv"] == 2


def test_scales_of_channels_that_cannot_move_stay(export):
    # Hard swish does not pass a factor.
    controller = create(depthwise(nn.Hardswish))
    report, file = export(controller, images(8))
    assert agrees(report)
    (scales, zero_points) = next(entry for entry in file.activations() if entry[0].ndim)
    expected = controller.non_weight_quantizers["2|OUTPUT"].grid()
    np.testing.assert_array_equal(scales, expected.scale.detach().numpy())
    assert zero_points.dtype == np.uint8 and zero_points.shape == (4,)
    nodes = [n for n in file.nodes("QuantizeLinear", "DequantizeLinear") if file.constants[n.input[1]].ndim == 1]
    axes = {
        attribute.name: attribute.i
        for node in nodes
        for attribute in node.attribute
        if node.input[0] not in file.constants
    }
    assert axes == {"axis": 1}


@pytest.mark.parametrize(("scale", "clips"), [(5.0, 0), (6.005, 0), (7.0, 1)])
def test_clipping_is_left_out_where_the_quantizer_clips_as_much(scale, clips, export):
    controller = create(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        controller.non_weight_quantizers["1|OUTPUT"].scale.fill_(scale)
    x = 20 * images(8)
    report, file = export(controller, x)
    assert agrees(report) and file.count("Clip") == clips
    with torch.no_grad():
        assert relative(file.run(x)[0], controller.model(x)) < 0.01


@pytest.mark.parametrize("asymmetric", [("activations",), ("weights", "activations")], ids=["mixed", "both"])
def test_asymmetric_grids(asymmetric, export):
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.LeakyReLU(0.3), nn.Conv2d(4, 2, 3)]
    controller = create(nn.Sequential(*layers), **{group: {"mode": "asymmetric"} for group in asymmetric})
    report, file = export(controller, images(8))
    assert agrees(report)
    assert any(zero_point not in (0, 128) for _, zero_point in file.activations())
    for weight in file.weights():
        # Half range, and in the middle: 7 bits for 16-bit accumulators.
        assert weight.dtype == np.int8 and weight.min() >= -64 and weight.max() <= 64


@pytest.mark.parametrize(("mode", "per_channel"), [("symmetric", True), ("asymmetric", False)])
def test_four_bits(mode, per_channel, export):
    options = {"bits": 4, "mode": mode, "per_channel": per_channel}
    controller = create(depthwise(), root={"target_device": "TRIAL"}, weights=options, activations=options)
    x = images(8)
    report, file = export(controller, x, verify=False)
    for weight in file.weights():
        assert weight.dtype == np.int8 and weight.min() >= -8 and weight.max() <= 8
        assert len(np.unique(weight)) <= 16
    with torch.no_grad():
        assert relative(file.run(x)[0], controller.model(x)) < 0.01
    # What is beyond the 16 values is clipped before it becomes an integer of 8 bits.
    assert report.operators.get("Clip", 0) + report.operators.get("Min", 0) >= 3
    controller.disable_activation_quantization()
    with torch.no_grad():
        assert relative(file.run(x)[0], controller.model(x)) > 0.02


@pytest.mark.parametrize(
    ("fix", "largest"), [("enable", (63, 63)), ("first_layer_only", (63, 127)), ("disable", (127, 127))]
)
def test_overflow_fix_keeps_weights_at_half_range(fix, largest, export):
    controller = create(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), overflow_fix=fix)
    x = images(8)
    _, file = export(controller, x, verify=False)  # integers of 8 bits saturate on processors without VNNI
    assert tuple(np.abs(weight.astype(int)).max() for weight in file.weights()) == largest
    with torch.no_grad():
        assert relative(file.run(x)[0], controller.model(x)) < 0.01


def test_transposed_convolutions(export):
    layers = [nn.ConvTranspose2d(3, 4, 3, stride=2), norm(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), norm(4)]
    report, file = export(create(nn.Sequential(*layers)), images(8))
    assert agrees(report)
    assert [weight.dtype for weight in file.weights()] == [np.int8] * 2
    assert file.count("BatchNormalization") == 1  # with groups, output channels are no dimension of the weight


def test_linear_layers_alone(export):
    layers = [nn.Linear(6, 8), norm(8, nn.BatchNorm1d), nn.ReLU(), nn.Linear(8, 8, bias=False), norm(8, nn.BatchNorm1d)]
    x = torch.randn(8, 6)
    report, file = export(create(nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 5)), [x]), x)
    assert agrees(report)
    assert file.floats() == {} and file.count("BatchNormalization") == file.count("Transpose") == 0
    assert report.runtime_operators["QGemm"] == 3


def test_linear_layers_on_sequences(export):
    x = torch.randn(4, 5, 6)
    report, file = export(create(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)), [x]), x)
    assert agrees(report)
    assert report.runtime_operators["MatMulIntegerToFloat"] == 2
    assert set(file.floats().values()) == {(8,), (5,)}  # biases, which are added in floating point


def attention(m, x):
    query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
    return m.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def attention_of_three(m, x):
    return m.attention(x, m.first(x), m.second(x))


KINDS_OF_ATTENTION = ["scaled_dot_product_attention", "MultiheadAttention", "of three tensors", "of other widths"]


@pytest.mark.parametrize("kind", KINDS_OF_ATTENTION)
def test_attention(kind, export):
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    if kind == "MultiheadAttention":
        model = Wired(lambda m, x: m.attention(x, x, x), attention=layer)
    elif kind == "of other widths":  # three weights in one layer
        layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)
        model = Wired(attention_of_three, attention=layer, first=nn.Linear(8, 6), second=nn.Linear(8, 4))
    elif kind == "of three tensors":
        model = Wired(attention_of_three, attention=layer, first=nn.LayerNorm(8), second=nn.LayerNorm(8))
    else:
        model = Wired(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    x = torch.randn(4, 5, 8)
    report, file = export(create(model, [x]), x)
    assert report.worst(optimized=False).relative_mean < 1e-6 and report.worst().relative_mean < 1e-6
    # The weight is split for queries, keys and values, whether they are made of one tensor or of three.
    shapes = {
        "MultiheadAttention": [(8, 8)] * 4,
        "of three tensors": [(8, 8)] * 4,
        "of other widths": [(4, 8), (6, 8), (8, 4), (8, 6), (8, 8), (8, 8)],
    }
    assert sorted(weight.shape for weight in file.weights()) == shapes.get(kind, [(8, 8), (8, 24)])
    assert report.runtime_operators["MatMulIntegerToFloat"] >= 1


def test_attention_over_parts_of_one_tensor(export):
    # Torch asks whether the batch size times the width of the values is a certain number.
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)
    model, x = Wired(lambda m, x: m.attention(x, x[..., :6], x[..., :4])[0], attention=layer), torch.randn(4, 5, 8)
    controller = create(model, [x])
    report, file = export(controller, x)
    assert report.worst(optimized=False).relative_mean < 1e-6 and report.worst().relative_mean < 1e-6
    for size in (1, 2, 7):
        x = torch.randn(size, 5, 8)
        assert relative(file.run(x)[0], controller.model(x)) < 1e-5


def test_a_tied_embedding_is_integers_in_both_places(export):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    report, file = export(create(Tied(), [tokens()]), tokens())
    assert agrees(report)
    large = [array for array in file.constants.values() if array.size == 160]
    assert {array.dtype.name for array in large} == {"int8"}
    assert sum(np.array_equal(array, large[0]) or np.array_equal(array.T, large[0]) for array in large) == len(large)


def test_recurrent_layers_keep_floating_point_on_the_grid(export):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    x = torch.randn(4, 5, 4)
    report, file = export(create(Recurrent(), [x]), x)
    assert agrees(report)
    assert file.count("LSTM") == 1 and [weight.shape for weight in file.weights()] == [(3, 6)]


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims, export):
    conv, batch_norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    x = torch.randn(4, 3, *[6, 5, 4][:dims])
    model = nn.Sequential(conv(3, 4, 3), norm(4, batch_norm), nn.ReLU(), conv(4, 2, 1))
    report, file = export(create(model, [x]), x)
    assert agrees(report)
    assert file.count("BatchNormalization") == 0 and [w.ndim for w in file.weights()] == [dims + 2] * 2


def test_a_batch_norm_whose_input_others_read_stays(export):
    def forward(m, x):
        y = m.a(x)
        return m.b(m.norm(y) + y)

    report, file = export(create(Wired(forward, a=nn.Conv2d(3, 4, 3), norm=norm(4), b=nn.Conv2d(4, 2, 3))), images(8))
    assert agrees(report) and file.count("BatchNormalization") == 1


def test_parts_of_a_concatenation_have_one_scale(export):
    def forward(m, x):
        return m.c(torch.cat([m.a(x), m.b(x)], 1))

    model = Wired(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), c=nn.Conv2d(8, 2, 3))
    report, file = export(create(model), images(8))
    assert agrees(report)
    (concat,) = file.nodes("Concat")
    makers = [file.makers[name] for name in concat.input]
    assert [maker.op_type for maker in makers] == ["DequantizeLinear"] * 2
    assert len({float(file.constants[maker.input[1]]) for maker in makers}) == 1


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, image, other, *, factor=2.0, bias=None):
        left, right = self.a(image), self.b(other)
        total = left * factor + right
        return total if bias is None else total + bias, {"left": left.relu(), "parts": [right]}


@pytest.mark.parametrize("keywords", [False, True])
def test_several_inputs_and_outputs_by_position_or_by_keyword(keywords, export):
    x, y, bias = images(4), 3 * images(4).flip(0), torch.randn(4, 4, 6, 6)
    args = {"image": x, "other": y, "bias": bias} if keywords else (x, y)
    controller = create(TwoInputs(), [{"image": x, "other": y, "bias": bias} if keywords else {"image": x, "other": y}])
    if not keywords:
        # Calls by position are another way of calling: they have to be known when the quantizers are placed.
        info = [{"sample_size": [4, 3, 8, 8]}, {"sample_size": [4, 3, 8, 8]}]
        config = {"input_info": info, "compression": {"algorithm": "quantization"}}
        controller, _ = create_compressed_model(TwoInputs().eval(), config)
    report, file = export(controller, args)
    assert agrees(report)
    assert len(report.outputs) == 3 and {a.output for a in report.agreements} == set(report.outputs)
    with torch.no_grad():
        total, rest = controller.model(**args) if keywords else controller.model(*args)
    inputs = (x, y, bias) if keywords else (x, y)
    assert [entry.name for entry in file.graph.input] == ["image", "other", "bias"][: len(inputs)]
    for actual, expected in zip(file.run(*inputs), (total, rest["left"], rest["parts"][0]), strict=True):
        assert relative(actual, expected) < 1e-5


def test_quantizers_that_are_off_are_not_in_the_file(export):
    controller = create(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    controller.disable_activation_quantization()
    report, file = export(controller, images(8))
    assert agrees(report, 1e-6)
    assert file.count("QuantizeLinear") == 0 and len(file.weights()) == 2
    controller.enable_activation_quantization()
    controller.disable_weight_quantization()
    report, file = export(controller, images(8))
    # With optimizations on, ONNX Runtime puts weights between quantized activations on a grid of its own.
    assert report.worst(optimized=False).relative_mean < 1e-6
    assert file.count("QuantizeLinear") == 2 and file.weights() == []


def test_without_quantization_the_file_holds_the_plain_model(export):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    info = {"input_info": {"sample_size": [4, 3, 8, 8]}}
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target": 0.5}}
    controller, _ = create_compressed_model(model, {**info, "compression": sparsity})
    report, file = export(controller, images(4))
    assert agrees(report, 1e-5) and report.algorithms == ("magnitude_sparsity",)
    zeros = sum(int((array == 0).sum()) for array in file.constants.values() if array.ndim == 4)
    assert zeros == (4 * 27 + 2 * 36) // 2


@pytest.mark.parametrize("order", ["sparsity first", "quantization first"])
def test_zeros_of_sparsity_are_zeros_in_the_file(order, export):
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.6, "params": {"sparsity_target": 0.6}}
    sections = [sparsity, {"algorithm": "quantization"}]
    if order == "quantization first":
        sections.reverse()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    controller, model = create_compressed_model(model, {"compression": sections}, init_loader=[images(8)])
    report, file = export(controller, images(8))
    assert agrees(report) and report.algorithms == ("magnitude_sparsity", "quantization")
    for layer, stored in zip((model[0], model[3]), file.weights(), strict=True):
        # A dead channel of the batch norm makes more zeros, nothing makes fewer.
        masked = layer.weight.detach().numpy() == 0
        assert masked.mean() > 0.4
        assert not stored[masked].any()
