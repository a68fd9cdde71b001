"""ONNX files of networks of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from tests.onnx_helpers import Wired, create, norm
from tests.plugins.quantization.export_helpers import agrees, relative
from tests.zoo import images, tokens

pytestmark = pytest.mark.usefixtures("fast_exporter")


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
