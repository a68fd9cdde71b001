"""Files that differ from torch: roundings that add up are told from faults, and faults are named by their layer."""

from __future__ import annotations

import functools
import re

import numpy as np
import onnx_ir
import pytest
import torch
from torch import nn

from compress_core import ExportError, create_compressed_model
from tests.onnx_helpers import File, create
from tests.zoo import images

pytestmark = pytest.mark.usefixtures("fast_exporter")


class Chaotic(nn.Module):
    """Random layers that amplify every rounding."""

    def __init__(self, layers=6, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            for _ in range(layers)
        )
        self.head = nn.Linear(channels, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=6 / module.weight[0].numel() ** 0.5)

    def forward(self, x):
        x = self.first(x).relu()
        for block in self.blocks:
            x = torch.sin(3 * block(x))
        return self.head(x.mean((2, 3)))


@functools.cache
def chaotic():
    torch.manual_seed(0)
    return create(Chaotic(), [images(4)])


def changed(value, change):
    """Changes a constant; the constant is not shared with other nodes."""
    array = change(value.const_value.numpy())
    return onnx_ir.Value(
        name=f"{value.name}.changed",
        shape=onnx_ir.Shape(array.shape),
        type=value.type,
        const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=f"{value.name}.changed"),
    )


def change_input(graph, nodes, index, change):
    value = changed(nodes[0].inputs[index], change)
    graph.graph.initializers.add(value)
    for node in nodes:
        node.replace_input_with(index, value)


def weight_of(graph, layer):
    """The node that dequantizes the weight of a convolution."""
    return [node for node in graph.graph if node.op_type == "Conv"][layer].inputs[1].producer()


def quantizer(graph, number):
    """A quantize node, and the nodes that dequantize what it returns."""
    node = [node for node in graph.graph if node.op_type == "QuantizeLinear"][number]
    return node, [reader for reader, _ in node.outputs[0].uses()]


FAULTS = {
    "scale of a weight": lambda graph: change_input(graph, [weight_of(graph, 4)], 1, lambda a: 1.2 * a),
    "permuted weight": lambda graph: change_input(graph, [weight_of(graph, 4)], 0, lambda a: np.roll(a, 1, 1)),
    "scale of an activation": lambda graph: change_input(
        graph, [quantizer(graph, 4)[0], *quantizer(graph, 4)[1]], 1, lambda a: (1.1 * a).astype(a.dtype)
    ),
    "zero point of an activation": lambda graph: change_input(
        graph, [quantizer(graph, 4)[0], *quantizer(graph, 4)[1]], 2, lambda a: a ^ 4
    ),
    "zero point before an activation": lambda graph: change_input(graph, [quantizer(graph, 4)[0]], 2, lambda a: a ^ 4),
    "head": lambda graph: change_input(
        graph, [next(n for n in graph.graph if n.op_type == "Gemm").inputs[1].producer()], 0, lambda a: np.roll(a, 1, 0)
    ),
}


def with_fault(controller, monkeypatch, fault):
    export = controller._lifecycle.export
    monkeypatch.setattr(controller._lifecycle, "export", lambda *args: [*export(*args), fault])


def test_roundings_that_add_up_are_a_warning(tmp_path, caplog):
    report = chaotic().export_onnx(tmp_path / "model.onnx", images(4))
    assert report.worst().relative_mean > 0.1
    (note,) = [note for note in report.notes if note.startswith("is right")]
    assert re.search(r"differs from torch by .*Only roundings add up: each of its \d+ quantized tensors agrees", note)
    assert (
        note in caplog.text
        and note in report.to_str()
        and note in File(tmp_path / "model.onnx").metadata["compress_core.export"].replace('\\"', '"')
    )


