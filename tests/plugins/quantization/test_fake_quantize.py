"""Fake-quantizers against NumPy in float64, written down from the formulas that NNCF 2.16 computes."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from compress_core import DataError, UsageError
from compress_core.transforms import ACTIVATION_FUNCTIONS
from compress_quantization import kernels
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize

EPS = 1e-16


def tuned(low, width, n):
    """Moves a range so that zero is on its grid."""
    high = low + width
    low, high = min(low, 0.0), max(high, 0.0)
    zero_point = np.round(-low * n / (high - low))
    first = (zero_point / (zero_point - n) * high, high) if zero_point < n else (low, high)
    second = (low, (zero_point - n) / zero_point * low) if zero_point > 0 else (low, high)
    low, high = first if first[1] - first[0] > second[1] - second[0] else second
    return low, high - low


def has_one_zero_point(low, width, n):
    """Tells whether the zero point is not so near to the middle between two integers that the dtype decides."""
    low, high = min(low, 0.0), max(low + width, 0.0)
    position = -low * n / (high - low)
    return abs(position - np.floor(position) - 0.5) > 1e-5


def is_tuned(low, width, n):
    """Tells whether zero is a multiple of the step away from the low end; see the test of the nearest value."""
    low, width = tuned(low, width, n)
    return abs(low / width * n - np.round(low / width * n)) < 1e-6


class Reference:
    """One grid in float64: values and gradients."""

    def __init__(self, low, width, n, slope_below):
        self.low, self.width, self.n, self.slope_below = low, width, n, slope_below
        self.s = n / width

    @classmethod
    def symmetric(cls, scale, smallest, largest):
        scale = abs(scale) + EPS
        low = scale * smallest / largest
        return cls(low, scale - low, largest - smallest, smallest / largest)

    @classmethod
    def asymmetric(cls, low, width, n):
        return cls(*tuned(low, abs(width) + EPS, n), n, 0.0)

    def values(self, x):
        clipped = np.clip(x, self.low, self.low + self.width)
        return np.round((clipped - self.low) * self.s - np.round(-self.low * self.s)) / self.s

    def gradients(self, x, grad):
        """Returns what x, the width (the scale) and the low end get."""
        below, above = x < self.low, x > self.low + self.width
        inside = ~below & ~above
        error = (self.values(x) - x) / self.width
        return (
            grad * inside,
            (grad * (error * inside + self.slope_below * below + above)).sum(),
            (grad * (below | above)).sum(),
        )

    def clear_of_ties(self, x, margin):
        """Tells where x is not within `margin` steps of the middle between two grid values, or of an end."""
        position = (x - self.low) * self.s
        ends = np.minimum(abs(position), abs(position - self.n))
        return (abs(position - np.floor(position) - 0.5) > margin) & (ends > margin)


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
    assume(is_tuned(low, abs(size) + EPS, module.levels()[1]))
    assume(has_one_zero_point(low, abs(size) + EPS, module.levels()[1]))
    module.input_low.data.fill_(low)
    module.input_range.data.fill_(size)
    return module, Reference.asymmetric(low, size, module.levels()[1])


def inputs(draw, reference, dtype):
    """Values in and around the range, with the awkward ones among them; none so near to a tie that rounding decides."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = generator.uniform(-1.5, 1.5, 200) * (reference.width + abs(reference.low))
    x = np.concatenate([x, [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(dtype)
    clear = reference.clear_of_ties(x.astype(np.float64), 1e-9 if dtype == np.float64 else 1e-3)
    return x[clear | (abs(x) < 1e-20)]


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


class TestFusedActivation:
    @pytest.mark.parametrize("activation", list(ACTIVATION_FUNCTIONS))
    @pytest.mark.parametrize("size", [100, 50_000])
    @pytest.mark.parametrize("limit", [1.0, 5.0, 20.0])
    @pytest.mark.parametrize("kind", ["unsigned", "signed", "asymmetric", "channels"])
    def test_equals_the_two_steps(self, kind, limit, size, activation):
        torch.manual_seed(0)
        values = torch.cat([torch.randn(size - 4) * 5, torch.tensor([0.0, -0.0, 6.0, 2.5])]).reshape(1, 4, -1)
        module = {
            "unsigned": SymmetricFakeQuantize((1,)),
            "signed": SymmetricFakeQuantize((1,), signed=True),
            "asymmetric": AsymmetricFakeQuantize((1,)),
            "channels": SymmetricFakeQuantize((1, 4, 1)),
        }[kind]
        module.set_range(torch.tensor(-limit if kind == "asymmetric" else 0.0), torch.tensor(limit))
        grad, results = torch.randn(values.shape), []
        for fused in (True, False):
            x = values.clone().requires_grad_()
            module.zero_grad()
            out = module.fused(x, activation) if fused else module(ACTIVATION_FUNCTIONS[activation](x))
            out.backward(grad)
            results.append((out.detach(), x.grad, [p.grad for p in module.parameters()]))
        if activation in {"relu", "relu6"}:
            assert torch.equal(results[0][0], results[1][0])
            assert torch.equal(results[0][1], results[1][1])
        else:  # compilers round functions otherwise: rarely, that is at the middle of two values or at an end
            step = module.step_low_high()[0].max().item()
            torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1.001 * step)
            assert (results[0][0] != results[1][0]).float().mean() < 1e-4
            assert ((results[0][1] - results[1][1]).abs() > 1e-5).float().mean() < 1e-4
        for ours, expected in zip(results[0][2], results[1][2], strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("activation", list(ACTIVATION_FUNCTIONS))
    @pytest.mark.parametrize("size", [100, 50_000])
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    def test_derivatives_of_gradients_are_those_of_the_two_steps(self, cls, size, activation):
        torch.manual_seed(0)
        module = cls((1,), **({"signed": True} if cls is SymmetricFakeQuantize else {})).double()
        module.set_range(torch.tensor(-1.0), torch.tensor(1.5))
        values, weight = torch.randn(2, size, dtype=torch.float64)
        results = []
        for fused in (True, False):
            x, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
            out = module.fused(x, activation) if fused else module(ACTIVATION_FUNCTIONS[activation](x))
            first = torch.autograd.grad((out * w).sum(), [x, *module.parameters()], create_graph=True)
            loss = first[0].square().sum() + sum(grad.sum() for grad in first[1:])
            results.append([*first, *torch.autograd.grad(loss, [x, w], allow_unused=True, materialize_grads=True)])
        assert results[1][-2].any() == (activation not in {"relu", "relu6"})
        for ours, expected in zip(*results, strict=True):
            # Codes of clipping functions hold rounding errors in 1/240 of a step.
            torch.testing.assert_close(ours, expected, rtol=5e-3, atol=5e-3 / 255)

    @pytest.mark.parametrize("activation", list(ACTIVATION_FUNCTIONS))
    @pytest.mark.parametrize("size", [100, 50_000])
    @pytest.mark.parametrize("compiled", [True, False])
    def test_in_place(self, compiled, size, activation):
        torch.manual_seed(0)
        module = SymmetricFakeQuantize((1,), signed=activation == "hardswish")
        values, grad, results = torch.randn(size) * 3, torch.randn(size), []
        before = kernels.set_compiled(compiled)
        for in_place in (False, True):
            leaf = values.clone().requires_grad_()
            module.zero_grad()
            x = leaf * 1
            out = module.fused_in_place(x, activation) if in_place else module.fused(x, activation)
            out.backward(grad)
            results.append((out.detach(), leaf.grad, module.scale.grad.clone()))
        for left, right in zip(*results, strict=True):  # sums in another order
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        # Whoever goes on with x finds what the function has left, on the grid or not.
        torch.testing.assert_close(module(x.detach()), results[0][0])
        with torch.no_grad():
            x = values.clone()
            assert torch.equal(module.fused_in_place(x, activation), results[1][0])
            torch.testing.assert_close(module(x), results[0][0])
        kernels.set_compiled(before)

    @pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.view(-1), lambda x: x[:5]])
    def test_in_place_in_a_view(self, make):
        module, base = SymmetricFakeQuantize((1,)), torch.randn(10, 400)
        part = base.clone().requires_grad_() * 1
        out = module.fused_in_place(make(part), "relu")
        assert torch.equal(out, module.fused(make(base), "relu"))
        assert torch.equal(make(part), F.relu(make(base)))

    @pytest.mark.parametrize("size", [100, 50_000])
    @pytest.mark.parametrize("compiled", [True, False])
    def test_relu_does_not_need_what_it_was_given(self, compiled, size):
        # As in `x += branch(relu(x))`, which torch allows.
        module, values = SymmetricFakeQuantize((1,)), torch.randn(size)
        before = kernels.set_compiled(compiled)
        leaf = values.clone().requires_grad_()
        x = leaf * 1
        out = module.fused(x, "relu")
        x += 5
        out.sum().backward()
        kernels.set_compiled(before)
        assert torch.equal(leaf.grad, ((values > 0) & (values <= 1)).float())

    @pytest.mark.parametrize("activation", list(ACTIVATION_FUNCTIONS))
    @pytest.mark.parametrize("size", [100, 50_000])
    def test_of_tensors_from_inference_mode(self, size, activation):
        with torch.inference_mode():
            x = torch.randn(size)
        module = SymmetricFakeQuantize((1,))
        module.fused(x, activation).sum().backward()
        assert module.scale.grad is not None

    def test_observer_sees_the_clipped_tensor(self):
        module, seen = SymmetricFakeQuantize((1,)), []
        module.observer = seen.append
        x = torch.tensor([-1.0, 3.3, 9.0])
        assert module.fused(x, "relu6").tolist() == pytest.approx([0, 3.3, 6])
        assert seen[0].tolist() == pytest.approx([0, 3.3, 6])

    def test_a_disabled_quantizer_clips_only(self):
        module = SymmetricFakeQuantize((1,))
        module.enabled = False
        assert module.fused(torch.tensor([-1.0, 3.3]), "relu").tolist() == pytest.approx([0, 3.3])


class TestSetRange:
    def set_to(self, module, low, high):
        module.set_range(torch.tensor(low).reshape(module.shape), torch.tensor(high).reshape(module.shape))
        return module

    def test_symmetric_takes_the_larger_side_and_a_floor_of_a_tenth(self):
        module = self.set_to(SymmetricFakeQuantize((4, 1)), [-2.0, 0.0, -0.01, 0.1], [1.0, 3.0, 0.02, 0.1])
        assert module.scale.flatten().tolist() == pytest.approx([2.0, 3.0, 0.1, 0.1])

    def test_asymmetric_widens_narrow_channels(self):
        low, high = np.array([-1.0, 0.2, -3.0]), np.array([1.0, 0.201, 5.0])
        module = self.set_to(AsymmetricFakeQuantize((3, 1)), low, high)
        width = high - low
        slack = (np.clip(width, 0.01 * width.max(), width.max()) - width) / 2
        np.testing.assert_allclose(module.input_range.detach().flatten(), width + 2 * slack, rtol=1e-6)
        np.testing.assert_allclose(module.input_low.detach().flatten(), low - slack, rtol=1e-6)

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-20, 1e30])
    def test_constant_tensors_give_a_usable_grid(self, cls, value):
        module = self.set_to(cls((1,), signed=True), value, value)
        found = module(torch.tensor([value])).item()
        assert found == pytest.approx(value, rel=0.01, abs=1e-3)
        assert all(torch.isfinite(bound).all() for bound in module.step_low_high())

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
    def test_values_that_are_not_finite_are_refused(self, cls, bad):
        module = cls((1,))
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(DataError, match=r"not finite.*check"):
            self.set_to(module, min(bad, -1.0) if bad < 0 else -1.0, bad if not bad < 0 else 1.0)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    def test_swapped_ends_are_refused(self):
        with pytest.raises(DataError, match="swapped"):
            self.set_to(SymmetricFakeQuantize((1,)), 1.0, -1.0)

    @given(st.floats(-100, 100), st.floats(0, 100), st.integers(2, 8))
    @settings(max_examples=200, deadline=None)
    def test_zero_is_always_on_the_grid_of_an_asymmetric_range(self, low, width, bits):
        module = AsymmetricFakeQuantize((1,), bits)
        module.input_low.data.fill_(low)
        module.input_range.data.fill_(width)
        grid = module.grid()
        assert 0 <= grid.zero_point.item() <= 2**bits - 1
        if width < 1e-3:
            return
        n = 2**bits - 1
        low, width = (parameter.item() for parameter in (module.input_low, module.input_range))
        expected_low, expected_width = tuned(low, width + EPS, n)
        assert grid.scale.item() == pytest.approx(expected_width / n, rel=1e-4)
        if is_tuned(low, width + EPS, n):
            assert module.range()[0].item() == pytest.approx(expected_low, rel=1e-4, abs=1e-4 * expected_width)


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [300, 30_000])
    def test_half_precision_computes_in_float32(self, dtype, size):
        torch.manual_seed(0)
        module = SymmetricFakeQuantize((1,), signed=True)
        x = torch.randn(size).to(dtype).requires_grad_()
        out = module(x)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == dtype
        assert module.scale.grad.dtype == torch.float32
        assert torch.equal(out.detach(), module(x.detach().float()).detach().to(dtype))

    @pytest.mark.parametrize("shape", [(1,), (1, 8, 1, 1)])
    def test_memory_format_is_kept(self, shape):
        x = torch.randn(4, 8, 20, 20).to(memory_format=torch.channels_last).requires_grad_()
        module = SymmetricFakeQuantize(shape, signed=True)
        out = module(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        plain = module(x.detach().contiguous())
        assert torch.equal(out.detach(), plain.detach())
        out.backward(torch.ones(4, 8, 20, 20))
        assert torch.equal(x.grad, ((x.detach() >= -128 / 127) & (x.detach() <= 1)).float())

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x[:, ::2],
            lambda x: x.transpose(0, 3),
            lambda x: x[:, :, :20].permute(0, 3, 2, 1),
            lambda x: x.expand(3, -1, -1, -1, -1),
            lambda x: x[0, 0, 0, 0],
            lambda x: x[:0],
            lambda x: x[:, :, :1],
        ],
    )
    def test_any_strides(self, make):
        torch.manual_seed(0)
        x = torch.randn(2, 8, 30, 30)
        module = SymmetricFakeQuantize((1,), signed=True)
        view = make(x).detach().requires_grad_()
        out = module(view)
        out.sum().backward()
        assert out.shape == view.shape
        assert torch.equal(out.detach(), module(make(x).clone(memory_format=torch.contiguous_format)).detach())
        # As torch's own functions of elements have it: a view of a transposed result that works must go on working.
        assert out.stride() == torch.relu(make(x)).stride()
        expected = (view.detach() >= -128 / 127) & (view.detach() <= 1)
        assert torch.equal(view.grad, expected.float())

    @pytest.mark.parametrize("x", [torch.arange(5), torch.tensor([True, False]), torch.zeros(2, dtype=torch.complex64)])
    def test_what_is_not_floating_point_passes(self, x):
        assert SymmetricFakeQuantize((1,))(x) is x

    def test_a_wrong_number_of_channels_is_refused(self):
        with pytest.raises(UsageError, match=r"\(1, 3, 1, 1\).*\(2, 4, 5, 5\)"):
            SymmetricFakeQuantize((1, 3, 1, 1))(torch.zeros(2, 4, 5, 5))

    def test_a_disabled_quantizer_returns_what_it_is_given(self):
        module, x = SymmetricFakeQuantize((1,)), torch.randn(3)
        module.enabled = False
        assert module(x) is x

    @torch.no_grad()
    def test_what_a_disabled_quantizer_owns_stays_as_it_is(self):
        module, x = SymmetricFakeQuantize((1,)), torch.randn(3)
        module.enabled, kept = False, x.clone()
        assert torch.equal(module.forward_owned(x), kept)
        integers = torch.arange(5)
        module.enabled = True
        assert module.forward_owned(integers) is integers

    def test_an_observed_quantizer_returns_what_it_is_given(self):
        module, x, seen = SymmetricFakeQuantize((1,)), torch.randn(3), []
        module.observer = seen.append
        assert module(x) is x
        assert seen == [x]


