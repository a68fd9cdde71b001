"""The multiplications of an ONNX file, and which of them a runtime executes in integers."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.export.report import Work
from compress_core.export.runtimes.runtime import Array, Executed, Runtime, RuntimeSession

Shape = tuple[int, ...]

# What only moves tensors may carry the name of the layer for which it does so.
_MOVING = frozenset(["Const", "Input", "Output", "Parameter", "Reorder", "Reshape", "Result", "Transpose"])
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Activations that runtimes fuse with the operator before, and what passes values on.
_BETWEEN = frozenset(["Relu", "Clip", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "MaxPool"])


@dataclass(frozen=True)
class Execution:
    """A file that was run in a runtime.

    Attributes:
        path: The file.
        runtime: The runtime.
        feeds: The inputs by name.
        executed: What the runtime has executed.
    """

    path: Path
    runtime: Runtime
    feeds: Mapping[str, Array]
    executed: Sequence[Executed]

    @classmethod
    def of(cls, path: Path, runtime: Runtime, feeds: Callable[[RuntimeSession], Mapping[str, Array]]) -> Execution:
        """Runs a file.

        Args:
            path: The file.
            runtime: The runtime.
            feeds: Returns the inputs by the names that a session gives them.
        """
        session = runtime.load(path, profile=True)
        named = feeds(session)
        return cls(path, runtime, named, session.executed(named))


def work_of(execution: Execution, places: Mapping[str, str]) -> tuple[Work, ...]:
    """Returns the nodes of a file that multiply matrices, with what the runtime made of them.

    Args:
        execution: The file and its run.
        places: Name of a node -> the module that it was exported from.
    """
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load(execution.path, load_external_data=False)
    known = _shapes(model, execution)
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    multiplying = {node.name: (node, macs) for node in model.graph.node if (macs := macs_of(node, known)) != 0}
    kernels = _kernels(multiplying, execution.executed)
    found = []
    for name, (node, macs) in multiplying.items():
        own = kernels.get(name, [])
        is_integer = any(entry.is_integer for entry in own)
        is_quantized = any(_is_dequantized(makers.get(value)) for value in node.input[:2])
        reason = "" if is_integer else _reason(node, makers, readers, bool(own))
        kernel = next((entry.operator for entry in own), "")
        found.append(Work(places.get(name, name), node.op_type, macs, is_quantized, is_integer, kernel, reason))
    return tuple(found)


def macs_of(node: Any, shapes: Mapping[str, Shape]) -> int | None:
    """Returns the multiplications of a node: 0 if it is no layer, None if a shape is not known."""
    count = _COUNTS.get(node.op_type)
    if count is None:
        return 0
    first, second, result = (shapes.get(name) for name in (*node.input[:2], next(filter(None, node.output))))
    return None if first is None or second is None or result is None else count(node, first, second, result)


def _of_gemm(node: Any, first: Shape, second: Shape, result: Shape) -> int:
    is_transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return math.prod(result) * first[0 if is_transposed else 1]


def _of_recurrent(node: Any, first: Shape, second: Shape, result: Shape) -> int:
    (steps, batch, inputs), (directions, rows) = first, second[:2]
    return steps * batch * directions * rows * (inputs + rows // _GATES[node.op_type])


# Node, shapes of the input, of the weight and of the output -> multiplications.
_COUNTS: dict[str, Callable[[Any, Shape, Shape, Shape], int]] = {
    "Conv": lambda node, first, second, result: math.prod(result) * math.prod(second[1:]),
    "ConvTranspose": lambda node, first, second, result: math.prod(first) * math.prod(second[1:]),
    "MatMul": lambda node, first, second, result: math.prod(result) * first[-1],
    "Gemm": _of_gemm,
    **dict.fromkeys(_GATES, _of_recurrent),
}


def _shapes(model: Any, execution: Execution) -> dict[str, Shape]:
    """Returns the shapes of the tensors that layers read and write, of others as far as they are known."""
    found = _inferred(model, {name: tuple(array.shape) for name, array in execution.feeds.items()})
    wanted = [
        name
        for node in model.graph.node
        if node.op_type in _COUNTS
        for name in (*node.input[:2], next(filter(None, node.output)))
    ]
    missing = [name for name in dict.fromkeys(wanted) if name not in found]
    return found | _measured(missing, execution) if missing else found


def _measured(names: Sequence[str], execution: Execution) -> dict[str, Shape]:
    """Returns the shapes that tensors have in a run, for those that ONNX cannot infer."""
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load(execution.path, load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    # In the folder of the weights, if these have a file of their own: runtimes look for it there and nowhere else.
    has_data = any(tensor.external_data for tensor in model.graph.initializer)
    folder = execution.path.parent if has_data else None
    descriptor, path = tempfile.mkstemp(suffix=".onnx", prefix=".shapes-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(model.SerializeToString())
        session = execution.runtime.load(Path(path), optimized=False)
        result = dict(zip(session.outputs, session.run(execution.feeds), strict=True))
    finally:
        Path(path).unlink()
    return {name: tuple(result[name].shape) for name in names}


def _inferred(model: Any, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shapes of tensors that ONNX can infer, for inputs of these shapes."""
    import onnx  # noqa: PLC0415 - an extra

    model = _copy(model)
    for value in model.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, shapes[value.name], strict=False):
                dim.dim_value = size
    # What the exporter has noted holds for sizes that vary.
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _copy(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _kernels(names: Iterable[str], executed: Sequence[Executed]) -> dict[str, list[Executed]]:
    """Returns what was executed for each node: runtimes append to the names of the nodes that they fuse."""
    known = set(names)
    found: dict[str, list[Executed]] = {}
    for entry in executed:
        if entry.operator in _MOVING:
            continue
        for part in dict.fromkeys([*entry.nodes, entry.name]):
            name = _node_of(part, known)
            if name is not None and entry not in found.setdefault(name, []):
                found[name].append(entry)
    return found


def _node_of(name: str, known: set[str]) -> str | None:
    while name and name not in known:
        name = name[: max(name.rfind("/"), name.rfind("_"), 0)]
    return name or None


def _is_dequantized(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _reason(node: Any, makers: Mapping[str, Any], readers: Mapping[str, list[Any]], is_found: bool) -> str:
    """Returns why a node is not computed in integers, as far as the file shows it."""
    if node.op_type in _GATES:
        return "runtimes compute recurrent layers in floating point"
    given = ["input", "weight"] if node.op_type != "MatMul" else ["first input", "second input"]
    plain = [
        f"its {word}" for word, name in zip(given, node.input, strict=False) if not _is_dequantized(makers.get(name))
    ]
    if plain:
        return f"{' and '.join(plain)} {'is' if len(plain) == 1 else 'are'} not quantized"
    following = node
    while len(reader := readers.get(following.output[0], [])) == 1 and reader[0].op_type in _BETWEEN:
        following = reader[0]
    if not reader or any(entry.op_type != "QuantizeLinear" for entry in reader):
        return "its output is not quantized"
    return "the runtime has no integer kernel for it" if is_found else "the runtime does not say how it computes it"
