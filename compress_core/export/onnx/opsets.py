"""Writes a graph with an older operator set than torch does, where its operators allow that.

Whether an operator can be written is decided by the definitions that come with onnx: a node has to fit the definition
of its operator in the older set, in inputs, attributes and types. A few operators are rewritten. That what the file
computes is right is not concluded from this; it is run and compared with torch like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress_core.errors import ExportError

OLDEST = 13  # scales for each channel
OLDEST_OF_TORCH = 18
USUAL = 21  # integers of 16 bits

_REDUCTIONS = tuple(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def use_opset(graph: Any, opset: int) -> None:
    """Rewrites a graph for an older operator set.

    Args:
        graph: An `onnx_ir.Model` with at least the operator set 18; it is changed.
        opset: The version wanted.

    Raises:
        ExportError: An operator cannot be written; the message names it and the oldest version that works.
    """
    written = graph.opset_imports[""]
    if opset >= USUAL:
        return
    builder = _Builder(graph.graph)
    for node in list(graph.graph.all_nodes()):
        if node.domain == "" and opset < _SINCE.get(node.op_type, 0):
            _REWRITES[node.op_type](builder, node, opset)
    for node in graph.graph.all_nodes():
        _drop_defaults(node, opset, written)
    _check(graph, opset, written)
    graph.opset_imports[""] = opset
    graph.ir_version = min(graph.ir_version, _ir_version(opset))


def check_file(path: Path, opset: int) -> None:
    """Checks a file with an older operator set by onnx's own rules.

    Raises:
        ExportError: It breaks them.
    """
    import onnx  # noqa: PLC0415 - an extra

    if opset >= OLDEST_OF_TORCH:
        return
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"opset {opset}: the file is not valid: {found}; use {OLDEST_OF_TORCH} or more") from error


def _ir_version(opset: int) -> int:
    import onnx  # noqa: PLC0415 - an extra

    return min(int(row[1]) for row in onnx.helper.VERSION_TABLE if int(row[2]) >= opset)


def _check(graph: Any, opset: int, written: int) -> None:
    found: dict[str, tuple[int, Any]] = {}
    for node in graph.graph.all_nodes():
        if node.domain == "" and not _fits(node, opset):
            works = (version for version in range(opset + 1, max(written, USUAL) + 1) if _fits(node, version))
            found[node.op_type] = max(found.get(node.op_type, (0, None)), (next(works, written), node), key=_first)
    if not found:
        return
    named = ", ".join(
        f"{name} needs {version} ('{node.name}'{_kinds(node)})" for name, (version, node) in found.items()
    )
    lowest = max(version for version, _ in found.values())
    raise ExportError(f"opset {opset} cannot hold the model: {named}; use opset={lowest} or more. No file was written")


def _first(entry: tuple[int, Any]) -> int:
    return entry[0]


def _kinds(node: Any) -> str:
    """Returns the integer types of a quantize or dequantize operator, which are what it lacks."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return ""
    return f", {_type(node.inputs[2] if len(node.inputs) > 2 else node.inputs[0])}"


def _schema(node: Any, opset: int) -> Any:
    import onnx  # noqa: PLC0415 - an extra

    try:
        return onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    except onnx.defs.SchemaError:
        return None


def _type(value: Any) -> str:
    import onnx  # noqa: PLC0415 - an extra

    kind = value.const_value.dtype if value.const_value is not None else value.dtype
    return "" if kind is None else f"tensor({onnx.TensorProto.DataType.Name(int(kind)).lower()})"


def _fits(node: Any, opset: int) -> bool:
    schema = _schema(node, opset)
    if schema is None or not set(node.attributes) <= set(schema.attributes):
        return False
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    if len(inputs) > schema.max_input or len(node.outputs) > schema.max_output:
        return False
    values = [*zip(inputs, _formal(schema.inputs, len(inputs)), strict=True)]
    values += zip(node.outputs, _formal(schema.outputs, len(node.outputs)), strict=True)
    if any(value is not None and _type(value) not in ("", *formal.types) for value, formal in values):
        return False
    reduction = node.attributes.get_string("reduction", "none")
    return not (node.op_type.startswith("Scatter") and reduction in ("max", "min") and opset < OLDEST_OF_TORCH)


