"""Quantizers as modules: their ranges, the tensors that they take, and what is saved."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import DataError, UsageError
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.plugins.quantization.quantizer_reference import is_tuned, tuned


class TestSetRange:
    def set_to(self, module, low, high):
        module.set_range(torch.tensor(low).reshape(module.shape), torch.tensor(high).reshape(module.shape))
        return module

    def test_symmetric_takes_the_larger_side(self):
        module = self.set_to(SymmetricFakeQuantize((4, 1)), [-2.0, 0.0, -0.01, 1e-9], [1.0, 3.0, 0.02, 1e-9])
        assert module.scale.flatten().tolist() == pytest.approx([2.0, 3.0, 0.02, 1e-9], rel=1e-6)

    def test_asymmetric_takes_both_ends(self):
        low, high = np.array([-1.0, 0.2, -3e-6]), np.array([1.0, 0.201, 5e-6])
        module = self.set_to(AsymmetricFakeQuantize((3, 1)), low, high)
        np.testing.assert_allclose(module.input_range.detach().flatten(), high - low, rtol=1e-4)
        np.testing.assert_allclose(module.input_low.detach().flatten(), low, rtol=1e-6)

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-20, 1e30])
    def test_constant_tensors_give_a_usable_grid(self, cls, value):
        module = self.set_to(cls((1,), signed=True), value, value)
        found = module(torch.tensor([value])).item()
        assert found == pytest.approx(value, rel=1e-6)
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
        expected_low, expected_width = tuned(low, width, n)
        assert grid.scale.item() == pytest.approx(expected_width / n, rel=1e-4)
        if is_tuned(low, width, n):
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
