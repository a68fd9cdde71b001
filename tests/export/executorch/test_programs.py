"""Programs for XNNPACK compute what the fake-quantized model computes, with its scales, and in integers."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.export.executorch.program import graph_of, rewritten
from compress_core.export.inputs import Inputs
from compress_core.transforms import activation_transforms, get_weight_transform
from compress_quantization.export import prepare_decomposed, rewrite_program
from compress_quantization.export.fx import IntegerWeight, is_quantize
from tests.export.executorch.conftest import Program, created
from tests.onnx_helpers import norm


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        y = self.body(x)
        return y * torch.sigmoid(self.up(torch.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)

    def forward(self, x):
        y = F.relu(self.norm1(self.first(x)), inplace=True)
        return F.relu(y + self.norm2(self.second(y)))


class Moving(nn.Module):
    """Splits and concatenates: what moves values must not come between quantizers and layers."""

    def __init__(self):
        super().__init__()
        self.first, self.right, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        one, two = torch.relu(self.first(x)).chunk(2, 1)
        return self.last(torch.cat([two, one, self.right(x)], 1))


class Branches(nn.Module):
    """Each branch reads the same images and has an output of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d
        self.branches = nn.ModuleDict(
            {
                "depthwise": nn.Sequential(
                    conv(3, 8, 3, stride=2, bias=False),
                    norm(8),
                    nn.ReLU6(),
                    conv(8, 8, 3, groups=8),
                    norm(8),
                    nn.ReLU6(),
                ),
                "residual": Residual(),
                "silu": nn.Sequential(conv(3, 8, 3), nn.SiLU(), conv(8, 4, 3)),
                "excite": SqueezeExcite(),
                "moving": Moving(),
                "pool": nn.Sequential(
                    conv(3, 4, 3, padding="same"),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Dropout(),
                    nn.AvgPool2d(2),
                    nn.Flatten(),
                    nn.Linear(16, 16),
                    nn.ReLU(),
                    nn.Linear(16, 5),
                ),
                "transposed": nn.Sequential(
                    conv(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2), norm(4), nn.ReLU()
                ),
            }
        )

    def forward(self, x):
        return {name: branch(x) for name, branch in self.branches.items()}


# Float because a sigmoid or SiLU, which XNNPACK has in float only, reads the result unquantized.
FLOAT = {"branches.silu.0", "branches.excite.up"}


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(images, tmp_path_factory):
    """(model, report, path) of all branches."""
    controller = created(Branches(), images)
    path = tmp_path_factory.mktemp("programs") / "model.pte"
    report = controller.export(path, images)
    return controller.model, report, path


def test_each_branch_computes_what_torch_does(exported):
    model, report, _ = exported
    assert report.runtime == f"ExecuTorch {version('executorch')} (XNNPACK)"
    assert {agreement.batch_size for agreement in report.agreements} == {8, 1}
    assert len(report.agreements) == 2 * len(model.branches)
    for agreement in report.agreements:
        assert agreement.relative_mean < 0.01 and agreement.relative < 0.02, agreement


def test_layers_between_quantizers_run_in_integers(exported):
    model, report, _ = exported
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))}
    assert {entry.place for entry in report.work} == layers
    assert {entry.place for entry in report.work if not entry.is_integer} == FLOAT
    assert all("output is not quantized" in entry.reason for entry in report.work if not entry.is_integer)
    assert 0.8 < report.integer_share < 1


def test_multiplications_are_counted(exported):
    macs = {entry.place: entry.macs for entry in exported[1].work}
    assert macs["branches.residual.first"] == 8 * 8 * 8 * 8 * 27
    assert macs["branches.depthwise.3"] == 8 * 8 * 1 * 9  # a depthwise one, on 3 x 3 pixels
    assert macs["branches.pool.6"] == 8 * 16 * 16
    assert macs["branches.transposed.2"] == 8 * 6 * 6 * 8 * 4 * 9


