"""Changes the floating-point types of an exported graph to float32, in which runtimes have all their operators."""

from __future__ import annotations

from typing import Any

import numpy as np

# Attributes that hold a type.
_TYPES = ("to", "dtype")


def compute_in_float32(graph: Any, *, with_double: bool) -> list[str]:
    """Replaces bfloat16 and float16 in a graph by float32, with its inputs, outputs and constants.

    ONNX Runtime has no operators for bfloat16 on CPUs and no integer kernels between float16. float32 represents all
    values of both.

    Args:
        graph: An `onnx_ir.Model`; it is changed.
        with_double: Whether to replace float64 as well; for models whose weights are float64. There are no convolutions
            and no quantizers for it.

    Returns:
        The names of the types that were replaced.
    """
    import onnx_ir  # noqa: PLC0415 - an extra

    ir = onnx_ir.DataType
    kinds = {ir.BFLOAT16: "bfloat16", ir.FLOAT16: "float16"} | ({ir.DOUBLE: "float64"} if with_double else {})
    found = set()
    nodes = list(graph.graph.all_nodes())
    constants = list(graph.graph.initializers.values())
    for value in [*graph.graph.inputs, *constants, *(value for node in nodes for value in node.outputs)]:
        if value.dtype in kinds:
            found.add(kinds[value.dtype])
            value.dtype = ir.FLOAT
    if not found:
        return []
    for value in constants:
        if value.const_value is not None and value.const_value.dtype in kinds:
            value.const_value = _float32(value.const_value)
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype in kinds:
                node.attributes[name] = onnx_ir.AttrTensor(name, _float32(attribute.value))
            elif name in _TYPES and attribute.type == onnx_ir.AttributeType.INT and attribute.value in kinds:
                node.attributes[name] = onnx_ir.AttrInt64(name, int(ir.FLOAT))
    for node in nodes:
        _drop_cast(graph, node, ir.FLOAT)
    return sorted(found)


def _float32(tensor: Any) -> Any:
    import onnx_ir  # noqa: PLC0415 - an extra

    return onnx_ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _drop_cast(graph: Any, node: Any, kind: Any) -> None:
    """Removes a cast of float32 to float32, which would separate a quantizer from its layer."""
    if node.op_type != "Cast" or node.graph is not graph.graph or node.outputs[0].is_graph_output():
        return
    if node.inputs[0].dtype == kind == node.attributes.get_int("to", 0):
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        graph.graph.remove(node, safe=True)
