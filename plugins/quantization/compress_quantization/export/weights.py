"""Quantized weights in an exported graph: finds them and transforms them exactly, as integers and scales."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in a graph, stored as integers; its values are (integers - zero_point) * scale.

    Attributes:
        integers: int8 or int16.
        scale: float32, shape () or (channels,).
        zero_point: Of the dtype of the integers and the shape of the scale.
        axis: Dimension of the channels; None for a single scale.
        name: Prefix of its names in the graph.
    """

    integers: Array
    scale: Array
    zero_point: Array
    axis: int | None
    name: str

    @classmethod
    def behind(cls, value: Any) -> QuantizedWeight | None:
        """Returns the weight whose dequantized form is `value` (an `onnx_ir.Value`), or None."""
        node = None if value is None else value.producer()
        if node is None or node.op_type != "DequantizeLinear" or value.is_graph_output():
            return None
        arrays = [constant(entry) for entry in node.inputs]
        if len(arrays) < 2 or arrays[0] is None or arrays[1] is None:
            return None
        integers, scale = arrays[0], arrays[1]
        zero_point = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.zeros(scale.shape, integers.dtype)
        axis = None if scale.ndim == 0 else int(node.attributes.get_int("axis", 1)) % integers.ndim
        return cls(integers, scale, zero_point, axis, str(node.inputs[0].name).removesuffix(".integers"))

    def transposed(self, permutation: tuple[int, ...]) -> QuantizedWeight:
        """Returns the weight with its dimensions in another order."""
        axis = None if self.axis is None else permutation.index(self.axis)
        integers = np.ascontiguousarray(self.integers.transpose(permutation))
        return replace(self, integers=integers, axis=axis, name=f"{self.name}.transposed")

    def split(self, sizes: Sequence[int], dim: int) -> list[QuantizedWeight]:
        """Returns parts of the weight, of the given sizes along a dimension."""
        ends = list(itertools.accumulate(sizes))
        parts = []
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            integers = np.ascontiguousarray(self.integers.take(range(end - size, end), dim))
            part = replace(self, integers=integers, name=f"{self.name}.part_{number}")
            if self.axis == dim:
                scale, zero_point = (array[end - size : end].copy() for array in (self.scale, self.zero_point))
                part = replace(part, scale=scale, zero_point=zero_point)
            parts.append(part)
        return parts

    def scaled(self, factors: Array, axis: int) -> QuantizedWeight | None:
        """Returns the weight times a factor for each channel, exact except for the rounding of the scales.

        A negative factor mirrors the integers of a channel, a factor of zero makes them zero. A zero point of 0 stays;
        other zero points are mirrored as well, so that no integer leaves the range of the grid.

        Args:
            factors: float64, shape (channels,).
            axis: Dimension of the channels.

        Returns:
            None if the scales belong to another dimension, if a mirrored integer is out of range, or if a scale would
            become zero.
        """
        if self.axis not in (None, axis) or factors.shape != (self.integers.shape[axis],):
            return None
        scale = np.broadcast_to(self.scale, factors.shape).astype(np.float64)
        zero_point = np.broadcast_to(self.zero_point, factors.shape)
        # A channel of zeros keeps its scale, because scales have to be positive.
        scales = np.where(factors == 0, scale, scale * np.abs(factors)).astype(np.float32)
        if not (np.isfinite(scales).all() and (scales >= np.finfo(np.float32).tiny).all()):
            return None
        shape = [1] * self.integers.ndim
        shape[axis] = -1
        wide = zero_point.astype(np.int64)
        middle, signs = wide.reshape(shape), np.sign(factors).astype(np.int64)
        # -1 - q has the same range as q; -q does not, but keeps zero in place.
        middles = np.where((signs < 0) & (wide != 0), -1 - wide, wide)
        integers = middles.reshape(shape) + signs.reshape(shape) * (self.integers.astype(np.int64) - middle)
        limits = np.iinfo(self.integers.dtype)
        if integers.min(initial=0) < limits.min or integers.max(initial=0) > limits.max:
            return None
        return replace(
            self,
            integers=integers.astype(self.integers.dtype),
            scale=scales,
            zero_point=middles.astype(self.zero_point.dtype),
            axis=axis,
            name=f"{self.name}.folded",
        )


def constant(value: Any) -> Array | None:
    """Returns the array of an initializer (an `onnx_ir.Value`); None for other values and for absent inputs."""
    if value is None or value.const_value is None:
        return None
    array: Array = value.const_value.numpy()
    return array
