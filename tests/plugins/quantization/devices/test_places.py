"""Where quantizers stand for each runtime, and what the grids there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.transforms import activation_transforms
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.onnx_helpers import Wired, norm
from tests.placement_helpers import places, plan
from tests.plugins.quantization.devices.device_nets import IMAGES, NETS, NEW_DEVICES, batch, conv, quantized

# The names of the quantizers of activations, shortened: each stands at the output of what it names.
EXPECTED = {
    "onnxruntime-cpu": {
        "conv_relu": "input 0 relu#0 relu#1",
        "conv_silu": "input 0 bn silu#0 b silu#0|GATE",
        "relu6": "input 0 relu6#0 b",
        "residual": "input 0 relu#0 relu#1 n2 relu#2 pool",
        "downsample": "input 0 relu#0 n2 n3 relu#1 last",
        "depthwise": "input 0 relu6#0 relu6#1 p",
        "squeeze": "input 0 relu#0 pool relu#1 f2 sigmoid#0 mul#0 b",
        "concat": "input 0 relu#0 c",
        "linear_head": "input 0 relu#0",
        "attention": "ln q k softmax#0 v matmul#1 gelu#0",
        "layernorm": "input 0 d ln gelu#0",
        "upsample": "input 0 relu#0 interpolate#0 b",
        "bilinear": "input 0 relu#0 interpolate#0 b",
        "transposed": "relu#0 b",
    },
    "openvino-cpu": {
        "conv_relu": "input 0 relu#0 relu#1",
        "conv_silu": "input 0 silu#0",
        "relu6": "input 0 relu6#0",
        "residual": "input 0 relu#0 relu#1 n2 relu#2 pool",
        "downsample": "input 0 relu#0 n2 n3 relu#1",
        "depthwise": "input 0 relu6#0 relu6#1",
        "squeeze": "input 0 relu#0 pool relu#1 sigmoid#0 mul#0",
        "concat": "input 0 relu#0",
        "linear_head": "input 0 relu#0",
        "attention": "ln q k softmax#0 v matmul#1 gelu#0",
        "layernorm": "input 0 ln gelu#0",
        "upsample": "input 0 relu#0 interpolate#0",
        "bilinear": "input 0 interpolate#0",
        "transposed": "input 0 relu#0",
    },
    "tensorrt": {
        "conv_relu": "input 0 relu#0 relu#1",
        "conv_silu": "input 0 silu#0",
        "relu6": "input 0 relu6#0",
        "residual": "input 0 relu#0 relu#1 relu#2 pool",
        "downsample": "input 0 relu#0 n3 relu#1",
        "depthwise": "input 0 relu6#0 relu6#1",
        "squeeze": "input 0 relu#0 pool relu#1 sigmoid#0 mul#0",
        "concat": "input 0 relu#0",
        "linear_head": "input 0 relu#0",
        "attention": "ln q k softmax#0 v matmul#1 gelu#0",
        "layernorm": "input 0 ln gelu#0",
        "upsample": "input 0 interpolate#0",
        "bilinear": "input 0 interpolate#0",
        "transposed": "input 0 relu#0",
    },
    "xnnpack": {
        "conv_relu": "input 0 relu#0 relu#1 fc",
        "conv_silu": "input 0 bn silu#0 b",
        "relu6": "input 0 relu6#0 b",
        "residual": "input 0 relu#0 relu#1 n2 relu#2 pool fc",
        "downsample": "input 0 relu#0 n2 n3 relu#1 last",
        "depthwise": "input 0 relu6#0 relu6#1 p",
        "squeeze": "input 0 relu#0 pool relu#1 f2 sigmoid#0 mul#0 b",
        "concat": "input 0 relu#0 c",
        "linear_head": "input 0 relu#0 b",
        "attention": "ln q k v matmul#1 o gelu#0 fc",
        "layernorm": "input 0 d ln a gelu#0 b",
        "upsample": "input 0 relu#0 interpolate#0 b",
        "bilinear": "input 0 relu#0 interpolate#0 b",
        "transposed": "input 0 relu#0 b",
    },
}


def shortened(name: str) -> str:
    for part in ("|OUTPUT", "model/", "torch.Tensor.", "torch."):
        name = name.replace(part, "")
    return name.replace(" input ", "<")


@pytest.mark.parametrize("device", NEW_DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_exact_places(name, device):
    net = NETS[name][0]().eval()
    found = plan(net, batch(name, 2), device=device).quantizers
    activations = [q.name for q in found if q.group == "activations"]
    assert " ".join(shortened(q) for q in activations) == EXPECTED[device][name]
    # ONNX Runtime has no integer kernel for transposed convolutions.
    kinds = (nn.Conv2d, nn.Linear) if device == "onnxruntime-cpu" else (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    layers = {f"{at}|WEIGHT" for at, layer in net.named_modules() if isinstance(layer, kinds)}
    assert {q.name for q in found if q.group == "weights"} == layers


@pytest.mark.parametrize("device", NEW_DEVICES)
@pytest.mark.parametrize("name", ["squeeze", "attention"])
def test_grids(name, device):
    controller, _ = quantized(name, device)
    for quantizer in controller.non_weight_quantizers.values():
        check_grid_of_activation(quantizer, device)
    for quantizer in controller.weight_quantizers.values():
        grid = quantizer.grid()
        assert isinstance(quantizer, SymmetricFakeQuantize)
        assert not grid.zero_point.any()
        ends = {"tensorrt": (-128, 127), "xnnpack": (-127, 127)}.get(device, (-64, 63))
        assert (grid.quant_min, grid.quant_max) == ends
        assert grid.channel_dim == 0


def check_grid_of_activation(quantizer, device):
    grid = quantizer.grid()
    assert grid.scale.ndim == 0 or device == "openvino-cpu"
    if device == "tensorrt":
        assert (grid.quant_min, grid.quant_max, int(grid.zero_point)) == (-128, 127, 0)
    elif device == "xnnpack":
        assert isinstance(quantizer, AsymmetricFakeQuantize)
        assert (grid.quant_min, grid.quant_max) == (0, 255)
        assert 0 <= int(grid.zero_point) <= 255
        assert float(grid.scale) >= 2**-12
    else:
        assert (grid.quant_min, grid.quant_max) in {(0, 255), (-128, 127)}
        assert not grid.zero_point.any()


@pytest.mark.parametrize("device", NEW_DEVICES)
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
@pytest.mark.parametrize("fold", [False, True])
def test_nothing_stands_between_a_convolution_its_batch_norm_and_a_fused_activation(device, activation, fold):
    def forward(m, x):
        x = m.a(x)
        return m.b(activation(m.n(x) if fold else x))

    net = Wired(forward, a=conv(), n=norm(8), b=conv()).eval()
    inside = {"a: output", "n: output", "n: input 0"}
    assert inside.isdisjoint(
        place for found in places(plan(net, torch.ones(2, *IMAGES), device=device)) for place in found
    )


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("device", ["onnxruntime-cpu", "openvino-cpu"])
def test_parts_of_a_concatenation_keep_their_grids_if_only_some_come_from_a_fused_relu(device, pooled):
    # ONNX Runtime fuses a ReLU only if the grid behind it begins at 0, and concatenates integers of several scales.
    def net(first, second):
        def forward(m, x):
            left = first(m.a(x))
            left = F.max_pool2d(left, 3, 1, 1) if pooled else left
            return m.c(torch.cat([left, second(m.b(x))], 1))

        return Wired(forward, a=conv(), b=conv(), c=conv(16, 8)).eval()

    def sharing(first, second):
        found = places(plan(net(first, second), torch.ones(2, *IMAGES), device=device))
        return max(len(at) for at in found) > 1

    identity = torch.nn.Identity()
    assert sharing(F.relu, F.relu)
    assert sharing(identity, identity)
    assert sharing(F.silu, F.silu)
    assert sharing(F.relu, identity) == sharing(identity, F.relu6) == (device == "openvino-cpu")
    # A part that is itself put together of both kinds is of the second one.
    assert sharing(lambda x: torch.cat([F.relu(x), x], 1)[:, 4:12], identity)


def test_the_shortcut_of_a_fused_addition_has_the_quantizer_whatever_its_side():
    def block(swap):
        def forward(m, x):
            h = F.relu(m.a(x))
            out = m.n(m.b(h))
            return m.c(F.relu(h + out if swap else out + h))

        return Wired(forward, a=conv(), b=conv(), n=norm(8), c=conv()).eval()

    for swap in (False, True):
        found = places(plan(block(swap), torch.ones(2, *IMAGES), device="tensorrt"))
        assert found == [
            ["model: input 0"],
            ["model: torch.nn.functional.relu#0 output"],
            ["model: torch.nn.functional.relu#1 output"],
        ]


def test_an_operand_with_another_reader_is_not_fused():
    def forward(m, x):
        out = m.a(x)
        return m.c(F.relu(out + F.relu(m.b(out))))

    net = Wired(forward, a=conv(), b=conv(), c=conv()).eval()
    assert ["a: output"] in places(plan(net, torch.ones(2, *IMAGES), device="tensorrt"))


@pytest.mark.parametrize("device", ["onnxruntime-cpu", "xnnpack"])
def test_an_output_of_the_model_is_quantized_where_an_integer_kernel_needs_it(device):
    net = Wired(lambda m, x: m.a(x), a=conv()).eval()
    example = torch.ones(2, *IMAGES)
    assert places(plan(net, example, device=device)) == [["model: input 0"], ["a: output"]]
    # Whoever says otherwise is obeyed.
    assert places(plan(net, example, device=device, quantize_outputs=False)) == [["model: input 0"]]
    assert places(plan(net, example, device=device, activations={"ignored_scopes": ["a|OUTPUT"]})) == [
        ["model: input 0"]
    ]


@pytest.mark.parametrize("device", ["onnxruntime-cpu", "xnnpack"])
def test_without_a_quantized_weight_there_is_no_quantizer_at_the_output(device):
    net = Wired(lambda m, x: m.b(F.silu(m.a(x))), a=conv(), b=conv()).eval()
    options = {"weights": {"ignored_scopes": ["a"]}}
    found = places(plan(net, torch.ones(2, *IMAGES), device=device, **options))
    assert ["a: output"] not in found
    assert ["b: output"] in found


@pytest.mark.parametrize("device", NEW_DEVICES)
def test_an_addition_that_stays_in_floating_point_gets_no_quantizers(device):
    net = Wired(lambda m, x: m.ln(x + 2 * x.flip(1)) + m.a(x), ln=nn.LayerNorm(16), a=nn.Linear(16, 16)).eval()
    output = [["a: output"]] if device == "xnnpack" else []
    at_input = [["a: torch.nn.functional.linear#0 input 0"]]
    assert places(plan(net, torch.ones(2, 16), device=device)) == at_input + output


@pytest.mark.parametrize("device", NEW_DEVICES)
def test_a_state_gives_the_same_structure_and_values_again(device):
    controller, model = quantized("squeeze", device)
    state, weights = controller.get_compression_state(), model.state_dict()
    resumed, again = quantized("squeeze", device, state=state)
    again.load_state_dict(weights)
    x = torch.randn(2, *IMAGES)
    assert torch.equal(model(x), again(x))
    assert {n: repr(q) for n, q in resumed.all_quantizations.items()} == {
        n: repr(q) for n, q in controller.all_quantizations.items()
    }
    expected = model(x)
    assert torch.allclose(controller.strip()(x), expected, atol=1e-5)
    assert resumed.get_compression_state() == state
    assert any(True for _ in activation_transforms(again))
