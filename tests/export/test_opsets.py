"""Exports with older operator sets than torch writes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from compress_core import ExportError, UsageError
from compress_core.export.onnx.opsets import use_opset
from tests.onnx_helpers import File, Wired, create, norm

pytestmark = pytest.mark.usefixtures("fast_exporter")


class Network(nn.Module):
    """Operators that have changed between 13 and 21: reductions, splits, shapes, pooling, norms, activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.layer_norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.hardswish(self.norm(self.conv(x)))
        x = F.interpolate(F.avg_pool2d(x, 2, ceil_mode=True), scale_factor=2.0, mode="bilinear")
        x = self.group_norm(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        a, b = x.chunk(2, 1)
        x = torch.cat([a.amax(3), b.mean(3), x.norm(dim=3)[:, :0]], 1).transpose(1, 2)
        x = self.layer_norm(x.reshape(x.shape[0], -1, 8))
        x = F.gelu(self.attention(x, x, x, need_weights=False)[0])
        return self.head(x).softmax(-1)


def kernels(operators):
    """The integer kernels that a runtime uses."""
    return {name: number for name, number in operators.items() if name.startswith(("QLinear", "QGemm", "MatMulInt"))}


def check(report, file, opset):
    assert report.opset == opset == file.proto.opset_import[0].version
    onnx.checker.check_model(str(file.path), full_check=True)
    table = {row[2]: row[1] for row in reversed(onnx.helper.VERSION_TABLE)}
    assert file.proto.ir_version <= max(table[opset], 10)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20])
def test_operators_that_have_changed(exported, opset):
    model, x = Network(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    report, file = exported(model, x, opset=opset)
    check(report, file, opset)
    assert not report.notes
    np.testing.assert_allclose(file.run(x)[0], expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        other = model(x[:1]).numpy()
    np.testing.assert_allclose(file.run(x[:1])[0], other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opset", [13, 18])
def test_quantized_models(tmp_path, opset):
    x = torch.randn(4, 3, 8, 8)
    controller = create(Network(), [x])
    outputs = {}
    for version in (opset, 21):
        report = controller.export_onnx(tmp_path / f"{version}.onnx", x, opset=version)
        file = File(tmp_path / f"{version}.onnx")
        check(report, file, version)
        outputs[version] = file.run(x)[0]
        if version == opset:
            found = report.runtime_operators
    assert np.abs(outputs[opset] - outputs[21]).max() < 1e-5
    assert kernels(found) == kernels(report.runtime_operators)
    weights = File(tmp_path / f"{opset}.onnx").weights()
    assert {array.dtype for array in weights} == {np.dtype(np.int8)}


def test_scales_for_each_channel_and_integer_biases_are_in_the_oldest(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    controller = create(model, [x])
    report = controller.export_onnx(tmp_path / "model.onnx", x, opset=13)
    file = File(tmp_path / "model.onnx")
    check(report, file, 13)
    assert report.runtime_operators["QLinearConv"] == 1  # the last one returns floats
    assert any(array.dtype == np.int32 and array.ndim for array in file.constants.values())


@pytest.mark.parametrize("opset", [13, 20])
def test_integers_of_16_bits_need_21(opset):
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    constants = [
        helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("zero", onnx.TensorProto.UINT16, [], [7]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="first"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="second"),
    ]
    graph = helper.make_graph(nodes, "", [x], [y], constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    with pytest.raises(ExportError, match=rf"opset {opset} cannot hold .*Linear needs 21 \('first', tensor\(uint16\)"):
        use_opset(model, opset)


@pytest.mark.parametrize(
    ("forward", "opset", "message"),
    [
        (lambda x, y: torch.stft(y, 4, return_complex=False, window=torch.ones(4)), 16, "STFT needs 17"),
        (
            lambda x, y: F.grid_sample(y[:, None, None].expand(-1, 1, 2, 4), x.view(-1, 2, 2, 2)),
            15,
            "GridSample needs 16",
        ),
        (lambda x, y: F.mish(y), 17, "Mish needs 18"),
    ],
)
def test_operators_that_older_sets_lack_are_named(exported, forward, opset, message, tmp_path):
    torch.manual_seed(0)
    model = Wired(lambda self, x: forward(x, self.layer(x)), layer=nn.Linear(8, 4))
    try:
        report, _ = exported(model, torch.randn(2, 8), opset=opset)
    except ExportError as error:
        assert message in str(error)
        assert f"use opset={message.rpartition(' ')[2]} or more" in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert message.partition(" ")[0] not in report.operators  # torch writes it with other operators


@pytest.mark.parametrize("opset", [12, 0, -1, True, 13.5, "21"])
def test_versions_that_there_are_not(exported, opset):
    with pytest.raises(UsageError, match=r"opset: .*must be an integer of 13 or more"):
        exported(nn.Linear(2, 2), torch.randn(2, 2), opset=opset)
