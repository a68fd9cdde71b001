"""Zeros in files: pruned channels are gone, and weights that are exactly zero stay so through quantization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from compress_core import create_compressed_model
from compress_core.export.onnx.zeros import zeros_of
from compress_quantization.export.modules import DequantizedWeight
from compress_quantization.export.weights import QuantizedWeight
from compress_quantization.grid import Grid
from tests.onnx_helpers import File, norm

pytestmark = pytest.mark.usefixtures("fast_exporter")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 8, 3), norm(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def export(tmp_path, *sections):
    config = {"compression": list(sections)}
    controller, _ = create_compressed_model(network(), config, init_loader=[X])
    return controller.export_onnx(tmp_path / "model.onnx", X), File(tmp_path / "model.onnx"), controller


def test_files_of_pruned_models_are_small(tmp_path):
    pruning = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}}
    _, file, _ = export(tmp_path, {**pruning, "params": {**pruning["params"], "prune_first_conv": True}})
    shapes = {tuple(array.shape) for array in file.constants.values() if array.ndim == 4}
    assert shapes == {(8, 3, 3, 3), (4, 8, 3, 3)}


QUANTIZED = [
    {},
    {"mode": "asymmetric"},
    {"per_channel": False},
    {"mode": "asymmetric", "per_channel": False},
]


@pytest.mark.parametrize("weights", QUANTIZED)
def test_zeros_stay_zeros_through_quantization_and_folding(tmp_path, weights):
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.6}
    report, _, controller = export(tmp_path, sparsity, {"algorithm": "quantization", "weights": weights})
    plain = controller.strip()
    found = {entry.weight.partition(".weight")[0]: entry for entry in report.zeros}
    assert len(found) == 3
    for name, entry in found.items():
        weight = plain.get_submodule(name).weight
        assert entry.size == weight.numel()
        # The folded batch norm has a channel of zeros, and rounding makes more.
        assert entry.zeros >= int((weight == 0).sum()) > 0
    share = sum(entry.zeros for entry in report.zeros) / sum(entry.size for entry in report.zeros)
    assert share >= 0.6
    assert f"zeros: {share:.1%} of {16 * 27 + 8 * 144 + 32:,} weights" in report.to_str()


def test_patterns_of_two_in_four(tmp_path):
    controller, model = create_compressed_model(
        network(),
        {"compression": {"algorithm": "quantization", "weights": {"mode": "asymmetric"}}},
        init_loader=[X],
    )
    with torch.no_grad():
        for layer in (model[3], model[8]):
            layer.weight[:, ::4] = 0
            layer.weight[:, 1::4] = 0
    report = controller.export_onnx(tmp_path / "model.onnx", X)
    assert [entry.is_2_4 for entry in report.zeros] == [False, True, True]
    assert "yes" in report.to_str()


def graph(operator, weight, attributes):
    """A layer with an integer weight whose zero point is 3."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    constants = [
        helper.make_tensor("w.integers", TensorProto.INT8, weight.shape, weight.flatten() + 3),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.INT8, [], [3]),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w.integers", "scale", "zero"], ["w"]),
        helper.make_node(operator, ["w", "x"] if operator == "Gather" else ["x", "w"], ["y"], **attributes),
    ]
    return ir.from_proto(helper.make_model(helper.make_graph(nodes, "", [x], [y], constants)))


@pytest.mark.parametrize(
    ("operator", "attributes", "axis"),
    [
        ("Conv", {}, 1),
        ("ConvTranspose", {}, 0),
        ("Gemm", {}, 0),
        ("Gemm", {"transB": 1}, 1),
        ("MatMul", {}, 0),
        ("Gather", {}, 1),
    ],
)
def test_the_pattern_lies_along_the_dimension_that_is_summed_over(operator, attributes, axis):
    weight = np.ones((9, 9), np.int8)
    rows = np.moveaxis(weight, axis, -1)
    rows[:, [0, 3, 5, 6]] = 0  # the last column belongs to no group of 4
    (entry,) = zeros_of(graph(operator, weight, attributes))
    assert (entry.weight, entry.size, entry.zeros, entry.is_2_4) == ("w", 81, 36, True)
    (entry,) = zeros_of(graph(operator, weight.T.copy(), attributes))
    assert entry.zeros == 36 and not entry.is_2_4
    rows[2, 0] = 1
    (entry,) = zeros_of(graph(operator, weight, attributes))
    assert entry.zeros == 35 and not entry.is_2_4


@st.composite
def weights_and_grids(draw):
    """Weights of which some are zero, and a grid of any kind that has a zero."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    levels = 2 ** draw(st.integers(2, 8))
    kind = draw(st.sampled_from(["signed", "narrow", "half", "asymmetric"]))
    low, high = {
        "signed": (-levels // 2, levels // 2 - 1),
        "narrow": (-levels // 2 + 1, levels // 2 - 1),
        "half": (-levels // 4, levels // 4 - 1),
        "asymmetric": (0, levels - 1),
    }[kind]
    number = (shape[0],) if draw(st.booleans()) else ()
    scale = torch.rand(number, generator=generator) + 1e-3
    zero_point = torch.randint(low, high + 1, number, generator=generator, dtype=torch.int32)
    if kind != "asymmetric":
        zero_point = torch.zeros_like(zero_point)
    factors = torch.randn(shape[0], generator=generator, dtype=torch.float64).numpy()
    factors[: draw(st.integers(0, 1))] = 0
    return weight, (scale, zero_point, low, high), factors


@given(weights_and_grids())
def test_a_zero_is_the_zero_point_after_everything(case):
    weight, (scale, zero_point, low, high), factors = case
    channel_dim = 0 if scale.ndim else None
    grid = Grid(scale=scale, zero_point=zero_point, quant_min=low, quant_max=high, channel_dim=channel_dim)
    made = DequantizedWeight(weight, grid)
    stored = QuantizedWeight(made.integers.numpy(), made.scale.numpy(), made.zero_point.numpy(), made.axis, "w")
    forms = [(stored, (weight == 0).numpy())]
    scaled = stored.scaled(factors, 0)
    if scaled is not None:
        forms.append((scaled, (weight == 0).numpy()))
    forms += [(form.transposed((1, 0)), zero.T) for form, zero in forms]
    forms += [(form.split([1, form.integers.shape[0] - 1], 0)[0], zero[:1]) for form, zero in forms]
    for form, zero in forms:
        shape = [1, 1]
        if form.axis is not None:
            shape[form.axis] = -1
        middle = np.broadcast_to(form.zero_point.reshape(shape), form.integers.shape)
        assert (form.integers[zero] == middle[zero]).all()
