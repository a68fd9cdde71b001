"""What runtimes demand of grids holds after calibration, training steps, and loading."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import StateError
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.quantizer_config import QuantizerSpec
from tests.plugins.quantization.devices.device_nets import IMAGES, batch, quantized

SMALLEST = 2.0**-12


def trained(model, name="downsample", steps=3, rate=0.5):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(name)).square().mean().backward()
        optimizer.step()
    model.eval()


def test_tensorrt_has_signed_grids_around_zero_whatever_happens():
    controller, model = quantized("downsample", "tensorrt")
    trained(model)
    state, weights = controller.get_compression_state(), model.state_dict()
    resumed, again = quantized("downsample", "tensorrt", state=state)
    again.load_state_dict(weights)
    for one in (controller, resumed):
        one.init_range("weights")
        for quantizer in one.all_quantizations.values():
            grid = quantizer.grid()
            assert (grid.quant_min, grid.quant_max) == (-128, 127)
            assert not grid.zero_point.any()


def test_xnnpack_keeps_to_the_smallest_scale_when_an_optimizer_goes_below():
    controller, model = quantized("downsample", "xnnpack")
    with torch.no_grad():
        for quantizer in controller.non_weight_quantizers.values():
            quantizer.input_low.mul_(1e-6)
            quantizer.input_range.mul_(1e-6)
    trained(model, steps=2, rate=1e-6)
    for quantizer in controller.non_weight_quantizers.values():
        assert float(quantizer.grid().scale) >= SMALLEST
        assert quantizer.input_range.detach().abs().item() < SMALLEST * 255
    for quantizer in controller.weight_quantizers.values():
        assert (quantizer.grid().quant_min, quantizer.grid().quant_max) == (-127, 127)
        assert quantizer.grid().integers(torch.randn(quantizer.shape) * 1e9).abs().max() == 127
    # What is computed is on the raised grid, and stripping does not change it.
    x = torch.randn(2, *IMAGES)
    assert torch.allclose(controller.strip()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
@pytest.mark.parametrize("logarithm_scale", [False, True])
def test_a_scale_below_the_smallest_grows_again(cls, logarithm_scale):
    quantizer = cls((1,), smallest_scale=SMALLEST, logarithm_scale=logarithm_scale)
    quantizer.set_range(torch.zeros(1), torch.tensor([1e-4]))
    assert math.isclose(float(quantizer.grid().scale), SMALLEST, rel_tol=1e-6)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.02)
    x = torch.full((64,), 3.0)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert float(quantizer.range()[1].detach()) > 1.0


widths = st.floats(1e-9, 10.0)


@settings(max_examples=60, deadline=None)
@given(
    cls=st.sampled_from([SymmetricFakeQuantize, AsymmetricFakeQuantize]), low=widths, high=widths, signed=st.booleans()
)
def test_the_grid_is_that_of_the_range_or_the_smallest_and_values_are_on_it(cls, low, high, signed):
    plain, raised = cls((1,), signed=signed), cls((1,), signed=signed, smallest_scale=SMALLEST)
    for quantizer in (plain, raised):
        quantizer.set_range(torch.tensor([-low]), torch.tensor([high]))
    expected, grid = plain.grid(), raised.grid()
    x = torch.linspace(-2 * low, 2 * high, 201)
    if float(expected.scale) >= SMALLEST * (1 + 1e-6):
        assert torch.equal(grid.scale, expected.scale)
        assert torch.equal(raised(x), plain(x))
    else:
        assert SMALLEST <= float(grid.scale) <= SMALLEST * (1 + 1e-6)
    assert int(grid.zero_point) == int(expected.zero_point)
    assert torch.equal(raised(x).detach(), grid.values(grid.integers(x)))


@settings(max_examples=30, deadline=None)
@given(learned=st.floats(1e-12, 1e-3), low=st.floats(-1e-3, 1e-3))
def test_learned_values_of_any_size_leave_the_scale_above_the_smallest(learned, low):
    quantizer = AsymmetricFakeQuantize((1,), smallest_scale=SMALLEST)
    with torch.no_grad():
        quantizer.input_low.fill_(low)
        quantizer.input_range.fill_(learned)
    x = torch.linspace(-0.1, 0.1, 301)
    grid = quantizer.grid()
    assert float(grid.scale) >= SMALLEST
    assert torch.equal(quantizer(x).detach(), grid.values(grid.integers(x)))


def test_gradients_at_the_smallest_scale_are_those_of_the_grid_that_is_computed_with():
    raised = SymmetricFakeQuantize((1,), smallest_scale=SMALLEST)
    there = SymmetricFakeQuantize((1,))
    with torch.no_grad():
        raised.scale.fill_(1e-9)
        there.scale.fill_(SMALLEST * 255)
    weights = torch.randn(500)
    found = []
    for quantizer in (raised, there):
        x = torch.linspace(-0.1, 0.2, 500, requires_grad=True)
        (quantizer(x) * weights).sum().backward()
        found.append((x.grad, quantizer.scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4)


def test_it_compiles_in_one_graph_and_computes_the_same():
    quantizer = AsymmetricFakeQuantize((1,), smallest_scale=SMALLEST)
    with torch.no_grad():
        quantizer.input_low.fill_(-1e-5)
        quantizer.input_range.fill_(1e-4)
    x = torch.linspace(-0.1, 0.1, 100)
    assert torch.equal(torch.compile(quantizer, backend="eager", fullgraph=True)(x), quantizer(x))


def test_states_from_before_have_no_smallest_scale_and_absurd_ones_are_refused():
    spec = QuantizerSpec(smallest_scale=SMALLEST)
    assert QuantizerSpec.from_dict(spec.to_dict()) == spec
    older = {key: value for key, value in spec.to_dict().items() if key != "smallest_scale"}
    assert QuantizerSpec.from_dict(older).smallest_scale == 0
    controller, _ = quantized("linear_head", "xnnpack")
    state = copy.deepcopy(controller.get_compression_state())
    text = json.dumps(state)
    assert text.count(str(SMALLEST)) == len(controller.non_weight_quantizers)
    with pytest.raises(StateError, match=r"spec\.smallest_scale: must be between 0 and 1, got 2"):
        quantized("linear_head", "xnnpack", state=json.loads(text.replace(str(SMALLEST), "2.0")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_have_the_same_grid(dtype):
    quantizer = SymmetricFakeQuantize((1,), smallest_scale=SMALLEST).to(dtype)
    with torch.no_grad():
        quantizer.scale.fill_(1e-9)
    x = torch.linspace(0, 0.1, 50).to(dtype)
    steps = quantizer(x).detach().double() / SMALLEST
    assert torch.allclose(steps, steps.round(), atol=0.51 if dtype == torch.bfloat16 else 1e-2)
    assert steps.max() <= 255 * (1 + 1e-2)
