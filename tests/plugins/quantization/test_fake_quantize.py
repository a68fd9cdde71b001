"""Fake-quantizers against NumPy in float64, written down from the formulas that NNCF 2.16 computes."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_core import UsageError
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.plugins.quantization.quantizer_reference import Reference, inputs, is_tuned


def has_one_zero_point(low, width, n):
    """Tells whether the zero point is not so near to the middle between two integers that the dtype decides."""
    low, high = min(low, 0.0), max(low + width, 0.0)
    position = -low * n / (high - low)
    return abs(position - np.floor(position) - 0.5) > 1e-5


@st.composite
def quantizers(draw, mode=None):
    """A quantizer of one range, and its reference."""
    mode = draw(st.sampled_from(["symmetric", "asymmetric"])) if mode is None else mode
    half_range = draw(st.booleans())
    bits = draw(st.integers(3 if half_range else 2, 8))
    size = draw(st.floats(1e-3, 1e3)) * draw(st.sampled_from([1.0, -1.0]))
    if mode == "symmetric":
        narrow, signed = draw(st.booleans()), draw(st.booleans())
        if bits - half_range == 2 and narrow and not signed:
            narrow = False
        module = SymmetricFakeQuantize((1,), bits, signed=signed, narrow_range=narrow, half_range=half_range)
        module.double()
        module.scale.data.fill_(size)
        return module, Reference.symmetric(size, *module.levels())
    module = AsymmetricFakeQuantize((1,), bits, half_range=half_range).double()
    low = draw(st.floats(-1.5, 0.5)) * abs(size)
    assume(is_tuned(low, abs(size), module.levels()[1]))
    assume(has_one_zero_point(low, abs(size), module.levels()[1]))
    module.input_low.data.fill_(low)
    module.input_range.data.fill_(size)
    return module, Reference.asymmetric(low, size, module.levels()[1])


class TestLevels:
    @pytest.mark.parametrize(
        ("settings_", "expected"),
        [
            ({"bits": 8, "signed": True}, (-128, 127)),
            ({"bits": 8, "signed": True, "narrow_range": True}, (-127, 127)),
            ({"bits": 8}, (0, 255)),
            ({"bits": 8, "narrow_range": True}, (0, 254)),
            ({"bits": 8, "signed": True, "half_range": True}, (-64, 63)),
            ({"bits": 4, "signed": True}, (-8, 7)),
            ({"bits": 2, "signed": True, "narrow_range": True}, (-1, 1)),
            ({"bits": 2}, (0, 3)),
        ],
    )
    def test_of_symmetric_quantizers(self, settings_, expected):
        assert SymmetricFakeQuantize((1,), **settings_).levels() == expected

    @pytest.mark.parametrize(
        ("settings_", "expected"),
        [({}, (0, 255)), ({"narrow_range": True}, (0, 255)), ({"half_range": True}, (0, 127)), ({"bits": 4}, (0, 15))],
    )
    def test_of_asymmetric_quantizers(self, settings_, expected):
        assert AsymmetricFakeQuantize((1,), **settings_).levels() == expected

    @pytest.mark.parametrize("bits", [1, 17, 0, -1])
    def test_impossible_bits_are_refused(self, bits):
        with pytest.raises(UsageError, match=f"bits: {bits}"):
            SymmetricFakeQuantize((1,), bits)


class TestValues:
    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def test_equal_the_formulas_in_float64(self, data):
        module, reference = data.draw(quantizers())
        x = inputs(data.draw, reference, np.float64)
        expected = reference.values(x)
        found = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * reference.width)

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_equal_the_formulas_in_float32(self, data):
        module, reference = data.draw(quantizers())
        x = inputs(data.draw, reference, np.float32)
        found = module.float()(torch.from_numpy(x)).detach().numpy()
        expected = reference.values(x.astype(np.float64))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * reference.width)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_exact_ties_go_to_the_even_integer(self, dtype):
        module = SymmetricFakeQuantize((1,), 4, signed=True)
        module.scale.data.fill_(7 * 0.25)  # steps of 1/4: everything here is exact, also in bfloat16
        ties = torch.tensor([-1.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875, 1.125], dtype=dtype)
        expected = torch.tensor([-8, -2, -2, 0, 0, 2, 2, 4, 4], dtype=dtype) / 4
        assert torch.equal(module(ties), expected)
        assert module(ties).dtype == dtype

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_values_of_the_grid_stay_and_zero_stays_zero(self, data):
        module, reference = data.draw(quantizers())
        module = module.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
        dtype = next(module.parameters()).dtype
        x = torch.from_numpy(inputs(data.draw, reference, np.float64)).to(dtype)
        once = module(x)
        assert torch.equal(module(once), once)
        assert not module(torch.zeros(3, dtype=dtype)).any()

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_are_those_that_the_grid_stands_for(self, data):
        module, reference = data.draw(quantizers())
        module = module.float()
        x = torch.from_numpy(inputs(data.draw, reference, np.float32))
        grid, found = module.grid(), module(x).detach()
        assert torch.equal(grid.values(grid.integers(x)), found)
        assert torch.equal(grid.integers(found), grid.integers(x))

    @pytest.mark.parametrize(("low", "width"), [(-0.3, 6.0), (-5.6, 6.0), (-1.0, 6.0)])
    def test_ends_near_zero_keep_to_the_nearest_value(self, low, width):
        module = AsymmetricFakeQuantize((1,), 2).double()
        module.input_low.data.fill_(low)
        module.input_range.data.fill_(width)
        grid = module.grid()
        step, zero_point = width / 3, int(grid.zero_point)
        values = (np.arange(4) - zero_point) * step
        x = np.linspace(-8, 8, 1001)
        nearest = values[np.argmin(abs(x[:, None] - values[None]), axis=1)]
        clear = np.sort(abs(x[:, None] - values[None]), axis=1)
        clear = clear[:, 1] - clear[:, 0] > 1e-9
        found = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(found[clear], nearest[clear], atol=1e-12)

    def test_each_channel_has_its_own_grid(self):
        torch.manual_seed(0)
        x = torch.randn(5, 7, 3, 3, dtype=torch.float64)
        for dim, shape in ((0, (5, 1, 1, 1)), (1, (1, 7, 1, 1))):
            module = SymmetricFakeQuantize(shape, 4, signed=True).double()
            module.scale.data.copy_(torch.rand(shape, dtype=torch.float64) + 0.1)
            found = module(x).detach().movedim(dim, 0).numpy()
            for row, out, scale in zip(x.movedim(dim, 0).numpy(), found, module.scale.flatten().tolist(), strict=True):
                np.testing.assert_allclose(out, Reference.symmetric(scale, -8, 7).values(row), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("module", [SymmetricFakeQuantize((1,), 8, signed=True), AsymmetricFakeQuantize((1,), 8)])
    def test_not_a_number_stays_visible(self, module):
        assert module(torch.tensor([float("nan"), 0.5])).isnan().tolist() == [True, False]

    def test_infinities_saturate(self):
        module = SymmetricFakeQuantize((1,), 8, signed=True)
        found = module(torch.tensor([float("inf"), -float("inf")])).tolist()
        assert found == pytest.approx([1.0, -128 / 127], rel=1e-6)


class TestGradients:
    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_equal_the_formulas(self, data):
        module, reference = data.draw(quantizers())
        x = inputs(data.draw, reference, np.float64)
        x = x[abs(x) < 1e20]
        grad = np.random.default_rng(0).normal(size=x.shape)
        tensor = torch.from_numpy(x).requires_grad_()
        module(tensor).backward(torch.from_numpy(grad))
        grad_x, grad_width, grad_low = reference.gradients(x, grad)
        np.testing.assert_allclose(tensor.grad.numpy(), grad_x, rtol=0, atol=0)
        parameter = module.scale if isinstance(module, SymmetricFakeQuantize) else module.input_range
        # The scale's gradient has the sign of the parameter, because S = |scale|.
        assert parameter.grad.item() == pytest.approx(grad_width * np.sign(parameter.item()), rel=1e-9, abs=1e-9)
        if isinstance(module, AsymmetricFakeQuantize):
            assert module.input_low.grad.item() == pytest.approx(grad_low, rel=1e-9, abs=1e-9)

    def test_from_one_byte_are_accurate(self):
        torch.manual_seed(0)
        x = torch.randn(2_000_000).requires_grad_()
        module = SymmetricFakeQuantize((1,), 8, signed=True)
        module.scale.data.fill_(2.0)
        grad = torch.randn(x.shape) + 0.1
        module(x).backward(grad)
        reference = Reference.symmetric(2.0, *module.levels())
        _, expected, _ = reference.gradients(x.detach().double().numpy(), grad.double().numpy())
        assert module.scale.grad.item() == pytest.approx(expected, rel=5e-3)

    def test_of_saturated_values_are_derivatives(self):
        module = SymmetricFakeQuantize((1,), 8, signed=True).double()
        x = torch.tensor([3.0, 5.0, -4.0], dtype=torch.float64)
        weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        (module(x) * weights).sum().backward()
        with torch.no_grad():
            values = []
            for scale in (1 + 1e-6, 1 - 1e-6):
                module.scale.fill_(scale)
                values.append((module(x) * weights).sum().item())
        assert module.scale.grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)

    def test_ends_of_the_grid_count_as_inside(self):
        module = SymmetricFakeQuantize((1,), 8, signed=True)
        for scale in (0.1, 0.37, 1.0, 3.3):
            module.scale.data.fill_(scale)
            ends = module(torch.tensor([-100.0, 100.0])).detach().requires_grad_()
            module(ends).sum().backward()
            assert ends.grad.tolist() == [1, 1]

    @pytest.mark.parametrize("shape", [(64,), (4, 8, 40, 40)])
    def test_multiplier_is_for_the_range_alone(self, shape):
        torch.manual_seed(0)
        grads = []
        x = torch.randn(shape)
        for multiplier in (1.0, 3.0):
            module = AsymmetricFakeQuantize((1,))
            module.lr_multiplier = multiplier
            tensor = x.clone().requires_grad_()
            module(tensor).square().sum().backward()
            grads.append((tensor.grad, module.input_low.grad, module.input_range.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        for index in (1, 2):
            torch.testing.assert_close(3 * grads[0][index], grads[1][index])

    def test_frozen_ranges_get_none(self):
        module = SymmetricFakeQuantize((1,)).requires_grad_(False)
        x = torch.rand(20000, requires_grad=True)
        module(x).sum().backward()
        assert module.scale.grad is None
        assert x.grad.sum() == 20000

    def test_logarithmic_scale_has_the_chain_rule(self):
        x = torch.randn(1000, dtype=torch.float64)
        linear = SymmetricFakeQuantize((1,), signed=True).double()
        logarithmic = SymmetricFakeQuantize((1,), signed=True, logarithm_scale=True).double()
        linear.scale.data.fill_(0.7)
        logarithmic.load_state_dict(linear.state_dict())
        for module in (linear, logarithmic):
            module(x).square().sum().backward()
        assert logarithmic.scale.item() == pytest.approx(np.log(0.7))
        assert logarithmic.scale.grad.item() == pytest.approx(0.7 * linear.scale.grad.item(), rel=1e-9)
