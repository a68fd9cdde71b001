"""TensorRT's rules on quantizers, which are checked on the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compress_core.errors import ExportError
from tests.onnx_helpers import File, create, session
from tests.zoo import images

CENTERED = {
    "activations": {"mode": "symmetric", "signed": True},
    "weights": {"mode": "symmetric"},
    "overflow_fix": "disable",
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


@pytest.fixture(scope="module")
def centered():
    return create(net(), **CENTERED)


@pytest.fixture(scope="module")
def file(centered, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    report = centered.export(path, images(4), target="tensorrt")
    return File(path), report


def test_every_pair_is_int8_around_zero(file):
    exported, _ = file
    zero_points = [exported.constants[node.input[2]] for node in exported.nodes("QuantizeLinear", "DequantizeLinear")]
    assert len(zero_points) == 3 * 2 + 3
    assert all(array.dtype == np.int8 and not array.any() for array in zero_points)


def test_biases_stay_floats(file):
    exported, _ = file
    biases = [exported.constants[node.input[2]] for node in exported.nodes("Conv", "Gemm")]
    assert [bias.dtype for bias in biases] == [np.float32] * 3


def test_the_file_computes_what_torch_computes_and_says_where_it_ran(file, centered):
    exported, report = file
    x = images(5)
    with torch.no_grad():
        expected = centered.model(x).numpy()
    (actual,) = session(exported.path, optimized=False).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
    assert any("as TensorRT needs a GPU: its rules were checked on the graph (3 quantizers)" in n for n in report.notes)
    assert report.integer_share is None, "nothing is claimed that was not measured"


def refused(tmp_path, **section):
    with pytest.raises(ExportError, match="TensorRT would not take this file") as caught:
        create(net(), **section).export(tmp_path / "model.onnx", images(4), target="tensorrt")
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def test_unsigned_grids_are_named_with_the_remedy(tmp_path):
    message = refused(tmp_path)
    assert "Integers have to be int8, and these are uint8: 'relu'" in message
    assert message.endswith('create the model with "target_device": "tensorrt"')


def test_zero_points_are_named(tmp_path):
    message = refused(tmp_path, **{**CENTERED, "weights": {"mode": "asymmetric"}})
    assert "Every zero point has to be 0, and these are not: '0.weight" in message


def changed(tmp_path, monkeypatch, change):
    """The message for a graph that an algorithm's rewrite has changed."""
    controller = create(net(), **CENTERED)
    rewrite = controller._lifecycle.export
    monkeypatch.setattr(controller._lifecycle, "export", lambda *args: [*rewrite(*args), change])
    with pytest.raises(ExportError, match="TensorRT would not take this file") as caught:
        controller.export(tmp_path / "model.onnx", images(4), target="tensorrt", verify=False)
    return str(caught.value)


def first(graph, operator):
    return next(node for node in graph.graph if node.op_type == operator)


def constant(graph, name, array):
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.graph.initializers[name] = value
    return value


def scale_of_each_channel(graph):
    node = first(graph, "QuantizeLinear")
    for reader in (node, node.outputs[0].uses()[0][0]):
        reader.replace_input_with(1, constant(graph, "scales", np.full(3, 0.1, np.float32)))


def two_scales(graph):
    first(graph, "QuantizeLinear").replace_input_with(1, constant(graph, "other", np.float32(0.5)))


def negative_scale(graph):
    for node in (first(graph, "QuantizeLinear"), first(graph, "DequantizeLinear")):
        node.replace_input_with(1, constant(graph, "negative", np.float32(-0.5)))


def scales_of_inputs(graph):
    weight = first(graph, "Conv").inputs[1].producer()
    import onnx_ir

    weight.attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
    weight.replace_input_with(1, constant(graph, "of_inputs", np.full(3, 0.1, np.float32)))
    weight.replace_input_with(2, constant(graph, "zeros", np.zeros(3, np.int8)))


def no_dequantizer(graph):
    pair = first(graph, "DequantizeLinear")
    graph.graph.outputs.append(pair.inputs[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_of_each_channel, "Activations have to have one scale, and these have one for each channel: 'input'"),
        (two_scales, "Both halves of a pair have to have one scale, and these have two: 'input'"),
        (negative_scale, "Scales have to be positive float32 numbers, and these are not: 'input'"),
        (scales_of_inputs, "Scales of weights have to be those of output channels, and these are not: '0.weight"),
        (no_dequantizer, "Each quantizer has to be followed by a dequantizer, and these are not: 'input'"),
    ],
)
def test_each_rule_is_checked(change, message, tmp_path, monkeypatch):
    assert message in changed(tmp_path, monkeypatch, change)


def test_models_made_for_another_runtime_are_told_apart(tmp_path):
    controller = create(net(), root={"target_device": "NPU"})
    report = controller.export(tmp_path / "model.onnx", images(4), target="onnxruntime", verify=False)
    assert report.notes[0].startswith("was created for target_device 'NPU', whose quantizers have the grids")
