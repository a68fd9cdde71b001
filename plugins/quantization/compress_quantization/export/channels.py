"""Replaces the scales per channel at inputs of depthwise convolutions by a single scale.

A depthwise convolution processes each channel separately, so its input may have a scale for each channel, and on CPUs
it does by default. But runtimes support only one scale per activation. The scales can be moved into weights: with s one
of them,

    dequantize(q, s[c]) = dequantize(q, s) * (s[c] / s)        into the weights that read channel c,
    quantize(x[c], s[c]) = quantize(x[c] * (s / s[c]), s)      into the weights and the bias that produce channel c,

if x comes from a layer, directly or through a ReLU, which commutes with a positive factor. The integers do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_quantization.export.editor import GraphEditor, output_axis
from compress_quantization.export.weights import Array, QuantizedWeight, constant


def unify_channel_scales(editor: GraphEditor) -> None:
    """Moves scales per channel into the surrounding weights, wherever that is exact."""
    for quantize in editor.nodes("QuantizeLinear"):
        found = _Between.layers(quantize)
        if found is not None:
            found.unify(editor)


@dataclass
class _Between:
    """A quantizer with a scale for each channel, between the layer that produces a tensor and those that read it.

    Attributes:
        quantize: The quantize operator.
        dequantize: The dequantize operator after it.
        scale: float32, shape (channels,).
        maker: The layer that produces the tensor.
        readers: The depthwise convolutions that read it.
    """

    quantize: Any
    dequantize: Any
    scale: Array
    maker: Any
    readers: list[Any]

    @classmethod
    def layers(cls, quantize: Any) -> _Between | None:
        """Returns the layers around a quantize operator, or None if its scales cannot move."""
        scale, zero_point = (constant(value) for value in quantize.inputs[1:3])
        if scale is None or scale.ndim != 1 or zero_point is None or len(np.unique(zero_point)) != 1:
            return None
        dequantize = _only_reader(quantize)
        maker = quantize.inputs[0].producer()
        if maker is not None and maker.op_type == "Relu" and _only_reader(maker) is quantize:
            maker = maker.inputs[0].producer()
        if maker is None or maker.op_type not in ("Conv", "ConvTranspose") or _only_reader(maker) is None:
            return None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        same = all(quantize.inputs[i] is dequantize.inputs[i] for i in (1, 2))
        axes = {node.attributes.get_int("axis", 1) for node in (quantize, dequantize)}
        if not same or axes != {1} or dequantize.outputs[0].is_graph_output():
            return None
        uses = list(dequantize.outputs[0].uses())
        if not all(index == 0 and _is_depthwise(node, len(scale)) for node, index in uses):
            return None
        return cls(quantize, dequantize, scale, maker, [node for node, _ in uses])

    def unify(self, editor: GraphEditor) -> None:
        """Moves the scales, unless the weights or their scales cannot represent the result."""
        one = self.scale.max()
        factors = self.scale.astype(np.float64) / float(one)
        made = _scaled(self.maker, 1 / factors)
        read = [_scaled(node, np.repeat(factors, _multiplier(node))) for node in self.readers]
        bias = constant(self.maker.inputs[2]) if len(self.maker.inputs) > 2 else None
        has_bias = len(self.maker.inputs) > 2 and self.maker.inputs[2] is not None
        if made is None or any(weight is None for weight in read) or (has_bias and bias is None):
            return
        values = None if bias is None else bias.astype(np.float64) / factors
        if values is not None and np.abs(values).max() > np.finfo(np.float32).max:
            return  # the scales differ too much
        self.maker.replace_input_with(1, editor.dequantize(made, self.maker))
        if values is not None:
            self.maker.replace_input_with(2, editor.add_constant(f"{made.name}.bias", values.astype(np.float32)))
        for node, weight in zip(self.readers, read, strict=True):
            assert weight is not None
            node.replace_input_with(1, editor.dequantize(weight, node))
        self._set_scale(editor, one)

    def _set_scale(self, editor: GraphEditor, scale: Array) -> None:
        zero_point = constant(self.quantize.inputs[2])
        assert zero_point is not None
        name = str(self.quantize.inputs[1].name)
        inputs = [
            editor.add_constant(f"{name}.unified", np.asarray(scale, np.float32)),
            editor.add_constant(f"{name}.unified_zero_point", np.asarray(zero_point[0])),
        ]
        for node in (self.quantize, self.dequantize):
            for index, value in enumerate(inputs):
                node.replace_input_with(1 + index, value)
            node.attributes.pop("axis", None)


def _only_reader(node: Any) -> Any:
    """Returns the node that reads the first output, if there is exactly one, and None otherwise."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and not node.outputs[0].is_graph_output() else None


def _is_depthwise(node: Any, channels: int) -> bool:
    weight = QuantizedWeight.behind(node.inputs[1]) if node.op_type == "Conv" else None
    return weight is not None and node.attributes.get_int("group", 1) == channels and weight.integers.shape[1] == 1


def _multiplier(node: Any) -> int:
    """Returns the number of output channels per input channel of a depthwise convolution."""
    weight = QuantizedWeight.behind(node.inputs[1])
    assert weight is not None
    return int(weight.integers.shape[0]) // int(node.attributes.get_int("group", 1))


def _scaled(node: Any, factors: Array) -> QuantizedWeight | None:
    weight = QuantizedWeight.behind(node.inputs[1])
    axis = None if weight is None else output_axis(node, weight)
    return None if weight is None or axis is None else weight.scaled(factors, axis)
