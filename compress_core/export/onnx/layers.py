"""Compares a file with torch layer by layer, each on torch's own activations, so that roundings do not add up.

A network amplifies the rounding of its first layers: a value between two steps of a quantizer goes up in torch and down
in the runtime, and with random weights the outputs then have little in common. To tell this from a wrong file, the
graph is cut behind every quantizer. Each part reads the integers that torch computes with, and must return the integers
that torch rounds to, up to the choice between two neighbours.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from compress_core.export.inputs import Inputs
from compress_core.export.notes import place_in_words
from compress_core.export.recording import Call, recorded

Array = npt.NDArray[Any]

SCOPES = "pkg.torch.onnx.name_scopes"
_MADE = "/made"
# A rounded value is at most half a step away; the rest is for sums in float32 and biases in units of the accumulator.
_MOST_STEPS = 0.75
# bfloat16 and float16 round a value of 255 steps by up to half a step themselves, before it is quantized.
_MOST_STEPS_OF_HALF = 2.0
_HALF = 0.5 + 1e-3  # of a step
_OFF_GRID = 0.05  # of a step: float32 represents multiples of a scale with an error of 1e-5 steps


@dataclass(frozen=True)
class Quantizer:
    """A quantizer of an activation in an exported graph.

    Attributes:
        node: Its QuantizeLinear node, an `onnx_ir.Node`.
        scopes: Names of the modules that it was exported from, the outermost first.
        scale: Its scale as exported, before the algorithms changed the graph: float32, shape () or (channels,).
        zero_point: Of the same shape.
        axis: Dimension of the channels.
    """

    node: Any
    scopes: tuple[str, ...]
    scale: Array
    zero_point: Array
    axis: int


def quantizers_of(graph: Any) -> list[Quantizer]:
    """Returns the quantizers of activations in a graph that was just exported, an `onnx_ir.Model`."""
    found = []
    for node in graph.graph:
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        constants = [None if value is None else value.const_value for value in node.inputs[1:3]]
        if None in constants or SCOPES not in node.metadata_props:
            continue
        scale, zero_point = (constant.numpy() for constant in constants if constant is not None)
        scopes = tuple(ast.literal_eval(node.metadata_props[SCOPES]))
        found.append(Quantizer(node, scopes, scale, zero_point, node.attributes.get_int("axis", 1)))
    return found


def places_of(graph: Any) -> dict[str, str]:
    """Returns the names of the nodes of a graph that was just exported -> the modules that they were exported from."""
    found = {}
    for node in graph.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props[SCOPES]) if SCOPES in node.metadata_props else ()
        # The last entry is the operator's own name, the first one the model.
        names = [name for name in scopes[:-1] if name and "parametrizations" not in name]
        if node.name and names:
            found[str(node.name)] = str(names[-1])
    return found


@dataclass(frozen=True)
class Part:
    """What torch computes up to one quantizer.

    Attributes:
        name: Name of the integers in the graph.
        place: Place of the quantizer, for messages.
        integers: What torch has rounded to, in the type of the graph.
        exact: What it has rounded, in the same units; float32.
        largest: Largest difference between the graph's integers and `exact`.
        is_on_grid: Whether the scale in the graph is the one that torch has rounded with.
    """

    name: str
    place: str
    integers: Array
    exact: Array
    largest: float
    is_on_grid: bool


@dataclass(frozen=True)
class Cut:
    """A graph cut behind its quantizers.

    Attributes:
        path: The graph; it reads the integers behind each quantizer, and returns them after its own outputs.
        parts: What torch computes, in the order of these outputs.
        outputs: The outputs of the model in torch, computed from the integers of `parts`.
    """

    path: Path
    parts: tuple[Part, ...]
    outputs: tuple[torch.Tensor, ...]

    @property
    def feeds(self) -> dict[str, Array]:
        """The integers that torch computes with."""
        return {part.name: part.integers for part in self.parts}

    def distances(self, outputs: Sequence[Array]) -> list[float]:
        """Returns how far the graph's integers are from what torch rounds, in steps: the largest of each part.

        Infinite if the scale in the graph is another one.
        """
        found = []
        for part, actual in zip(self.parts, outputs, strict=True):
            if actual.shape != part.exact.shape or not part.is_on_grid:
                found.append(math.inf)
            else:
                found.append(float(np.abs(actual.astype(np.float64) - part.exact).max(initial=0.0)))
        return found

    def accumulated(self, outputs: Sequence[Array]) -> list[float | None]:
        """Returns how far the integers of the graph as a whole are from torch's, in steps: the mean of each part."""
        return [
            float(np.abs(actual.astype(np.float64) - part.integers).mean())
            if actual.shape == part.integers.shape and actual.size
            else None
            for part, actual in zip(self.parts, outputs, strict=True)
        ]


