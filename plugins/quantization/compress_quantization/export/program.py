"""Rewrites a graph of `torch.export` into patterns that XNNPACK computes with integers.

Batch norms after a quantized convolution or linear layer are folded into its scales and its bias, clipping that
quantization does anyway is removed, and quantization moves across operators that move values
(`compress_quantization.export.moving`). All of this is exact, except for the rounding of scales to float32. Layers that
XNNPACK cannot compute with integers get their weight as the floating-point numbers that the integers represent.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compress_quantization.export.fx import (
    IntegerWeight,
    add_constant,
    grid_of,
    is_dequantize,
    is_quantize,
    place_behind,
    tensor_of,
)
from compress_quantization.export.moving import move_quantizers

_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv1d.padding, _ATEN.conv2d.padding)
_TRANSPOSED = (_ATEN.conv_transpose2d.input,)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, _ATEN.linear.default)
_NORM = _ATEN._native_batch_norm_legit_no_training.default
_LARGEST_BIAS = 2**30  # in units of the accumulator, which is an int32
# What XNNPACK takes for (input scale) * (weight scale) / (output scale).
_SMALLEST_RATIO, _LARGEST_RATIO = 2.0**-32, 2.0**8


def rewrite_program(module: fx.GraphModule) -> None:
    """Rewrites a graph in place.

    Args:
        module: A graph with functional ATen operators, and parameters and buffers as attributes.
    """
    _one_dequantize_for_each_reader(module)
    for step in (_fold_batch_norms, _merge_clips, _drop_clips, _merge_quantizers, move_quantizers, _store_as_float):
        step(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def _one_dequantize_for_each_reader(module: fx.GraphModule) -> None:
    """Gives each reader of a weight a dequantize operator of its own, because layers decide on it separately."""
    for node in list(module.graph.nodes):
        if IntegerWeight.behind(module, node) is None:
            continue
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                reader.replace_input_with(node, module.graph.node_copy(node))


def _output_axis(layer: fx.Node) -> int | None:
    """Returns the dimension of a weight with the output's channels (dimension 1 of the output), or None."""
    if layer.target in _TRANSPOSED:
        groups = layer.args[6] if len(layer.args) > 6 else 1
        return 1 if groups == 1 else None
    return 0 if layer.target in _LAYERS else None


def _fold_batch_norms(module: fx.GraphModule) -> None:
    for norm in list(module.graph.nodes):
        if norm.target != _NORM:
            continue
        layer = norm.args[0]
        if not isinstance(layer, fx.Node) or layer.target not in _LAYERS or len(layer.users) != 1:
            continue
        if layer.target == _ATEN.linear.default and layer.meta["val"].ndim != 2:
            continue
        if all(reader.target is operator.getitem and reader.args[1] == 0 for reader in norm.users):
            _fold_batch_norm(module, layer, norm)


