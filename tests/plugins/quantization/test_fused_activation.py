"""Activation functions that quantizers take over."""

import pytest
import torch
import torch.nn.functional as F

from compress_core.transforms import ACTIVATION_FUNCTIONS
from compress_quantization import kernels
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize


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
