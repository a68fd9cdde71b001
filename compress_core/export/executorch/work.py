"""Finds out which layers of a lowered program are computed with integers, and how much of the work that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from compress_core.export.report import Work

_PRODUCTS = ("bmm", "mm", "matmul", "addmm", "linear", "convolution", "scaled_dot_product_attention")
_NOT_DELEGATED = "XNNPACK does not take it; ExecuTorch's portable kernel computes it"


def work_of(edge: Any) -> tuple[Work, ...]:
    """Returns the layers and products of a lowered program, in the order of the graph, with how they are computed.

    Args:
        edge: An `EdgeProgramManager` before memory planning.
    """
    found = []
    for node, program in _nodes(edge.exported_program()):
        kind = operator_name(node)
        if kind not in _PRODUCTS:
            continue
        activation, weight = node.args[1:3] if kind == "addmm" else node.args[:2]
        reason = _NOT_DELEGATED if program is None else _reason_for_float(node, kind)
        is_quantized = any(_is(value, "dequantize") for value in (activation, weight))
        kernel = "portable" if program is None else f"XNNPACK, {'float32' if reason else 'int8'}"
        found.append(Work(_name(node), kind, _macs(node, kind), is_quantized, not reason, kernel, reason))
    return tuple(found)


def operators_of(edge: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Returns how many operators of each kind XNNPACK computes, and how many portable kernels do."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for node, program in _nodes(edge.exported_program()):
        if operator_name(node) not in ("getitem", ""):
            counts[program is None][operator_name(node)] += 1
    return dict(sorted(counts[0].items())), dict(sorted(counts[1].items()))


def operator_name(node: fx.Node) -> str:
    """Returns the name of a node's operator without namespace and overload; empty for delegates and sizes."""
    target: Any = node.target
    full = target.name() if callable(getattr(target, "name", None)) else getattr(target, "__name__", "")
    name = str(full).rpartition("::")[2]
    name = name.partition(".")[0].removesuffix("_copy")
    return "" if name in ("executorch_call_delegate", "sym_size", "alloc") else name


def _nodes(program: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Yields the calls of a program with the program of the delegate that computes them; None for portable kernels."""
    graph = program.graph_module
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if "executorch_call_delegate" not in str(node.target):
            yield node, None
            continue
        inner = getattr(graph, str(node.args[0].target)).original_module
        for entry in inner.graph.nodes:
            if entry.op == "call_function":
                yield entry, inner


def _is(node: Any, prefix: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node).startswith(prefix)


def _reason_for_float(node: fx.Node, kind: str) -> str:
    """Returns why a delegated layer is computed in float; empty if it is not.

    The partitioner takes a layer whose weight is dequantized only if its input and its output are quantized, too, and
    then XNNPACK computes it with integers.
    """
    if kind in ("bmm", "matmul", "scaled_dot_product_attention"):
        return "XNNPACK has no product of two activations in integers"
    values = node.args[1:3] if kind == "addmm" else node.args[:2]
    activation, weight = values
    if _is(weight, "permute"):
        weight = weight.args[0]  # type: ignore[union-attr]
    if _is(weight, "dequantize"):
        return ""
    missing = []
    if not _is(activation, "dequantize"):
        missing.append("its input is not quantized")
    readers = list(node.users)
    if len(readers) == 1 and (_is(readers[0], "relu") or _is(readers[0], "hardtanh")):
        readers = list(readers[0].users)
    if not (len(readers) == 1 and _is(readers[0], "quantize")):
        missing.append("its output is not quantized, or is also read without quantization")
    return " and ".join(missing) or "its weight is not quantized, or its scales do not fit XNNPACK's kernels"


def _name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(entry[0]) for entry in stack.values() if entry and "_empty_nn_module" not in str(entry[0])]
    return (names[-1] if names else "") or node.name


def _macs(node: fx.Node, kind: str) -> int:
    made = _sizes(node)
    if kind == "convolution":
        weight = _sizes(node.args[1])
        if node.args[6]:  # transposed: every input value is multiplied by its part of the weight
            return math.prod(_sizes(node.args[0])) * math.prod(weight[1:])
        return math.prod(made) * math.prod(weight[1:])
    if kind == "scaled_dot_product_attention":
        query, key = _sizes(node.args[0]), _sizes(node.args[1])
        return 2 * math.prod(query) * key[-2]
    return math.prod(made) * _sizes(node.args[1 if kind == "addmm" else 0])[-1]


def _sizes(node: Any) -> list[int]:
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return [_size(entry) for entry in value.shape]


def _size(size: int | torch.SymInt) -> int:
    """Returns a size for the example's batch."""
    return size if isinstance(size, int) else int(size.node.hint)
