"""Finds the first quantizer whose tensor departs from torch, each on torch's own activations.

As for ONNX, the graph is cut behind every quantizer: each part reads the numbers that torch computes with, and must
return the numbers that torch rounds to, up to the choice between two neighbours.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from compress_core.export.agreement import compared
from compress_core.export.executorch.program import lowered
from compress_core.export.executorch.runtime import Loaded
from compress_core.export.inputs import Inputs
from compress_core.export.notes import place_in_words
from compress_core.export.recording import Call, recorded
from compress_core.export.report import Agreement, LayerAgreement

_MOST_STEPS = 0.75  # half a step, and the rest for sums in float32 and biases in units of the accumulator
_OFF_GRID = 0.05  # of a step


@dataclass(frozen=True)
class Quantizer:
    """A quantizer of an activation in a graph.

    Attributes:
        node: Name of its quantize operator.
        scopes: Names of the modules that it was exported from, the outermost first.
        grid: scale, zero point, smallest and largest integer, as exported.
    """

    node: str
    scopes: tuple[str, ...]
    grid: tuple[float, int, int, int]

    def steps(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values in units of the grid's step, from its zero point: float64."""
        return values.double() / self.grid[0]

    def clipped(self, steps: torch.Tensor) -> torch.Tensor:
        """Returns steps within the ends of the grid."""
        _, zero_point, smallest, largest = self.grid
        return steps.clamp(smallest - zero_point, largest - zero_point)


@dataclass(frozen=True)
class Parts:
    """What the comparison by parts has found.

    Attributes:
        layers: The comparison at each quantizer, in the order of the graph.
        agreements: The outputs, computed from torch's own activations.
    """

    layers: tuple[LayerAgreement, ...]
    agreements: tuple[Agreement, ...]

    @property
    def departures(self) -> list[LayerAgreement]:
        """The quantizers at which the runtime computes something else than torch."""
        return [layer for layer in self.layers if not layer.steps <= _MOST_STEPS]


def quantizers_of(module: fx.GraphModule) -> list[Quantizer]:
    """Returns the quantizers of activations in a graph that was just exported."""
    target = torch.ops.quantized_decomposed.quantize_per_tensor.default
    found = []
    for node in module.graph.nodes:
        if node.target == target:
            scale, zero_point, smallest, largest = node.args[1:5]
            stack = node.meta.get("nn_module_stack") or {}
            scopes = tuple(str(entry[0]) for entry in stack.values())
            found.append(Quantizer(node.name, scopes, (scale, zero_point, smallest, largest)))
    return found


def compare_parts(
    module: fx.GraphModule, quantizers: Sequence[Quantizer], model: nn.Module, inputs: Inputs, names: Sequence[str]
) -> Parts | None:
    """Runs the parts of a graph on what torch computes, and returns how they differ from torch.

    Args:
        module: The graph as it is lowered.
        quantizers: What `quantizers_of` has found in it before the algorithms changed it.
        model: A copy of the compressed model of the sizes that the graph has, in eval mode on the CPU.
        inputs: The batch.
        names: Names of the outputs.

    Returns:
        None if there is nothing to cut, or a quantizer of the graph cannot be told from others.

    Raises:
        ExportError: ExecuTorch cannot lower or run the parts.
    """
    forward = recorded(model, inputs)
    there = {node.name for node in module.graph.nodes}
    of: dict[str, list[Quantizer]] = defaultdict(list)
    for quantizer in quantizers:
        name = next((forward.names[scope] for scope in reversed(quantizer.scopes) if scope in forward.names), None)
        if name is not None:
            of[name].append(quantizer)
    if not of or any(len(found) != len(forward.calls[name]) for name, found in of.items()):
        return None
    parts = [
        (quantizer, place_in_words(name, number if len(found) > 1 else None), call)
        for name, found in of.items()
        for number, (quantizer, call) in enumerate(zip(found, forward.calls[name], strict=True))
        if quantizer.node in there
    ]
    order = {quantizer.node: index for index, quantizer in enumerate(quantizers)}
    parts.sort(key=lambda part: order[part[0].node])
    feeds = [call.returned.float() for _, _, call in parts]
    program = lowered(
        _cut(module, [quantizer.node for quantizer, _, _ in parts]),
        replace(inputs, args=(*inputs.tensors, *feeds), kwargs={}),
        largest_batch=None,
        metadata={},
    )
    size = inputs.batch_size
    outputs = Loaded(program).run([*inputs.tensors, *feeds], size)
    own = len(outputs) - len(parts)
    layers = tuple(
        LayerAgreement(place, _steps_between(quantizer, call, actual))
        for (quantizer, place, call), actual in zip(parts, outputs[own:], strict=True)
    )
    agreements = compared(names, [entry.numpy() for entry in outputs[:own]], forward.outputs, size, True)
    return Parts(layers, tuple(agreements))


def _steps_between(quantizer: Quantizer, call: Call, actual: torch.Tensor) -> float:
    """Returns the largest distance from what torch rounds, in steps; infinite if torch's grid is another one."""
    rounded = quantizer.steps(call.returned)
    off_grid = float((rounded - rounded.round()).abs().max()) if rounded.numel() else 0.0
    beyond = float((rounded - quantizer.clipped(rounded)).abs().max()) if rounded.numel() else 0.0
    if actual.shape != call.returned.shape or not max(off_grid, beyond) < _OFF_GRID:
        return math.inf
    exact = quantizer.steps(call.given)
    exact = torch.where(
        (exact - rounded).abs() <= 0.5 + 1e-3, exact, rounded
    )  # what is clipped to the ends of the grid
    return float((quantizer.steps(actual) - exact).abs().max()) if exact.numel() else 0.0


def _cut(module: fx.GraphModule, nodes: Sequence[str]) -> fx.GraphModule:
    """Returns a graph that reads what is behind each quantizer, and returns what it makes there as further outputs."""
    parts = copy.deepcopy(module)
    graph = parts.graph
    by_name = {node.name: node for node in graph.nodes}
    (output,) = (node for node in graph.nodes if node.op == "output")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    operators: Any = torch.ops.quantized_decomposed
    made = []
    for number, name in enumerate(nodes):
        quantize = by_name[name]
        readers = list(quantize.users)
        with graph.inserting_after(inputs[-1]):
            inputs.append(graph.placeholder(f"activation_{number}"))
        with graph.inserting_after(quantize):
            given = graph.call_function(quantize.target, (inputs[-1], *quantize.args[1:]))
        for reader in readers:
            reader.replace_input_with(quantize, given)
        with graph.inserting_before(output):
            made.append(graph.call_function(operators.dequantize_per_tensor.default, (quantize, *quantize.args[1:])))
    output.args = ((*output.args[0], *made),)
    graph.set_codegen(fx.graph.CodeGen())
    parts.recompile()
    return parts
