"""Edits an exported graph: adds constants and dequantized weights, and removes nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from compress_quantization.export.weights import Array, QuantizedWeight, constant


class GraphEditor:
    """Adds constants and dequantized constants to a graph.

    Args:
        graph: An `onnx_ir.Graph`.
    """

    def __init__(self, graph: Any) -> None:
        import onnx_ir  # noqa: PLC0415 - an extra

        self.ir = onnx_ir
        self.graph = graph
        outputs = (value.name for node in graph for value in node.outputs)
        self.opset = graph.opset_imports[""]
        self._taken = {*outputs, *graph.initializers, *(value.name for value in graph.inputs)}

    def nodes(self, *operators: str) -> Iterator[Any]:
        """Yields the nodes of these operators; the graph may be changed during the iteration."""
        for node in list(self.graph):
            if node.op_type in operators and node.domain == "":
                yield node

    def add_constant(self, name: str, values: Array) -> Any:
        """Returns an initializer with these values; reuses an existing one if a layer is called several times."""
        known = constant(self.graph.initializers.get(name))
        if known is not None and known.dtype == values.dtype and np.array_equal(known, values):
            return self.graph.initializers[name]
        unique = self._unique(name)
        tensor = self.ir.tensor(values, name=unique)
        value = self.ir.Value(
            name=unique, shape=self.ir.Shape(values.shape), type=self.ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.initializers[unique] = value
        return value

    def dequantize(self, weight: QuantizedWeight, before: Any) -> Any:
        """Returns the dequantized form of a weight, for the node `before`."""
        names = ["integers", "scale"]
        # The zero point of a bias is always 0, and the runtime fuses it without an explicit one.
        if weight.integers.dtype != np.int32:
            names.append("zero_point")
        inputs = [self.add_constant(f"{weight.name}.{name}", getattr(weight, name)) for name in names]
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        node = self.ir.node("DequantizeLinear", inputs, attributes, version=self.opset)
        output = node.outputs[0]
        output.name = self._unique(f"{weight.name}.dequantized")
        self.graph.insert_before(before, node)
        return output

    def dequantize_transposed(
        self, weight: QuantizedWeight, integers: Any, permutation: tuple[int, ...], before: Any
    ) -> Any:
        """Returns the dequantized form of the transposed integers of a weight, which are stored once.

        Runtimes transpose constants when they load a file, and still see a dequantized constant before the product.
        """
        transpose = self.ir.node("Transpose", [integers], {"perm": permutation}, version=self.opset)
        transpose.outputs[0].name = self._unique(f"{weight.name}.transposed")
        transpose.outputs[0].type = integers.type
        self.graph.insert_before(before, transpose)
        dequantize = before.inputs[0].producer()
        inputs = [transpose.outputs[0], *dequantize.inputs[1:]]
        attributes = {} if weight.axis is None else {"axis": permutation.index(weight.axis)}
        node = self.ir.node("DequantizeLinear", inputs, attributes, version=self.opset)
        node.outputs[0].name = self._unique(f"{weight.name}.dequantized")
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _unique(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique

    def remove(self, node: Any, replacement: Any) -> None:
        """Removes a node; readers of its first output then read `replacement`, which gets the name of the output."""
        name = node.outputs[0].name
        if node.outputs[0].is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(node.outputs[0])] = replacement
        node.outputs[0].replace_all_uses_with(replacement)
        node.outputs[0].name = None
        self.graph.remove(node, safe=True)
        replacement.name = name


def output_axis(node: Any, weight: QuantizedWeight) -> int | None:
    """Returns the dimension of a weight with the output's channels (dimension 1 of the output), or None."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    if node.op_type == "Gemm":
        plain = node.attributes.get_float("alpha", 1.0) == 1 == node.attributes.get_float("beta", 1.0)
        return (0 if node.attributes.get_int("transB", 0) else 1) if plain else None
    return 1 if weight.integers.ndim == 2 and _rank(node.outputs[0]) == 2 else None  # MatMul


def _rank(value: Any) -> int | None:
    return None if value.shape is None else len(value.shape)