class TestModules:
    @pytest.fixture(params=["symmetric", "asymmetric", "logarithmic"])
    def module(self, request):
        cls = AsymmetricFakeQuantize if request.param == "asymmetric" else SymmetricFakeQuantize
        module = cls((3, 1), signed=True, logarithm_scale=request.param == "logarithmic")
        module.set_range(torch.tensor([[-1.0], [-2.0], [-0.5]]), torch.tensor([[1.1], [3.3], [0.7]]))
        return module

    def test_survive_pickle_copy_and_state_dict(self, module):
        module.observer = lambda tensor: None  # a closure, which cannot be pickled
        x = torch.randn(3, 50)
        restored = type(module)((3, 1), signed=True, logarithm_scale=module.logarithm_scale)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        restored.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), restored]
        assert all(other.observer is None for other in copies)
        module.observer = None
        for other in copies:
            assert torch.equal(other(x), module(x))
            assert str(other) == str(module)

    def test_logarithmic_state_is_linear(self):
        module = SymmetricFakeQuantize((1,), logarithm_scale=True)
        module.set_range(torch.tensor(0.0), torch.tensor(2.5))
        assert module.scale.item() == pytest.approx(np.log(2.5))
        assert module.state_dict()["scale"].item() == pytest.approx(2.5)

    def test_state_dict_of_another_shape_is_refused(self, module):
        with pytest.raises(RuntimeError, match="size mismatch"):
            module.load_state_dict({key: value[:2] for key, value in module.state_dict().items()})