def test_a_tolerance_that_the_user_gives_is_held(tmp_path):
    with pytest.raises(ExportError, match=r"tolerance is 0\.05\. No file was written\. Only roundings add up"):
        chaotic().export_onnx(tmp_path / "model.onnx", images(4), tolerance=0.05, dynamic_batch=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_network_of_large_differences_is_refused(fault, tmp_path, monkeypatch):
    with_fault(chaotic(), monkeypatch, FAULTS[fault])
    with pytest.raises(ExportError, match="No file was written") as caught:
        chaotic().export_onnx(tmp_path / "model.onnx", images(4), dynamic_batch=False)
    message = str(caught.value)
    if fault == "head":
        assert "quantized tensors agree, but 'linear'" in message
    else:
        (call,) = re.findall(r"departs is quantized at 'the model' \(torch_sin_0_output, call (\d)\)", message)
        before = fault in ("scale of an activation", "zero point of an activation", "zero point before an activation")
        assert int(call) == (2 if before else 3)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_run_names_activations_with_scales_for_channels(tmp_path, monkeypatch):
    layers = nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 4, 3, groups=4)  # hard swish keeps scales where they are

    torch.manual_seed(0)
    controller = create(nn.Sequential(*layers), [images(4)])
    with_fault(controller, monkeypatch, lambda graph: graph.graph.opset_imports.update({"": 999}))
    with pytest.raises(
        ExportError, match=r"(?s)cannot load .*1 activations have a scale for each channel.*per_channel"
    ):
        controller.export_onnx(tmp_path / "model.onnx", images(4), dynamic_batch=False)


@pytest.mark.parametrize("depthwise", [False, True], ids=["one scale", "a scale for each channel"])
@pytest.mark.parametrize("sparse", [False, True], ids=["pruned", "pruned and sparse"])
def test_roundings_are_told_when_the_file_has_fewer_channels(depthwise, sparse, tmp_path):
    torch.manual_seed(0)
    model = Chaotic()
    if depthwise:
        for block in model.blocks:
            block[0] = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            nn.init.normal_(block[0].weight, std=2)
    sections = [
        {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1, "prune_first_conv": True}}
    ]
    sections += [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}] * sparse
    document = {"compression": [*sections, {"algorithm": "quantization"}]}
    controller, _ = create_compressed_model(model, document, init_loader=[images(4)])
    with pytest.raises(ExportError, match=r"No file was written\. Only roundings add up"):
        controller.export_onnx(tmp_path / "model.onnx", images(4), dynamic_batch=False, tolerance=1e-6)


def test_an_algorithm_that_strips_another_model_is_told_from_roundings(tmp_path, monkeypatch):
    torch.manual_seed(0)
    document = {
        "compression": [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}, {"algorithm": "quantization"}]
    }
    controller, _ = create_compressed_model(Chaotic(), document, init_loader=[images(4)])
    lifecycle = controller._lifecycle
    strip, export = lifecycle.strip_unexported, lifecycle.export

    def changed_after(function):
        def call(model, *args):
            result = function(model, *args)
            with torch.no_grad():
                next(model.parameters()).mul_(1.01)
            return result

        return call

    monkeypatch.setattr(lifecycle, "strip_unexported", changed_after(strip))
    monkeypatch.setattr(lifecycle, "export", changed_after(export))
    with pytest.raises(ExportError, match=r"without quantizers of activations, the outputs .* compress_strip\(\)"):
        controller.export_onnx(tmp_path / "model.onnx", images(4), dynamic_batch=False, tolerance=1e-6)
    assert not list(tmp_path.iterdir())


class ReadsTwice(Chaotic):
    """Two layers that read the same tensor, whose quantizers are one."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x).relu()
        for block in self.blocks:
            x = torch.sin(3 * block(x))
        memory = x.mean(3).mT
        return self.head((torch.sin(self.keys(memory)) * self.values(memory)).mean(1))


def test_quantizers_that_the_exporter_merges_are_told_apart(tmp_path):
    torch.manual_seed(0)
    controller = create(ReadsTwice(), [images(4)])
    with pytest.raises(ExportError, match=r"No file was written\. Only roundings add up"):
        controller.export_onnx(tmp_path / "model.onnx", images(4), dynamic_batch=False, tolerance=1e-6)
