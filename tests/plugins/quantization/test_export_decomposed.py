"""Graphs for ExecuTorch, before they are lowered: what is rewritten computes the same in torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("executorch")

from compress_core import ExportError, create_compressed_model
from compress_core.export.executorch.program import graph_of, rewritten
from compress_core.export.executorch.silence import import_executorch
from compress_core.export.inputs import Inputs
from compress_quantization.export import prepare_decomposed, rewrite_program
from compress_quantization.export.decomposed import DecomposedActivation, DecomposedWeight
from compress_quantization.export.fx import IntegerWeight, is_dequantize
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.onnx_helpers import Wired, norm


@pytest.fixture(scope="module", autouse=True)
def operators():
    import_executorch()


def graphs(model, x, **section):
    """(graph as exported, rewritten graph, fake-quantized model)."""
    document = {
        "target_device": "TRIAL",
        "compression": {
            "algorithm": "quantization",
            "overflow_fix": "disable",
            "quantize_outputs": True,
            "activations": {"per_channel": False, **section.pop("activations", {})},
            **section,
        },
    }
    controller, _ = create_compressed_model(model.eval(), document, init_loader=[x])
    prepared = copy.deepcopy(controller.model)
    prepare_decomposed(prepared)
    module = graph_of(prepared, Inputs((x,), {}, len(x)), largest_batch=None)
    changed = copy.deepcopy(module)
    rewritten(changed, [rewrite_program])
    changed.graph.lint()
    return module, changed, controller.model


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_the_operators_compute_what_the_quantizer_does(mode, bits, signed):
    quantizer = SymmetricFakeQuantize((1,), bits) if mode == "symmetric" else AsymmetricFakeQuantize((1,), bits)
    quantizer.signed = signed
    quantizer.set_range(torch.tensor(-1.3 if signed else 0.0), torch.tensor(2.1))
    x = torch.linspace(-4, 4, 4001)
    made, expected = DecomposedActivation(quantizer)(x), quantizer(x)
    # Where the quotient is halfway between two integers, the operators' multiplication may round the other way.
    apart = made != expected
    assert apart.float().mean() < 1e-3
    assert ((made - expected).abs() <= 1.001 * quantizer.grid().scale).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), st.integers(0, 1000), st.booleans())
def test_scaled_weights_are_the_weight_times_the_factors(factors, seed, per_channel):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-127, 128, (3, 2, 2), dtype=torch.int8, generator=generator)
    scale = torch.rand(3, generator=generator) + 0.01 if per_channel else torch.tensor(0.3)
    weight = IntegerWeight(integers, scale, 0 if per_channel else None, "w")
    given_factors = torch.tensor(factors, dtype=torch.float64)
    scaled = weight.scaled(given_factors, 0)
    if scaled is None:  # a scale that float32 cannot hold
        assert any(0 < abs(factor) < 1e-30 for factor in factors)
        return
    torch.testing.assert_close(
        scaled.values().double(), weight.values().double() * given_factors.view(3, 1, 1), rtol=1e-6, atol=0
    )


def test_a_mirrored_lowest_integer_is_not_folded():
    weight = IntegerWeight(torch.tensor([[-128]], dtype=torch.int8), torch.tensor([0.1]), 0, "w")
    assert weight.scaled(torch.tensor([-1.0], dtype=torch.float64), 0) is None
    assert weight.scaled(torch.tensor([2.0], dtype=torch.float64), 0) is not None


MOVES = {
    "pool": lambda y: F.max_pool2d(y, 2).flatten(1),
    "transpose": lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1),
    "slice": lambda y: y[:, 1:, ::2].flatten(1),
    "pad": lambda y: F.pad(y, (1, 1)).flatten(1),
    "split": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1).flatten(1),
    "relu6": lambda y: F.relu6(y).flatten(1),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("bits", [8, 4])
def test_moves_are_exact_and_leave_integers_in_front_of_layers(move, bits):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    first, moved = nn.Conv2d(3, 4, 3), MOVES[move]
    width = moved(torch.relu(first(x))).shape[1]
    net = Wired(lambda s, x: s.last(moved(torch.relu(s.first(x)))), first=first, last=nn.Linear(width, 5))
    before, after, _ = graphs(net, x, activations={"bits": bits})
    assert torch.equal(before(x), after(x))
    layers = [
        n for n in after.graph.nodes if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    ]
    assert len(layers) == 2
    for layer in layers:
        assert is_dequantize(layer.args[0]) and IntegerWeight.behind(after, layer.args[1]) is not None


def test_batch_norms_become_part_of_the_integers():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net = Wired(
        lambda s, x: s.n3(s.last(torch.relu(s.n2(s.mid(torch.relu(s.n1(s.first(x)))))).flatten(1))),
        first=nn.Conv2d(3, 8, 3, bias=False),
        n1=norm(8),
        mid=nn.ConvTranspose2d(8, 4, 2),
        n2=norm(4),
        last=nn.Linear(4 * 49, 6),
        n3=norm(6, nn.BatchNorm1d),
    )
    before, after, model = graphs(net, x)
    assert not [n for n in after.graph.nodes if "batch_norm" in str(n.target)]
    weights = [w for n in after.graph.nodes if (w := IntegerWeight.behind(after, n)) is not None]
    assert len(weights) == 3
    difference = (before(x) - after(x)).abs()
    assert difference.mean() < 1e-3 * before(x).abs().mean()
    with torch.no_grad():
        assert (model(x) - after(x)).abs().mean() < 1e-2 * model(x).abs().mean()


def test_a_layer_whose_output_is_not_quantized_reads_floats_of_the_same_values():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    net = Wired(lambda s, x: torch.sigmoid(s.layer(x)), layer=nn.Linear(8, 4))
    before, after, _ = graphs(net, x)
    assert torch.equal(before(x), after(x))
    assert not [n for n in after.graph.nodes if IntegerWeight.behind(after, n) is not None]


@pytest.mark.parametrize("cls", [DecomposedActivation, lambda quantizer: DecomposedWeight(torch.ones(3), quantizer)])
def test_more_than_eight_bits_are_refused(cls):
    quantizer = SymmetricFakeQuantize((1,), 12)
    quantizer.label = "the place"
    with pytest.raises(ExportError, match="quantizer 'the place': ExecuTorch's XNNPACK has no integers of 12 bits"):
        cls(quantizer)


def test_unused_floats_of_quantized_weights_are_not_kept():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    _, after, _ = graphs(Wired(lambda s, x: torch.relu(s.layer(x)), layer=nn.Linear(8, 64)), x)
    large = [tensor for tensor in [*after.parameters(), *after.buffers()] if tensor.numel() >= 8 * 64]
    assert [tensor.dtype for tensor in large] == [torch.int8]