def test_the_file_computes_any_batch_up_to_the_limit_that_the_report_names(exported):
    model, report, path = exported
    assert any(note.startswith("takes batches of up to 32 samples") for note in report.notes)
    program = Program(path)
    for size in (1, 3, 32):
        x = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected = model(x)
        for made, wanted in zip(program(x), expected.values(), strict=True):
            assert (made - wanted).abs().mean() < 0.01 * wanted.abs().mean()


# Layers without a batch norm, whose factors are part of the scales in the program.
PLAIN = "excite.body excite.down moving.first moving.right moving.last pool.0 pool.6 pool.8 silu.2"


def test_scales_in_the_program_are_those_of_the_model_to_the_last_bit(exported, images):
    model = exported[0]
    weights, activations = scales_of(model, images)
    for place in PLAIN.split():
        scale = get_weight_transform(model, f"branches.{place}.weight", "quantization").grid().scale
        assert any(torch.equal(scale, other) for other in weights), place
    for handle in activation_transforms(model):
        assert float(handle.transform.grid().scale) in activations


def scales_of(model, images):
    """The scales in the graph that is lowered."""
    prepared = copy.deepcopy(model)
    prepare_decomposed(prepared)
    inputs = Inputs((images,), {}, len(images))
    module = graph_of(prepared, inputs, largest_batch=None)
    rewritten(module, [rewrite_program])
    weights = [w for node in module.graph.nodes if (w := IntegerWeight.behind(module, node)) is not None]
    activations = {node.args[1] for node in module.graph.nodes if is_quantize(node)}
    assert all(np.float32(scale) == scale for scale in activations)
    return [weight.scale for weight in weights], activations


def test_the_delegate_holds_integers(exported, images):
    """The flatbuffers that XNNPACK executes: convolutions and linear layers on qint8 with qint8 or qcint8 weights."""
    graphs = delegated_graphs(exported[2].read_bytes())
    types = []
    for graph in graphs:
        values = {}
        for value in graph["xvalues"]:
            union = value["xvalue_union"]
            tensor = union.get("tensor_value", union)
            values[tensor["id_out"]] = tensor["datatype"].removeprefix("xnn_datatype_")
        for node in graph["xnodes"]:
            if "filter_id" in node["xnode_union"]:
                union = node["xnode_union"]
                types.append(tuple(values[union[key]] for key in ("input1_id", "filter_id", "output_id")))
    integer = [entry for entry in types if entry[0] == entry[2] == "qint8" and entry[1] in ("qint8", "qcint8")]
    assert len(types) - len(integer) == len(FLOAT)
    assert all(entry == ("fp32", "fp32", "fp32") for entry in types if entry not in integer)


def delegated_graphs(program):
    """The graphs of all delegates, as JSON."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serialize
    from executorch.exir._serialize import _flatbuffer
    from executorch.exir._serialize._program import deserialize_pte_binary

    found = []
    pte = deserialize_pte_binary(program)
    for entry in getattr(pte, "program", pte).backend_delegate_data:
        data = bytes(entry.data)
        header = serialize.XNNHeader.from_bytes(data[: serialize.XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        with tempfile.TemporaryDirectory() as folder:
            schema, binary = Path(folder) / "schema.fbs", Path(folder) / "data.bin"
            schema.write_bytes(serialize._get_schema_bytes())
            binary.write_bytes(data[start : start + header.flatbuffer_size])
            _flatbuffer._flatc_decompile(folder, str(schema), str(binary))
            text = (Path(folder) / "data.json").read_text()
            found.append(json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text)))
    return found


def test_what_is_stored_in_the_program(exported):
    stored = json.loads(Program(exported[2]).text("compress_core_export"))
    assert stored["algorithms"] == ["quantization"] and "path" not in stored
    assert stored["notes"] == list(exported[1].notes[: len(stored["notes"])])
