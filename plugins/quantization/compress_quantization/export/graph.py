"""Rewrites an exported graph into patterns that a runtime computes with integers.

Batch norms after a quantized convolution or linear layer are folded into its scales and its bias, transposed and split
weights are stored as they are read, and biases become integers in the units of the accumulator. Clipping that
quantization does anyway is removed, and depthwise convolutions get inputs with one scale
(`compress_quantization.export.channels`). All of this is exact, except for the rounding of scales to float32 and of
biases to half a unit of the accumulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress_quantization.export.channels import unify_channel_scales
from compress_quantization.export.editor import GraphEditor, output_axis
from compress_quantization.export.weights import Array, QuantizedWeight, constant

_LARGEST_BIAS = 2**31 - 1
# Operators across which ONNX Runtime moves dequantization, because they do not change values.
_MOVING = frozenset(["Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])


def rewrite(graph: Any) -> None:
    """Rewrites a graph in place.

    Args:
        graph: An `onnx_ir.Model`.
    """
    _shorten_names(graph.graph)
    editor = GraphEditor(graph.graph)
    for step in (
        _split_weights,
        _transpose_weights,
        _fold_batch_norms,
        _drop_clips,
        unify_channel_scales,
        _quantize_biases,
    ):
        step(editor)


def _split_weights(editor: GraphEditor) -> None:
    """Stores the parts of a weight that is split before use, such as the projections of an attention layer."""
    for node in editor.nodes("Split"):
        weight = QuantizedWeight.behind(node.inputs[0])
        if weight is None or any(output.is_graph_output() for output in node.outputs):
            continue
        dim = node.attributes.get_int("axis", 0) % weight.integers.ndim
        total, number = weight.integers.shape[dim], len(node.outputs)
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if given is None and (len(node.inputs) > 1 or total % number):
            continue
        sizes = [total // number] * number if given is None else given.tolist()
        for output, part in zip(list(node.outputs), weight.split(sizes, dim), strict=True):
            output.replace_all_uses_with(editor.dequantize(part, node))
        editor.graph.remove(node, safe=True)


def _transpose_weights(editor: GraphEditor) -> None:
    """Stores weights transposed as they are read, because a runtime needs a dequantized constant before a product."""
    for node in editor.nodes("Transpose"):
        weight = QuantizedWeight.behind(node.inputs[0])
        if weight is None or node.outputs[0].is_graph_output():
            continue
        dims = weight.integers.ndim
        permutation = tuple(node.attributes.get_ints("perm", tuple(reversed(range(dims)))))
        integers = node.inputs[0].producer().inputs[0]
        if _is_read_as_it_is(integers):
            value = editor.dequantize_transposed(weight, integers, permutation, node)
        else:
            value = editor.dequantize(weight.transposed(permutation), node)
        node.outputs[0].replace_all_uses_with(value)
        editor.graph.remove(node, safe=True)


def _is_read_as_it_is(integers: Any) -> bool:
    """Returns whether something else than a transposition reads a weight: the embedding that is tied to a layer."""
    readers = [reader for node, _ in integers.uses() for reader, _ in node.outputs[0].uses()]
    return any(reader.op_type != "Transpose" for reader in readers)


def _fold_batch_norms(editor: GraphEditor) -> None:
    for norm in editor.nodes("BatchNormalization"):
        layer = norm.inputs[0].producer()
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        # Other readers of the layer's output need it without the batch norm.
        if len(norm.inputs[0].uses()) != 1 or norm.inputs[0].is_graph_output():
            continue
        if all(not output.uses() for output in norm.outputs[1:]):
            _fold_batch_norm(editor, layer, norm)


def _fold_batch_norm(editor: GraphEditor, layer: Any, norm: Any) -> None:
    weight = QuantizedWeight.behind(layer.inputs[1])
    axis = None if weight is None else output_axis(layer, weight)
    statistics = [constant(value) for value in norm.inputs[1:5]]
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
    if weight is None or axis is None or any(array is None for array in statistics) or (has_bias and bias is None):
        return
    gamma, beta, mean, variance = (array.astype(np.float64) for array in statistics if array is not None)
    factors = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    folded = weight.scaled(factors, axis)
    if folded is None:
        return
    shift = beta + factors * ((0.0 if bias is None else bias.astype(np.float64)) - mean)
    new_bias = editor.add_constant(f"{weight.name}.bias", shift.astype(np.float32))
    value = editor.dequantize(folded, layer)
    if layer.op_type == "MatMul":
        node = editor.ir.node("Gemm", [layer.inputs[0], value, new_bias], version=editor.opset, name=layer.name)
        editor.graph.insert_before(layer, node)
        node.outputs[0].shape, node.outputs[0].type = layer.outputs[0].shape, layer.outputs[0].type
        editor.remove(norm, node.outputs[0])
        editor.graph.remove(layer, safe=True)
        return
    layer.replace_input_with(1, value)
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, new_bias)
    editor.remove(norm, layer.outputs[0])


def _drop_clips(editor: GraphEditor) -> None:
    """Removes clipping (of ReLU6) if the following quantizer clips at least as much; runtimes then fuse the rest."""
    for clip in editor.nodes("Clip"):
        readers = [node for node, _ in clip.outputs[0].uses()]
        if clip.outputs[0].is_graph_output() or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            continue
        low, high = (constant(value) for value in (*clip.inputs[1:3], None, None)[:2])
        scale, zero_point = (constant(value) for value in readers[0].inputs[1:3])
        if low is None or high is None or scale is None or zero_point is None:
            continue
        # Rounding is monotonic, so clipped values become the first or the last integer without clipping as well.
        limits = np.iinfo(zero_point.dtype)
        first, last = (np.rint(end.astype(np.float32) / scale) + zero_point.astype(np.float32) for end in (low, high))
        if (first <= limits.min).all() and (last >= limits.max).all():
            readers[0].replace_input_with(0, clip.inputs[0])
            editor.graph.remove(clip, safe=True)


def _quantize_biases(editor: GraphEditor) -> None:
    """Stores biases as integers in units of (input scale) * (weight scale), where a runtime needs this."""
    for node in editor.nodes("Conv", "Gemm"):
        weight = QuantizedWeight.behind(node.inputs[1])
        # A convolution without quantizers on both sides is computed in floating point.
        if weight is None or (node.op_type == "Conv" and not _is_quantized(node.outputs[0])):
            continue
        quantized = _quantized_bias(node, weight)
        if quantized is not None:
            node.replace_input_with(2, editor.dequantize(quantized, node))


def _quantized_bias(node: Any, weight: QuantizedWeight) -> QuantizedWeight | None:
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    scale, axis = _input_scale(node.inputs[0]), output_axis(node, weight)
    if bias is None or scale is None or axis is None or weight.axis not in (None, axis):
        return None
    if weight.integers.dtype != np.int8 or bias.shape != (weight.integers.shape[axis],):
        return None
    # float32, like the product that the runtime computes.
    units = (np.float32(scale) * weight.scale).astype(np.float32)
    limits = np.finfo(np.float32)
    if not ((units >= limits.tiny) & (units <= limits.max)).all():
        return None  # only floating point can represent the products of such scales
    with np.errstate(divide="ignore", over="ignore"):
        integers = np.rint(bias.astype(np.float64) / units.astype(np.float64))
    if not (np.abs(integers) <= _LARGEST_BIAS).all():
        return None  # the weights of a channel are nearly zero; only floating point can represent both
    zeros = np.zeros(units.shape, np.int32)
    channels = 0 if units.ndim else None
    return QuantizedWeight(integers.astype(np.int32), units, zeros, channels, str(node.inputs[2].name))


def _input_scale(value: Any) -> Array | None:
    """Returns the scale of the quantizer that an input comes from, if it has one scale and 8 bits."""
    node = value.producer()
    while node is not None and node.op_type in _MOVING:
        node = node.inputs[0].producer()
    return None if node is None or node.op_type != "DequantizeLinear" else _scale(node)


def _scale(node: Any) -> Array | None:
    """Returns the scale of a quantize or dequantize operator of 8 bits with one scale; None for others."""
    scale, zero_point = (constant(value) for value in node.inputs[1:3])
    if scale is None or scale.size != 1 or zero_point is None or zero_point.dtype != np.uint8:
        return None
    return scale.reshape(())


def _is_quantized(value: Any) -> bool:
    """Returns whether a value is read only by one quantizer, directly or through a ReLU."""
    readers = [node for node, _ in value.uses()]
    if value.is_graph_output() or len(readers) != 1:
        return False
    if readers[0].op_type == "Relu":
        return _is_quantized(readers[0].outputs[0])
    return bool(readers[0].op_type == "QuantizeLinear" and _scale(readers[0]) is not None)


def _shorten_names(graph: Any) -> None:
    """Names weights as in the model, without the parts that the export added."""
    for name in list(graph.initializers):
        short = name.replace("parametrizations.", "").replace(".0.integers", ".integers")
        short = short.replace(".0.scale", ".scale").replace(".0.zero_point", ".zero_point")
        if "parametrizations." in name and short not in graph.initializers:
            graph.initializers[name].name = short