def _fold_batch_norm(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    weight, axis = IntegerWeight.behind(module, layer.args[1]), _output_axis(layer)
    given = [*layer.args, None, None][2]
    bias = tensor_of(module, given)
    gamma, beta, mean, variance = (tensor_of(module, entry) for entry in norm.args[1:5])
    if weight is None or axis is None or mean is None or variance is None or (given is not None and bias is None):
        return
    factors = (variance.double() + float(norm.args[6])).rsqrt()  # type: ignore[arg-type]
    if gamma is not None:
        factors = factors * gamma.double()
    folded = weight.scaled(factors, axis)
    if folded is None:
        return
    shift = factors * ((0.0 if bias is None else bias.double()) - mean.double())
    if beta is not None:
        shift = shift + beta.double()
    arguments = [*layer.args]
    arguments += [None] * (3 - len(arguments))
    arguments[1] = folded.insert(module, layer)
    arguments[2] = add_constant(module, f"{weight.name}_bias", shift.float(), layer)
    layer.args = tuple(arguments)
    for reader in list(norm.users):
        reader.replace_all_uses_with(layer)
        module.graph.erase_node(reader)
    module.graph.erase_node(norm)


def _ends_of_clip(node: Any) -> tuple[float, float] | None:
    """Returns the ends to which a node clips, or None for other nodes."""
    if not isinstance(node, fx.Node):
        return None
    if node.target == _ATEN.relu.default:
        return 0.0, float("inf")
    if node.target == _ATEN.relu6.default:
        return 0.0, 6.0
    if node.target in (_ATEN.hardtanh.default, _ATEN.clamp.default):
        standard = (-1.0, 1.0) if node.target == _ATEN.hardtanh.default else (None, None)
        low, high = (*node.args[1:3], *standard[len(node.args) - 1 :])[:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        ends = (-float("inf") if low is None else low, float("inf") if high is None else high)
        return ends if all(isinstance(end, (int, float)) for end in ends) else None
    return None


def _merge_clips(module: fx.GraphModule) -> None:
    """Makes one operator of clipping twice, because XNNPACK fuses one with a layer."""
    for node in list(module.graph.nodes):
        ends = _ends_of_clip(node)
        before = node.args[0] if ends is not None else None
        first = _ends_of_clip(before)
        if ends is None or first is None or not isinstance(before, fx.Node) or len(before.users) != 1:
            continue
        low, high = (min(max(end, ends[0]), ends[1]) for end in first)
        if low == -float("inf") or high == float("inf"):
            continue
        node.target = _ATEN.hardtanh.default
        node.args, node.kwargs = (before.args[0], low, high), {}
        module.graph.erase_node(before)


def _drop_clips(module: fx.GraphModule) -> None:
    """Removes clipping if the following quantizer clips at least as much."""
    for node in list(module.graph.nodes):
        ends = _ends_of_clip(node)
        readers = list(node.users)
        if ends is None or len(readers) != 1 or not is_quantize(readers[0]):
            continue
        scale, zero_point = readers[0].args[1:3]
        # Rounding is monotonic, so clipped values become the first or the last integer without clipping as well.
        low, high = (torch.round(torch.tensor(end, dtype=torch.float32) / scale) + zero_point for end in ends)
        # Of int8, and not the operator's own limits, which XNNPACK ignores.
        if float(low) <= -128 and float(high) >= 127:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _merge_quantizers(module: fx.GraphModule) -> None:
    """Quantizes a tensor once, if several quantizers do the same: layers with more than one reader stay float."""
    for node in list(module.graph.nodes):
        first: dict[Any, fx.Node] = {}
        for reader in list(node.users):
            if not is_quantize(reader):
                continue
            known = first.setdefault(grid_of(reader), reader)
            if known is not reader:
                reader.replace_all_uses_with(known)
                module.graph.erase_node(reader)
                continue
            # All readers of the merged one come later than it then.
            place_behind(module, reader, node)


def _store_as_float(module: fx.GraphModule) -> None:
    """Stores weights as floating-point numbers where no integer kernel reads them, and fits the others to kernels."""
    for node in list(module.graph.nodes):
        weight = IntegerWeight.behind(module, node)
        if weight is None or not node.users:
            continue
        (layer,) = node.users  # a dequantize operator has one reader
        fitted = _fitted(module, layer, weight) if layer.args[1] is node else None
        if fitted is weight:
            continue
        if fitted is not None:
            made = fitted.insert(module, layer)
        else:
            made = add_constant(module, f"{weight.name}_dequantized", weight.values(), node)
        node.replace_all_uses_with(made)


def _fitted(module: fx.GraphModule, layer: fx.Node, weight: IntegerWeight) -> IntegerWeight | None:
    """Returns the weight for a kernel that computes with integers, or None if XNNPACK has none for this layer."""
    quantize = _quantizer_behind(layer)
    axis, given = _output_axis(layer), [*layer.args, None][2]
    bias = tensor_of(module, given)
    if quantize is None or axis is None or not is_dequantize(layer.args[0]) or weight.axis not in (None, axis):
        return None
    if given is not None and bias is None:
        return None
    read, written = float(layer.args[0].args[1]), float(quantize.args[1])  # type: ignore[union-attr, arg-type]
    # float32, as XNNPACK computes them.
    units = weight.scale * torch.tensor(read, dtype=torch.float32)
    ratios = units / torch.tensor(written, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    if not bool(((units >= tiny) & (ratios < _LARGEST_RATIO)).all()):
        return None
    if bias is not None and not bool((bias.double().abs() / units.double() <= _LARGEST_BIAS).all()):
        return None  # only floating point can represent both the bias and the product
    return weight if bool((ratios >= _SMALLEST_RATIO).all()) else None


def _quantizer_behind(layer: fx.Node) -> fx.Node | None:
    """Returns the only reader of a layer's output, if it is a quantizer, directly or behind clipping."""
    for _ in range(2):
        if len(layer.users) != 1:
            return None
        (reader,) = layer.users
        if is_quantize(reader):
            return reader
        if _ends_of_clip(reader) is None or reader.target == _ATEN.clamp.default:
            return None
        layer = reader
    return None
