"""Fake-quantizers on a device, with compiled kernels where it has a compiler, against those of the CPU without one."""

from __future__ import annotations

import copy

import pytest
import torch

from compress_quantization import kernels
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize

pytestmark = pytest.mark.cuda
KINDS = {
    "small": ((1,), (20, 100), torch.contiguous_format),
    "tensor": ((1,), (20, 1000), torch.contiguous_format),
    "rows": ((20, 1, 1), (20, 10, 101), torch.contiguous_format),
    "planes": ((1, 8, 1, 1), (5, 8, 25, 25), torch.contiguous_format),
    "columns": ((1, 8, 1, 1), (5, 8, 25, 25), torch.channels_last),
}


def results(module, x, activation):
    module.zero_grad()
    tensor = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(tensor) if activation is None else module.fused(tensor, activation)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    out.backward(gradient)
    return [
        value.detach().cpu() for value in (out, tensor.grad, *(parameter.grad for parameter in module.parameters()))
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, cls, activation, dtype, device):
    shape, size, memory_format = KINDS[kind]
    torch.manual_seed(1)
    module = cls(shape, bits=8, **({"signed": True} if cls is SymmetricFakeQuantize else {}))
    low = -torch.rand(shape) - 0.1
    module.set_range(low, low + 2)
    x = (torch.randn(size) * 3).to(dtype).contiguous(memory_format=memory_format)
    before = kernels.set_compiled(False)
    try:
        expected = results(module, x, activation)
        # A CPU is given compiled kernels by tests of their own, which take minutes.
        kernels.set_compiled(before and device.type == "cuda")
        found = results(copy.deepcopy(module).to(device), x.to(device), activation)
    finally:
        kernels.set_compiled(before)
    step = module.step_low_high()[0].max().item()
    difference = (found[0].double() - expected[0].double()).abs()
    # Compilers for GPUs divide and multiply with other roundings: rarely, that is in the middle of two grid values.
    assert difference.max() <= 1.01 * step + 2 * torch.finfo(dtype).eps * expected[0].abs().max()
    assert (difference > 1e-2 * step + 2 * torch.finfo(dtype).eps * expected[0].abs().max()).double().mean() < 1e-3
    assert ((found[1].double() - expected[1].double()).abs() > 1e-2).double().mean() < 1e-3
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        # Codes of one byte round the error of an element to 1/240 of a step: see kernels.formulas.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * (theirs.abs().max().item() or 1.0))
