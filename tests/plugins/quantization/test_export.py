"""ONNX files of quantized models: numbers, what they hold, what is left when the export fails."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import DataError, ExportError, UsageError, create_compressed_model
from compress_core.export import exporter as export_module
from tests.conftest import ROOT
from tests.onnx_helpers import File, create
from tests.plugins.quantization.export_helpers import agrees, relative
from tests.zoo import images, trained_model

pytestmark = pytest.mark.usefixtures("fast_exporter")


@functools.cache
def small():
    """Convolution, ReLU, convolution; with overflow_fix, as by default."""
    torch.manual_seed(0)
    return create(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)))


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
    report, _ = export(controller, images(4))
    assert "takes batches of 4 only" in report.notes[0]
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


def test_the_report_is_what_is_measured_and_is_in_the_file(export):
    x = images(8)
    report, file = export(small(), x, tolerance=0.01, output_names=["scores"])
    stored = json.loads(file.metadata["compress_core.export"])
    whole = json.loads(json.dumps(report.to_dict()))
    assert stored == {key: value for key, value in whole.items() if key not in ("path", "size", "data_path")}
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
    with pytest.raises(ExportError, match=rf"ONNX: the export needs {missing}: pip install 'compress-core\[onnx\]'"):
        small().export_onnx(tmp_path / "model.onnx", images(8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, r"path: '.*' must name a file in a folder that exists"),
        ("nowhere/model.onnx", {}, r"path: '.*nowhere/model.onnx' must name a file"),
        ("model.onnx", {"opset": 12}, r"opset: 12: must be an integer of 13 or more"),
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


def test_an_operator_that_the_runtime_does_not_have_is_an_error(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    model.register_forward_hook(
        lambda module, args, out: nn.functional.conv2d(out.double(), torch.ones(1, 2, 1, 1).double())
    )
    with pytest.raises(ExportError, match=r"ONNX Runtime .* cannot load what was exported"):
        create(model, [images(4)]).export_onnx(tmp_path / "model.onnx", images(4))
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
