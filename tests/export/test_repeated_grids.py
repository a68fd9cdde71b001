"""Files for ONNX Runtime quantize again what is selected of a quantized tensor, so that the layer behind is an integer one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from compress_core.export.onnx.exporter import OnnxExporter

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Selections(nn.Module):
    """A quantized tensor with many readers: each selects or moves values for a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.behind = nn.ModuleList(nn.Conv2d(n, 8, 1) for n in (8, 8, 4, 8, 8, 2))

    def forward(self, x):
        x = F.relu(self.first(x))
        selected = [
            F.max_pool2d(x, 2),
            x[:, :, 1:, ::2],
            x.chunk(2, 1)[1],
            F.interpolate(x, scale_factor=2, mode="nearest"),
            x.transpose(2, 3),
            F.pixel_shuffle(x, 2),
        ]
        outputs = [layer(part) for layer, part in zip(self.behind, selected, strict=True)]
        return torch.cat([output.mean((2, 3)) for output in [x, *outputs]], 1)


def exported(path):
    torch.manual_seed(0)
    model = Selections()
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    document = {
        "input_info": {"sample_size": [1, 3, 8, 8]},
        "target_device": "onnxruntime-cpu",
        "compression": {"algorithm": "quantization"},
    }
    controller, _ = create_compressed_model(model, document, init_loader=[(batch, 0)])
    return controller.export(path, batch), batch.numpy()


def run_unoptimized(path, batch):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def test_layers_behind_selections_are_integer_ones_and_no_value_changes(tmp_path, monkeypatch):
    report, batch = exported(tmp_path / "repeated.onnx")
    assert len([entry for entry in report.work if entry.is_integer]) == 7
    assert report.integer_share == 1
    monkeypatch.setattr(OnnxExporter, "adapt", lambda self, graph: None)
    without, _ = exported(tmp_path / "plain.onnx")
    assert without.integer_share < 1, "then the exporter need not do this"
    plain, repeated = (run_unoptimized(tmp_path / name, batch) for name in ("plain.onnx", "repeated.onnx"))
    np.testing.assert_array_equal(plain, repeated)


SELECTING = {
    "MaxPool <kernel_shape = [2, 2]> (x)": True,
    "Flatten (x)": True,
    'Pad <mode = "constant"> (x, pads)': True,
    'Pad <mode = "reflect"> (x, pads)': True,
    "Pad (x, pads, zero)": True,
    "Pad (x, pads, one)": False,
    'Resize <mode = "nearest"> (x, , scales)': True,
    'Resize <mode = "linear"> (x, , scales)': False,
    "Relu (x)": False,
    "Add (x, one)": False,
}


@pytest.mark.parametrize(("call", "expected"), SELECTING.items())
@pytest.mark.parametrize("integers", ["uint8", "int8", "int16"])
def test_only_what_selects_values_of_eight_bits_is_quantized_again(call, expected, integers):
    onnx_ir = pytest.importorskip("onnx_ir")
    from compress_core.export.onnx.onnxruntime import repeat_grids

    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        agraph ({integers}[1, 2, 4, 4] q) => (float[N] y)
        <float s = {{0.5}}, {integers} z = {{3}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, float zero = {{0.0}},
         float one = {{1.0}}, float[4] scales = {{1.0, 1.0, 2.0, 2.0}}>
        {{
            x = DequantizeLinear (q, s, z)
            r = {call}
            y = Neg (r)
        }}
    """
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    repeat_grids(model.graph)
    kinds = [node.op_type for node in model.graph]
    is_repeated = expected and integers != "int16"
    assert kinds.count("QuantizeLinear") == is_repeated
    assert kinds.count("DequantizeLinear") == 1 + is_repeated
    repeat_grids(model.graph)
    assert [node.op_type for node in model.graph] == kinds, "once is enough"
