"""Fake-quantization in operators that compilers, exporters and tensor subclasses follow."""

from __future__ import annotations

import torch

from compress_core.torch_internals import is_forward_mode
from compress_core.transforms import ACTIVATION_FUNCTIONS
from compress_quantization.kernels import formulas
from compress_quantization.kernels.formulas import Activation, StepLowHigh
from compress_quantization.kernels.task import Task


def fake_quantize(
    x: torch.Tensor, learned: torch.Tensor, offset: torch.Tensor | None, ranges: StepLowHigh, task: Task
) -> torch.Tensor:
    """Returns `x` on the grid, with the values and the gradients of the kernels.

    Args:
        x: Floating-point tensor.
        learned: Gets `drange` times its sign.
        offset: Gets `dlow`; None for a symmetric range.
        ranges: `step`, `low`, `high`, without a graph, of a shape that broadcasts against `x`.
        task: What is done.
    """
    step, low, high = ranges
    value = _activate(x.to(step.dtype), task.activation)
    clipped = torch.clamp(value, low, high)
    result = formulas.representable(torch.round(clipped.detach() / step) * step, x.dtype)
    if torch.is_grad_enabled() or is_forward_mode():
        factors = formulas.factors_of(task.levels, task.activation, task.offset)
        _, of_range = formulas.derivatives_from_input(value.detach(), ranges, factors, task.offset)
        # Each term is zero: the values stay on the grid exactly, and autograd sees the straight-through gradients.
        result = result + (clipped - clipped.detach())
        result = result + _zero(learned, learned.detach().sign() * task.multiplier).reshape(step.shape) * of_range[0]
        if offset is not None:
            result = result + _zero(offset, task.multiplier).reshape(step.shape) * of_range[1]
    return result.to(x.dtype)


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    # Not `formulas.activate`: the gradients of ReLUs and of the clamps there differ at the ends.
    return x if activation is None else ACTIVATION_FUNCTIONS[activation](x)


def _zero(parameter: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    return (parameter - parameter.detach()) * slope
