"""Counts the zeros among the weights of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from compress_core.export.zeros import WeightZeros

_GROUP = 4


def zeros_of(graph: Any) -> tuple[WeightZeros, ...]:
    """Returns the zeros of each weight that a layer of a graph reads.

    Args:
        graph: An `onnx_ir.Model`.
    """
    found: dict[str, WeightZeros] = {}
    for node in graph.graph.all_nodes():
        for index, axis in _weights(node):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None:
                continue
            name, is_zero = _is_zero(value)
            if is_zero is None or name in found or is_zero.ndim < 2 or not is_zero.size:
                continue
            found[name] = WeightZeros(
                name, node.op_type, is_zero.size, int(np.count_nonzero(is_zero)), _is_2_4(is_zero, axis)
            )
    return tuple(found.values())


def _weights(node: Any) -> Iterator[tuple[int, int]]:
    """Yields the inputs of a node that may be weights, and the dimension of each that is summed over."""
    operator = node.op_type
    if operator == "Conv":
        yield 1, 1
    elif operator == "ConvTranspose":
        yield 1, 0
    elif operator == "Gemm":
        yield 1, 1 if node.attributes.get_int("transB", 0) else 0
    elif operator == "MatMul":
        yield from ((1, -2), (0, -1))
    elif operator in ("LSTM", "GRU", "RNN"):
        yield from ((1, -1), (2, -1))
    elif operator == "Gather":
        yield 0, -1


def _is_zero(value: Any) -> tuple[str, npt.NDArray[np.bool_] | None]:
    """Returns the name of a constant, and which of its elements are zero; None if it is none."""
    node = value.producer()
    if value.const_value is not None:
        array = value.const_value.numpy()
        return str(value.name), array == 0 if np.issubdtype(array.dtype, np.floating) else None
    if node is not None and node.op_type == "Transpose":  # of a weight that others read as it is
        name, is_zero = _is_zero(node.inputs[0])
        return name, None if is_zero is None else is_zero.transpose(node.attributes.get_ints("perm", None))
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0].const_value is None:
        return str(value.name), None
    integers = node.inputs[0].const_value.numpy()
    given = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    zero_point = np.zeros((), integers.dtype) if given is None else given.numpy()
    if zero_point.ndim:
        shape = [1] * integers.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        zero_point = zero_point.reshape(shape)
    return str(node.inputs[0].name).removesuffix(".integers"), integers == zero_point


def _is_2_4(is_zero: npt.NDArray[np.bool_], axis: int) -> bool:
    groups = is_zero.shape[axis] // _GROUP
    if not groups:
        return False
    rows = np.moveaxis(is_zero, axis, -1)[..., : groups * _GROUP]
    return bool((rows.reshape(*rows.shape[:-1], groups, _GROUP).sum(-1) >= _GROUP // 2).all())
