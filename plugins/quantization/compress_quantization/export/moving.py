"""Moves quantization across operators that move values without changing them.

XNNPACK looks for a dequantize operator right in front of a layer, and for a quantize operator right behind it. A
reshape, a transposition or a pooling in between hides them. Values on a grid stay on it when they are moved, so
quantizing again with the same grid is exact; and quantizing before the move is the same as after it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compress_quantization.export.fx import call_like, grid_of, is_dequantize, is_quantize, place_behind

_ATEN = torch.ops.aten
_MOVING = frozenset(
    {
        _ATEN.alias.default,
        _ATEN.cat.default,
        _ATEN.clone.default,
        _ATEN.contiguous.default,
        _ATEN.expand.default,
        _ATEN.flatten.using_ints,
        _ATEN.max_pool2d.default,
        _ATEN.permute.default,
        _ATEN.pixel_shuffle.default,
        _ATEN.reshape.default,
        _ATEN.select.int,
        _ATEN.slice.Tensor,
        _ATEN.squeeze.default,
        _ATEN.squeeze.dim,
        _ATEN.squeeze.dims,
        _ATEN.transpose.int,
        _ATEN.t.default,
        _ATEN.unflatten.int,
        _ATEN.unsqueeze.default,
        _ATEN.upsample_nearest2d.vec,
        _ATEN.view.default,
    }
)
_SPLITTING = frozenset(
    {_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default, _ATEN.unbind.int, _ATEN.split.sizes}
)


def move_quantizers(module: fx.GraphModule) -> None:
    """Puts quantize and dequantize operators with the same grid on both sides of operators that move values.

    Args:
        module: The graph, changed in place.
    """
    for node in reversed(list(module.graph.nodes)):
        _quantize_before(module, node)
    for node in list(module.graph.nodes):
        _quantize_behind(module, node)
    for node in list(module.graph.nodes):
        _split_readers(module, node)


def _moves(node: fx.Node) -> bool:
    if node.target == _ATEN.constant_pad_nd.default:  # zero is on every grid
        return len(node.args) < 3 or bool(node.args[2] == 0)
    if node.target == _ATEN.pad.default:
        mode, value = (*node.args[2:4], "constant", None)[:2] if len(node.args) != 3 else (node.args[2], None)
        return (node.kwargs.get("mode", mode), node.kwargs.get("value", value) or 0) == ("constant", 0)
    return node.target in _MOVING


def _sources(node: fx.Node) -> list[fx.Node]:
    """Returns the tensors whose values an operator moves; an empty list for other operators."""
    if node.target is operator.getitem:
        parts = node.args[0]
        return [parts.args[0]] if isinstance(parts, fx.Node) and parts.target in _SPLITTING else []  # type: ignore[list-item]
    if node.target == _ATEN.relu.default:  # zero is on every grid
        return [node.args[0]]  # type: ignore[list-item]
    if not _moves(node):
        return []
    if node.target == _ATEN.cat.default:
        return list(node.args[0])  # type: ignore[arg-type]
    return [node.args[0]]  # type: ignore[list-item]


def _pair(module: fx.GraphModule, value: fx.Node, grid: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Returns a new dequantize operator at the insertion point, behind a new quantize operator."""
    operators = torch.ops.quantized_decomposed
    quantized = call_like(module, operators.quantize_per_tensor.default, (value, *grid), like)
    return call_like(module, operators.dequantize_per_tensor.default, (quantized, *grid), like)


def _quantize_before(module: fx.GraphModule, node: fx.Node) -> None:
    """Quantizes the sources of a move whose result is read by quantizers with one grid only."""
    grids = {grid_of(reader) if is_quantize(reader) else None for reader in node.users}
    if not _moves(node) or len(grids) != 1 or None in grids:
        return
    (grid,) = grids
    assert grid is not None
    for source in dict.fromkeys(_sources(node)):
        if is_dequantize(source) and grid_of(source) == grid:
            continue
        if source.op == "get_attr":
            continue
        known = _dequantized(module, source, grid)
        if known is None:
            with module.graph.inserting_before(node):
                known = _pair(module, source, grid, node)
        node.replace_input_with(source, known)


def _dequantized(module: fx.GraphModule, source: fx.Node, grid: tuple[Any, ...]) -> fx.Node | None:
    """Returns what dequantizes a tensor after a quantizer with this grid, if there is already one."""
    for reader in source.users:
        if is_quantize(reader) and grid_of(reader) == grid:
            found = next((entry for entry in reader.users if is_dequantize(entry)), None)
            if found is not None:
                place_behind(module, reader, source)
                place_behind(module, found, reader)
            return found
    return None


def _quantize_behind(module: fx.GraphModule, node: fx.Node) -> None:
    """Quantizes the result of a move again, if what it moves is on one grid."""
    sources = _sources(node)
    if not sources or not all(is_dequantize(source) for source in sources):
        return
    grids = {grid_of(source) for source in sources}
    readers = list(node.users)
    if len(grids) != 1 or not readers or all(reader.op == "output" for reader in readers):
        return
    (grid,) = grids
    if len(readers) == 1 and is_quantize(readers[0]) and grid_of(readers[0]) == grid:
        return
    with module.graph.inserting_after(node):
        quantized = call_like(module, torch.ops.quantized_decomposed.quantize_per_tensor.default, (node, *grid), node)
    with module.graph.inserting_after(quantized):
        target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        dequantized = call_like(module, target, (quantized, *grid), node)
    for reader in readers:
        reader.replace_input_with(node, dequantized)


def _split_readers(module: fx.GraphModule, node: fx.Node) -> None:
    """Gives each reader a dequantize operator of its own, because XNNPACK fuses it with some readers and not others."""
    if not is_dequantize(node):
        return
    for reader in list(node.users)[1:]:
        with module.graph.inserting_before(reader):
            reader.replace_input_with(node, module.graph.node_copy(node))