def _formal(formal: Sequence[Any], number: int) -> list[Any]:
    return [formal[min(index, len(formal) - 1)] for index in range(number)]


def _drop_defaults(node: Any, opset: int, written: int) -> None:
    """Removes attributes that the older definition lacks, where they say what it does anyway."""
    import onnx  # noqa: PLC0415 - an extra

    old, new = _schema(node, opset), _schema(node, written)
    if node.domain or old is None or new is None:
        return
    for name in set(node.attributes) - set(old.attributes):
        known = new.attributes.get(name)
        if known is None or not known.default_value.name:
            continue
        default = onnx.helper.get_attribute_value(known.default_value)
        default = default.decode() if isinstance(default, bytes) else default
        if node.attributes[name].value == default:
            del node.attributes[name]
    if "dilations" not in old.attributes and set(node.attributes.get_ints("dilations", ())) == {1}:
        del node.attributes["dilations"]


class _Builder:
    """Puts nodes in the place of others.

    Args:
        graph: The outermost graph, which holds constants.
    """

    def __init__(self, graph: Any) -> None:
        import onnx_ir  # noqa: PLC0415 - an extra

        self.ir = onnx_ir
        self._graph = graph
        self._taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)

    def constant(self, values: Any, near: str) -> Any:
        """Returns an initializer."""
        tensor = self.ir.tensor(np.asarray(values), name=self._free(f"{near}.constant"))
        value = self.ir.Value(
            name=tensor.name,
            shape=self.ir.Shape(tensor.numpy().shape),
            type=self.ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.initializers[value.name] = value
        return value

    def add(self, before: Any, operator: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        """Returns the output of a new node."""
        node = self.ir.node(operator, list(inputs), attributes or None)
        node.name = self._free(f"{before.name}.{operator}")
        node.outputs[0].name = self._free(f"{before.outputs[0].name}.{operator}")
        if operator != "Shape":
            node.outputs[0].type = before.outputs[0].type
        node.metadata_props.update(before.metadata_props)
        before.graph.insert_before(before, node)
        return node.outputs[0]

    def replace(self, node: Any, value: Any) -> None:
        """Removes a node; `value` takes the place and the name of its output."""
        output = node.outputs[0]
        name, graph = output.name, node.graph
        value.shape, value.type, value.doc_string = output.shape, output.type, output.doc_string
        value.metadata_props.update(output.metadata_props)
        for index, result in enumerate(graph.outputs):
            if result is output:
                graph.outputs[index] = value
        output.replace_all_uses_with(value)
        output.name = None
        graph.remove(node, safe=True)
        value.name = name

    def _free(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique


def _reduction(builder: _Builder, node: Any, opset: int) -> None:
    """The axes are an attribute before 18."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None and node.attributes.get_int("noop_with_empty_axes", 0):
        return
    if axes is not None:
        if axes.const_value is None:
            return
        values = [int(axis) for axis in axes.const_value.numpy().reshape(-1)]
        node.replace_input_with(1, None)
        node.resize_inputs(1)
        if values:
            node.attributes["axes"] = builder.ir.AttrInt64s("axes", values)
        elif node.attributes.get_int("noop_with_empty_axes", 0):
            builder.replace(node, builder.add(node, "Identity", [node.inputs[0]]))
            return
    node.attributes.pop("noop_with_empty_axes", None)


def _split(builder: _Builder, node: Any, opset: int) -> None:
    """Without sizes, the parts are equal before 18."""
    number = node.attributes.get_int("num_outputs", 0)
    if not number:
        return
    shape, axis = node.inputs[0].shape, node.attributes.get_int("axis", 0)
    size = None if shape is None else shape[axis]
    if not isinstance(size, int):
        return
    part = -(-size // number)
    sizes = [part] * (number - 1)
    split = builder.constant(np.array([*sizes, size - sum(sizes)], np.int64), str(node.name))
    node.resize_inputs(2)
    node.replace_input_with(1, split)
    del node.attributes["num_outputs"]


def _shape(builder: _Builder, node: Any, opset: int) -> None:
    """A part of a shape is cut out of it before 15."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2**31 - 1)
    if "start" not in node.attributes and "end" not in node.attributes:
        return
    limits = [builder.constant(np.array([value], np.int64), str(node.name)) for value in (start, end, 0)]
    whole = builder.add(node, "Shape", [node.inputs[0]])
    builder.replace(node, builder.add(node, "Slice", [whole, *limits]))


def _layer_norm(builder: _Builder, node: Any, opset: int) -> None:
    """Its formula before 17."""
    x, scale, bias = (*node.inputs, None)[:3]
    axis = node.attributes.get_int("axis", -1)
    if len(node.outputs) > 1 and any(output.uses() for output in node.outputs[1:]):
        return
    if axis >= 0:
        if x.shape is None:
            return
        axis -= len(x.shape)
    axes = list(range(axis, 0))

    def add(operator: str, *inputs: Any, **attributes: Any) -> Any:
        return builder.add(node, operator, inputs, **attributes)

    epsilon = builder.constant(np.float32(node.attributes.get_float("epsilon", 1e-5)), str(node.name))
    centered = add("Sub", x, add("ReduceMean", x, axes=axes, keepdims=1))
    variance = add("ReduceMean", add("Mul", centered, centered), axes=axes, keepdims=1)
    result = add("Mul", add("Div", centered, add("Sqrt", add("Add", variance, epsilon))), scale)
    builder.replace(node, result if bias is None else add("Add", result, bias))


def _hard_swish(builder: _Builder, node: Any, opset: int) -> None:
    """Its formula before 14."""
    factor = builder.add(node, "HardSigmoid", [node.inputs[0]], alpha=1 / 6, beta=0.5)
    builder.replace(node, builder.add(node, "Mul", [node.inputs[0], factor]))


def _gelu(builder: _Builder, node: Any, opset: int) -> None:
    """Its formula before 20; torch writes the other form, with a tangent, as it is."""
    if node.attributes.get_string("approximate", "none") != "none":
        return
    x = node.inputs[0]
    root, one, half = (builder.constant(np.float32(value), str(node.name)) for value in (math.sqrt(2), 1, 0.5))
    error = builder.add(node, "Erf", [builder.add(node, "Div", [x, root])])
    factor = builder.add(node, "Mul", [builder.add(node, "Add", [error, one]), half])
    builder.replace(node, builder.add(node, "Mul", [x, factor]))


def _grid_sample(builder: _Builder, node: Any, opset: int) -> None:
    """The modes have other names before 20."""
    older = {"linear": "bilinear", "cubic": "bicubic"}
    mode = node.attributes.get_string("mode", "linear")
    node.attributes["mode"] = builder.ir.AttrString("mode", older.get(mode, mode))


def _reshape(builder: _Builder, node: Any, opset: int) -> None:
    """A size of 0 means that of the input before 14."""
    sizes = node.inputs[1].const_value
    if sizes is not None and 0 not in sizes.numpy():
        node.attributes.pop("allowzero", None)


_REWRITES: dict[str, Callable[[_Builder, Any, int], None]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Split": _split,
    "Shape": _shape,
    "LayerNormalization": _layer_norm,
    "HardSwish": _hard_swish,
    "Gelu": _gelu,
    "GridSample": _grid_sample,
    "Reshape": _reshape,
}
# What is rewritten for older sets than this.
_SINCE = {
    **dict.fromkeys(_REDUCTIONS, 18),
    "Split": 18,
    "Shape": 15,
    "LayerNormalization": 17,
    "HardSwish": 14,
    "Gelu": 20,
    "GridSample": 20,
    "Reshape": 14,
}
