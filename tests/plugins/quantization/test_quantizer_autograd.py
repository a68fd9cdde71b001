"""Quantizers in graphs of derivatives."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.plugins.quantization.quantizer_reference import Reference


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