def cut(path: Path, quantizers: Sequence[Quantizer], model: nn.Module, inputs: Inputs) -> Cut | None:
    """Cuts a graph behind its quantizers.

    Args:
        path: The graph's file; the cut one is written beside it.
        quantizers: What `quantizers_of` has found in it.
        model: A copy of the compressed model of the sizes that the graph has, in eval mode on the CPU.
        inputs: The batch.

    Returns:
        None if there is nothing to cut, or a quantizer of the graph cannot be told from others.
    """
    forward = recorded(model, inputs)
    left = [quantizer for quantizer in quantizers if quantizer.node.graph is not None]
    nodes: dict[str, list[Quantizer]] = defaultdict(list)
    for quantizer in left:
        name = next((forward.names[scope] for scope in reversed(quantizer.scopes) if scope in forward.names), None)
        if name is not None:
            nodes[name].append(quantizer)
    made = {name: _distinct(forward.calls[name], len(found)) for name, found in nodes.items()}
    if not nodes or any(len(found) != len(made[name]) for name, found in nodes.items()):
        return None
    calls = {}
    for name, found in nodes.items():
        for number, (quantizer, call) in enumerate(zip(found, made[name], strict=True)):
            calls[id(quantizer)] = place_in_words(name, number if len(found) > 1 else None), call
    if any(not _fits(quantizer, calls[id(quantizer)][1]) for quantizer in left if id(quantizer) in calls):
        return None
    parts = [_part(quantizer, *calls[id(quantizer)]) for quantizer in left if id(quantizer) in calls]
    feeds = {part.name: part.integers for part in parts}
    return Cut(_cut(path, feeds), tuple(parts), forward.outputs)


def _distinct(calls: Sequence[Call], number: int) -> Sequence[Call]:
    """Returns the calls of a transform; without repetitions on equal tensors if the graph has fewer nodes than that.

    The exporter merges nodes that compute the same, such as the quantizer of a decoder's keys in each of its layers.
    """
    if len(calls) == number:
        return calls
    found: list[Call] = []
    for call in calls:
        if not any(torch.equal(call.given, other.given) for other in found):
            found.append(call)
    return found


def _fits(quantizer: Quantizer, call: Call) -> bool:
    """Returns whether torch's activation has the channels that the graph has: an algorithm may export another size."""
    shape, channels = call.returned.shape, quantizer.scale.size
    return channels == 1 or (-len(shape) <= quantizer.axis < len(shape) and shape[quantizer.axis] == channels)


def _part(quantizer: Quantizer, place: str, call: Call) -> Part:
    values = _in_steps(quantizer, call.returned)
    limits = np.iinfo(quantizer.zero_point.dtype)
    integers = np.clip(np.rint(values), limits.min, limits.max)
    exact = _in_steps(quantizer, call.given)
    exact = np.where(np.abs(exact - integers) <= _HALF, exact, integers)  # what is clipped to the ends of the grid
    is_half = call.given.dtype in (torch.bfloat16, torch.float16)
    return Part(
        name=str(quantizer.node.outputs[0].name),
        place=place,
        integers=integers.astype(quantizer.zero_point.dtype),
        exact=exact.astype(np.float32),  # half of the memory, and exact enough
        largest=_MOST_STEPS_OF_HALF if is_half else _MOST_STEPS,
        is_on_grid=is_half or float(np.abs(values - integers).max(initial=0.0)) < _OFF_GRID,
    )


def _in_steps(quantizer: Quantizer, tensor: torch.Tensor) -> Array:
    """Returns a tensor as multiples of the quantizer's scale, plus its zero point: float64."""
    shape = [1] * tensor.ndim
    if quantizer.scale.size > 1:
        shape[quantizer.axis] = -1
    scale, zero_point = (array.astype(np.float64).reshape(shape) for array in (quantizer.scale, quantizer.zero_point))
    steps: Array = tensor.double().numpy() / scale + zero_point
    return steps


def _cut(path: Path, feeds: Mapping[str, Array]) -> Path:
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for node in graph.node:
        if node.output and node.output[0] in feeds:
            node.output[0] += _MADE
    described = [entry for entry in graph.value_info if entry.name not in feeds]
    del graph.value_info[:]
    graph.value_info.extend(described)
    for name, array in feeds.items():
        graph.input.append(_described(name, array))
        graph.output.append(_described(name + _MADE, array))
    written = path.with_name("cut.onnx")  # in the folder of the weights, if these have a file of their own
    onnx.save(model, written)
    return written


def tapped(path: Path, cut: Cut) -> Path:
    """Returns a file that computes the same and returns the integers behind each quantizer after its own outputs."""
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(_described(part.name, part.integers) for part in cut.parts)
    written = path.with_name("tapped.onnx")
    onnx.save(model, written)
    return written


def _described(name: str, array: Array) -> Any:
    import onnx  # noqa: PLC0415 - an extra

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)
