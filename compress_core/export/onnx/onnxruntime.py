"""What files for ONNX Runtime need so that its integer kernels reach as far as the numbers allow."""

from __future__ import annotations

from typing import Any

import numpy as np

# Operators whose results are elements of their first input; what they read must be on one grid for the whole tensor.
_SELECTING = frozenset(
    ["DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "MaxPool", "Pad", "Reshape"]
    + ["Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"]
)
_EIGHT_BITS = ("INT8", "UINT8")


def repeat_grids(graph: Any) -> None:
    """Quantizes again what is selected, moved or repeated of a quantized tensor, on the same grid: no value changes.

    ONNX Runtime computes a layer with integers only if a DequantizeLinear stands directly before it. It moves one that
    has a single reader behind a max pooling or a reshape by itself; where a skip connection reads the tensor as well
    (U-Nets), and behind other operators, it does not, and the layer behind them would be computed in float.

    Args:
        graph: An `onnx_ir.Graph`; it is changed.
    """
    for node in list(graph):
        if node.op_type not in _SELECTING or node.domain or not _selects(node):
            continue
        grid = node.inputs[0].producer()
        if not _is_grid_of_whole_tensor(grid):
            continue
        for result in node.outputs:
            readers = [reader.op_type for reader, _ in result.uses()]
            if readers and set(readers) != {"QuantizeLinear"} and not result.is_graph_output():
                _repeat(graph, node, result, grid)


def _selects(node: Any) -> bool:
    """Returns whether every value of the results is one of the first input, or 0."""
    if node.inputs[0] is None:
        return False
    if node.op_type == "Resize":
        return bool(node.attributes.get_string("mode", "nearest") == "nearest")
    if node.op_type == "Pad":
        padding = node.inputs[2] if len(node.inputs) > 2 else None
        is_constant = node.attributes.get_string("mode", "constant") == "constant"
        return not is_constant or padding is None or _is_zero(padding)
    # The second result of a max pooling are indices.
    return node.op_type != "MaxPool" or len(node.outputs) == 1


def _is_zero(value: Any) -> bool:
    return value.const_value is not None and not np.any(value.const_value.numpy())


def _is_grid_of_whole_tensor(node: Any) -> bool:
    """Returns whether a node makes numbers of 8-bit integers with one scale, and 0 of one of these integers."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or None in node.inputs:
        return False
    scale, zero_point = (value.const_value for value in node.inputs[1:3])
    return scale is not None and zero_point is not None and scale.size == 1 and zero_point.dtype.name in _EIGHT_BITS


def _repeat(graph: Any, node: Any, result: Any, grid: Any) -> None:
    import onnx_ir  # noqa: PLC0415 - an extra

    scale, zero_point = grid.inputs[1:3]
    name = f"{node.name}.{result.name}" if len(node.outputs) > 1 else node.name
    quantized = onnx_ir.node("QuantizeLinear", [result, scale, zero_point], name=f"{name}.quantized")
    integers = quantized.outputs[0]
    integers.name, integers.shape = f"{result.name}.integers", result.shape
    integers.type = onnx_ir.TensorType(zero_point.const_value.dtype)
    dequantized = onnx_ir.node("DequantizeLinear", [integers, scale, zero_point], name=f"{name}.dequantized")
    again = dequantized.outputs[0]
    again.name, again.shape, again.type = f"{result.name}.again", result.shape, result.type
    result.replace_all_uses_with(again)
    quantized.replace_input_with(0, result)
    graph.insert_after(node, [quantized, dequantized])
