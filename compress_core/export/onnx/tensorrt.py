"""Writes ONNX files for TensorRT, whose rules are checked on the graph, because it runs on GPUs only.

Rules: TensorRT's documentation on explicit quantization (10 and 11) and its ONNX parser. A file that breaks one of them
is refused by TensorRT, or computed by it with other numbers; what only costs time is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress_core.errors import ExportError
from compress_core.export.exporter import ExportJob
from compress_core.export.onnx.exporter import OnnxExporter
from compress_core.export.runtimes.onnxruntime import OnnxRuntime

Array = npt.NDArray[Any]

_REMEDY = 'create the model with "target_device": "tensorrt"'
_MOST_NAMED = 3
# Activation functions that TensorRT fuses with the layer before.
_ACTIVATIONS = frozenset(["Clip", "Elu", "HardSigmoid", "LeakyRelu", "PRelu", "Relu", "Sigmoid", "Softplus", "Tanh"])
_LAYERS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])


class _Unoptimized(OnnxRuntime):
    """ONNX Runtime as a reference: what its optimizations make of int8 says nothing about TensorRT."""

    levels: ClassVar[tuple[bool, ...]] = (False,)
    profiles: ClassVar[bool] = False


class TensorRtExporter(OnnxExporter):
    """Writes ONNX files whose quantizers are as TensorRT demands; they are run in ONNX Runtime, not in TensorRT."""

    name: ClassVar[str] = "TensorRT"
    devices: ClassVar[tuple[str, ...]] = ("tensorrt",)

    runtime = _Unoptimized()

    def adapt(self, graph: Any) -> None:
        """Changes nothing: TensorRT moves quantizers over what selects or moves values by itself."""

    def check_graph(self, graph: Any, job: ExportJob) -> tuple[str, ...]:
        """Checks TensorRT's rules on quantizers.

        Args:
            graph: An `onnx_ir.Model`.
            job: What is exported.

        Returns:
            That TensorRT has not run the file, and where it will be slower than it could be.

        Raises:
            ExportError: Quantizers break rules; all of them are named.
        """
        broken = [sentence for rule in _RULES if (sentence := _told(list(rule(graph.graph)))) is not None]
        if broken:
            raise ExportError(f"TensorRT would not take this file. {'. '.join(broken)}; {_REMEDY}")
        pairs = sum(node.op_type == "QuantizeLinear" for node in graph.graph)
        checked = f"was run in {self.runtime.name} only, as TensorRT needs a GPU: its rules were checked on the graph"
        slow = _told([(_LATE, place) for place in _before_activations(graph.graph)])
        return (f"{checked} ({pairs} quantizers)", *((slow,) if slow is not None else ()))


Finding = tuple[str, str]  # what, where

_LATE = "has quantizers between a layer and its activation function, which TensorRT then does not fuse"


def _told(findings: list[Finding]) -> str | None:
    if not findings:
        return None
    names = ", ".join(f"'{place}'" for _, place in findings[:_MOST_NAMED])
    more = f" and {len(findings) - _MOST_NAMED} more" if len(findings) > _MOST_NAMED else ""
    return f"{findings[0][0]}: {names}{more}"


def _constant(value: Any) -> Array | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _name(node: Any) -> str:
    return str(node.inputs[0].name)


def _nodes(graph: Any, *operators: str) -> Iterator[Any]:
    return (node for node in graph if node.op_type in operators and node.domain == "")


def _zero_points(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, "QuantizeLinear", "DequantizeLinear"):
        zero_point = _constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if zero_point is not None and zero_point.any():
            yield "Every zero point has to be 0, and these are not", _name(node)


def _types(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, "QuantizeLinear", "DequantizeLinear"):
        value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        if node.op_type == "QuantizeLinear":
            zero_point = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
            dtype = None if zero_point is None else zero_point.dtype
        else:
            array = _constant(value)
            dtype = np.dtype(np.int8) if array is None else array.dtype  # what a quantizer has made is seen there
        if dtype != np.int8:
            yield f"Integers have to be int8, and these are {dtype or 'uint8'}", _name(node)


def _scales(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, "QuantizeLinear", "DequantizeLinear"):
        scale = _constant(node.inputs[1])
        if scale is None:
            yield "Scales have to be constants, and these are computed", _name(node)
        elif scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
            yield "Scales have to be positive float32 numbers, and these are not", _name(node)


def _granularity(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, "QuantizeLinear"):
        scale = _constant(node.inputs[1])
        if scale is not None and scale.size > 1:
            yield "Activations have to have one scale, and these have one for each channel", _name(node)


def _pairs(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, "QuantizeLinear"):
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or any(reader.op_type != "DequantizeLinear" for reader in readers):
            yield "Each quantizer has to be followed by a dequantizer, and these are not", _name(node)
        elif any(not _same(node.inputs[1], reader.inputs[1]) for reader in readers):
            yield "Both halves of a pair have to have one scale, and these have two", _name(node)


def _weight_axes(graph: Any) -> Iterator[Finding]:
    for node in _nodes(graph, *_LAYERS):
        producer = node.inputs[1].producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        scale, weight = _constant(producer.inputs[1]), _constant(producer.inputs[0])
        if scale is None or weight is None or scale.size == 1:
            continue
        axis = producer.attributes.get_int("axis", 1) % weight.ndim
        if axis != _output_axis(node, weight.ndim):
            yield "Scales of weights have to be those of output channels, and these are not", _name(producer)


def _output_axis(node: Any, dims: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return dims - 1


def _same(one: Any, other: Any) -> bool:
    first, second = _constant(one), _constant(other)
    return one is other or (first is not None and second is not None and np.array_equal(first, second))


def _before_activations(graph: Any) -> Iterator[str]:
    for node in _nodes(graph, "QuantizeLinear"):
        maker = node.inputs[0].producer()
        if maker is None or maker.op_type not in _LAYERS:
            continue
        for dequantize, _ in node.outputs[0].uses():
            readers = [reader for reader, _ in dequantize.outputs[0].uses()]
            if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
                yield _name(node)


_RULES: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    _types,
    _zero_points,
    _scales,
    _granularity,
    _pairs,
    _weight_axes,
)
