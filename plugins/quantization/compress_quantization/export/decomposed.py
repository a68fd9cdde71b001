"""Modules that replace quantizers during an export for ExecuTorch: they call torch's quantize and dequantize operators.

The operators are those of `torch.ops.quantized_decomposed`, which XNNPACK's partitioner looks for. It takes int8 only,
so unsigned grids are shifted by 128, which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compress_core.errors import ExportError
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.grid import Grid

_LOWEST, _HIGHEST = -128, 127  # of int8
_SCALES = (2.0**-126, 2.0**127)  # normal numbers in float32, which XNNPACK demands
_REMEDY = '; create the model with "target_device": "xnnpack", whose grids ExecuTorch\'s kernels have'


def _operators() -> Any:
    return torch.ops.quantized_decomposed  # registered by executorch


def _refuse(quantizer: FakeQuantize, what: str) -> ExportError:
    name = getattr(quantizer, "label", "") or type(quantizer).__name__
    return ExportError(f"quantizer '{name}': ExecuTorch's XNNPACK has no {what}{_REMEDY}")


def _checked_grid(quantizer: FakeQuantize) -> Grid:
    grid = quantizer.grid()
    if grid.quant_max - grid.quant_min >= 2**8:
        raise _refuse(quantizer, f"integers of {quantizer.bits} bits")
    if not bool(((grid.scale >= _SCALES[0]) & (grid.scale <= _SCALES[1])).all()):
        raise _refuse(quantizer, f"scale of {float(grid.scale.min()):.3g}")
    return grid


class DecomposedWeight(nn.Module):
    """Replaces a quantized weight by its integers and a dequantize operator.

    Attributes:
        integers: int8, the weight's shape.
        scale: float32, shape () or (channels,).
        zero_point: int64 zeros, the shape of the scale.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, weight: torch.Tensor, quantizer: FakeQuantize) -> None:
        """Computes the integers of a weight.

        Args:
            weight: The values, on the grid or to be rounded to it.
            quantizer: The quantizer with the grid.

        Raises:
            ExportError: XNNPACK does not have such a grid.
        """
        super().__init__()
        grid = _checked_grid(quantizer)
        shift = 0 if grid.quant_min < 0 else _LOWEST
        zero_point = grid.zero_point + shift
        if bool((zero_point != 0).any()):
            raise _refuse(quantizer, "weights with a zero point other than 0 (asymmetric or unsigned ones)")
        self.register_buffer("integers", (grid.integers(weight) + shift).to(torch.int8))
        self.register_buffer("scale", grid.scale.detach().float().clone())
        self.register_buffer("zero_point", torch.zeros_like(zero_point, dtype=torch.int64))
        self.axis = grid.channel_dim
        self.step = float(grid.scale) if self.axis is None else 0.0  # a number, which the graph holds as such

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight, computed from the integers; of the stored `weight` only the dtype is used."""
        # Always the whole range of int8: XNNPACK takes per-channel integers in -8..7 for packed ones of 4 bits.
        levels = (_LOWEST, _HIGHEST, torch.int8)
        if self.axis is None:
            values = _operators().dequantize_per_tensor(self.integers, self.step, 0, *levels)
        else:
            values = _operators().dequantize_per_channel(self.integers, self.scale, self.zero_point, self.axis, *levels)
        result: torch.Tensor = values if values.dtype == weight.dtype else values.to(weight.dtype)
        return result


class DecomposedActivation(nn.Module):
    """Replaces the quantizer of an activation by quantize and dequantize operators.

    XNNPACK ignores limits of the operators: if a grid does not use all integers of int8, the tensor is first clipped to
    the ends of the grid.

    Attributes:
        scale: The step of the grid, exact in float32.
        zero_point: The int8 integer that represents 0.
        low: Lower end of the grid.
        high: Upper end of the grid.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        """Computes the constants of the operators from the grid of a quantizer.

        Raises:
            ExportError: XNNPACK does not have such a grid.
        """
        super().__init__()
        grid = _checked_grid(quantizer)
        if grid.channel_dim is not None:
            raise _refuse(quantizer, "activations with a scale for each channel")
        shift = 0 if grid.quant_min < 0 else _LOWEST
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point) + shift
        self.quant_min, self.quant_max = grid.quant_min + shift, grid.quant_max + shift
        self.low, self.high = ((level - self.zero_point) * self.scale for level in (self.quant_min, self.quant_max))
        self.is_narrow = (self.quant_min, self.quant_max) != (_LOWEST, _HIGHEST)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` on the grid, in its dtype."""
        if not x.is_floating_point():
            return x
        values = x if x.dtype == torch.float32 else x.float()
        if self.is_narrow:
            values = F.hardtanh(values, self.low, self.high)
        arguments = (self.scale, self.zero_point, self.quant_min, self.quant_max, torch.int8)
        integers = _operators().quantize_per_tensor(values, *arguments)
        result: torch.Tensor = _operators().dequantize_per_tensor(integers, *arguments)
        return result if result.dtype == x.dtype else result.to(x.dtype)
