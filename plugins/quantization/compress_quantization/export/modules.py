"""Modules that replace quantizers during an export: they emit ONNX's quantize and dequantize operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress_quantization.grid import Grid
from compress_quantization.kernels.formulas import LARGEST_HALF, representable

OPSET = 21  # the usual version of the operator set
OLDEST_OPSET = 18  # what torch writes; the core converts to older ones


def _emit(operator: str, inputs: list[torch.Tensor], axis: int | None, dtype: torch.dtype, opset: int) -> torch.Tensor:
    attributes: dict[str, Any] = {}
    if axis is not None:
        attributes["axis"] = axis
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=opset)


class DequantizedWeight(nn.Module):
    """Replaces a quantized weight by its integers and a dequantize operator.

    Attributes:
        integers: int8 (int16 for grids of more than 8 bits), the weight's shape.
        scale: float32, shape () or (channels,).
        zero_point: Of the dtype of the integers and the shape of the scale.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, weight: torch.Tensor, grid: Grid, opset: int = OPSET) -> None:
        """Computes the integers of a weight.

        Args:
            weight: The values, on the grid or to be rounded to it.
            grid: The grid.
            opset: Version of the operator set.
        """
        super().__init__()
        self.opset = opset
        dtype = torch.int8 if grid.quant_max - grid.quant_min < 2**8 else torch.int16
        # Unsigned and asymmetric grids begin at 0. Shifted by half of their levels they fit a signed type, and only
        # then are the integers of a half-range grid small enough for 16-bit accumulators.
        shift = 0 if grid.quant_min < 0 else -((grid.quant_max + 1) // 2)
        self.register_buffer("integers", (grid.integers(weight) + shift).to(dtype))
        self.register_buffer("scale", grid.scale.detach().float().clone())
        self.register_buffer("zero_point", (grid.zero_point + shift).to(dtype))
        self.axis = grid.channel_dim
        self.dtype = weight.dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight in the exported graph; the stored `weight` is ignored."""
        values = _emit(
            "DequantizeLinear", [self.integers, self.scale, self.zero_point], self.axis, torch.float32, self.opset
        )
        return values.to(self.dtype)


class QuantizeDequantize(nn.Module):
    """Replaces the quantizer of an activation by quantize and dequantize operators.

    Integers are unsigned for every grid, because ONNX Runtime has no fast kernels for signed ones on x86. A signed grid
    is shifted, so that 128 represents zero; unless the runtime demands that integers of 0 represent zero. If a grid
    does not use all integers of the type, the tensor is first clipped to the ends of the grid.

    Attributes:
        scale: float32, shape () or (channels,).
        zero_point: uint8 (uint16 for grids of more than 8 bits), the shape of the scale; int8 if it has to be 0.
        low: Lower end of the grid, float32, of a shape that broadcasts to the tensor's.
        high: Upper end of the grid, like `low`.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, grid: Grid, shape: tuple[int, ...], opset: int = OPSET, *, is_centered: bool = False) -> None:
        """Computes the constants of the operators from the grid of a quantizer.

        Args:
            grid: The grid; its `channel_dim` is a dimension of `shape`.
            shape: Shape of the quantizer's range, which broadcasts against the tensor.
            opset: Version of the operator set.
            is_centered: Whether signed grids of up to 8 bits become int8 with a zero point of 0.
        """
        super().__init__()
        self.opset = opset
        levels = grid.quant_max - grid.quant_min + 1
        dtype = torch.uint8 if levels <= 2**8 else torch.uint16
        if is_centered and grid.quant_min < 0 and levels <= 2**8:
            dtype = torch.int8
        smallest, largest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        # Signed grids of fewer levels are shifted as far as full ones, because runtimes expect 128 as the middle.
        shift = 0 if grid.quant_min == 0 or smallest < 0 else (largest + 1) // 2
        scale, zero_point = grid.scale.detach().float(), grid.zero_point
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", (zero_point + shift).to(dtype))
        self.register_buffer("low", ((grid.quant_min - zero_point) * scale).reshape(shape if scale.ndim else ()))
        self.register_buffer("high", ((grid.quant_max - zero_point) * scale).reshape(shape if scale.ndim else ()))
        self.overflows_half = max(float(self.low.abs().max()), float(self.high.abs().max())) > LARGEST_HALF
        self.is_narrow = grid.quant_min + shift > smallest or grid.quant_max + shift < largest
        self.dtype = dtype
        self.channel_dim = None if grid.channel_dim is None else grid.channel_dim - len(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the activation in the exported graph."""
        if not x.is_floating_point():
            return x
        axis = None if self.channel_dim is None else self.channel_dim + x.ndim
        values = x.float()
        if self.is_narrow:
            values = self._clipped(values)
        constants = [self.scale, self.zero_point]
        integers = _emit("QuantizeLinear", [values, *constants], axis, self.dtype, self.opset)
        result = _emit("DequantizeLinear", [integers, *constants], axis, torch.float32, self.opset)
        return (representable(result, x.dtype) if self.overflows_half else result).to(x.dtype)

    def _clipped(self, x: torch.Tensor) -> torch.Tensor:
        if self.channel_dim is None:
            return _emit("Clip", [x, self.low, self.high], None, torch.float32, self.opset)
        return torch.minimum(torch.maximum(x, self.low), self.high)