class TestAutograd:
    SIZES = pytest.mark.parametrize("size", [64, 20_000], ids=["small", "large"])

    @SIZES
    def test_one_quantizer_used_twice(self, size):
        torch.manual_seed(0)
        module = SymmetricFakeQuantize((1,), signed=True)
        first, second = torch.randn(size), torch.randn(size)
        (module(first) + 2 * module(second)).sum().backward()
        together = module.scale.grad.clone()
        module.zero_grad()
        module(first).sum().backward()
        (2 * module(second)).sum().backward()
        torch.testing.assert_close(together, module.scale.grad)

    @SIZES
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, size, reentrant):
        torch.manual_seed(0)
        layer, module = nn.Linear(8, 8), SymmetricFakeQuantize((1,))
        x = torch.randn(size // 8, 8)

        def gradients(run):
            module.zero_grad()
            tensor = x.clone().requires_grad_()
            run(lambda t: module.fused(layer(t), "relu"), tensor).square().sum().backward()
            return tensor.grad, module.scale.grad.clone()

        plain = gradients(lambda function, tensor: function(tensor))
        again = gradients(lambda function, tensor: checkpoint(function, tensor, use_reentrant=reentrant))
        assert all(torch.equal(left, right) for left, right in zip(plain, again, strict=True))

    @SIZES
    @pytest.mark.parametrize("fused", [True, False])
    def test_output_may_be_changed_in_place(self, size, fused):
        torch.manual_seed(0)
        module = SymmetricFakeQuantize((1,), signed=True)
        x = torch.randn(size, requires_grad=True)
        out = module.fused(x, "relu") if fused else module(x)
        out += x
        out.sum().backward()
        inside = ((x.detach() > 0) if fused else (x.detach() >= -128 / 127)) & (x.detach() <= 1)
        assert torch.equal(x.grad, 1 + inside.float())

    @SIZES
    def test_output_is_not_a_view(self, size):
        out = SymmetricFakeQuantize((1,))(torch.randn(size, requires_grad=True))
        assert not out._is_view()

    @SIZES
    def test_modes_without_gradients_give_the_same_values(self, size):
        torch.manual_seed(0)
        module, x = SymmetricFakeQuantize((1,), signed=True), torch.randn(size)
        expected = module(x).detach()
        with torch.no_grad():
            assert torch.equal(module(x), expected)
            assert not module(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(module(x), expected)
            inference = torch.randn(size)
        assert torch.equal(module(inference.clone()), module(inference.clone()))

    @SIZES
    @pytest.mark.parametrize("grad_enabled", [True, False])
    def test_forward_mode_derivatives_are_those_of_backward_mode(self, size, grad_enabled):
        torch.manual_seed(0)
        module = AsymmetricFakeQuantize((1,)).double()
        module.set_range(torch.tensor(-0.7), torch.tensor(1.1))
        x, tangent = (torch.randn(size, dtype=torch.float64) for _ in range(2))
        weight = torch.randn(size, dtype=torch.float64)
        inputs = (x.clone().requires_grad_(), module.input_low, module.input_range)
        gradients = torch.autograd.grad((module(inputs[0]) * weight).sum(), inputs)
        tangents = (tangent, torch.tensor([0.3]).double(), torch.tensor([-0.2]).double())
        expected = sum((gradient * along).sum() for gradient, along in zip(gradients, tangents, strict=True))
        parameters = {"input_low": tangents[1], "input_range": tangents[2]}
        with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(getattr(module, name), along) for name, along in parameters.items()}
            out = torch.func.functional_call(module, duals, (forward_ad.make_dual(x, tangent),))
            found = (forward_ad.unpack_dual(out).tangent * weight).sum()
        # Codes of one byte round the error to 1/240.
        assert torch.allclose(found, expected, rtol=1e-3)

    @SIZES
    def test_derivatives_of_gradients_are_those_of_the_surrogate(self, size):
        torch.manual_seed(0)
        module = SymmetricFakeQuantize((1,), signed=True).double()
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(size, dtype=torch.float64, requires_grad=True)
        grad_x, grad_scale = torch.autograd.grad((module(x) * weight).sum(), [x, module.scale], create_graph=True)
        inside = ((x >= -128 / 127) & (x <= 1)).double().detach()
        assert torch.equal(torch.autograd.grad(grad_x.sum(), weight, retain_graph=True)[0], inside)
        slope = torch.autograd.grad(grad_scale.sum(), weight)[0]
        reference = Reference.symmetric(1.0, *module.levels())
        points = x.detach().numpy()
        expected = [reference.gradients(points[i : i + 1], np.ones(1))[1] for i in range(30)]
        np.testing.assert_allclose(slope[:30].numpy(), expected, atol=5e-5)
