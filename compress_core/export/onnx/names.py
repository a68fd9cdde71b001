"""Names the inputs and outputs of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from compress_core.errors import UsageError


def name_inputs_and_outputs(graph: Any, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    """Names the inputs and outputs of an `onnx_ir.Model`; other values that have one of the names are renamed.

    Args:
        graph: The model; it is changed.
        input_names: Names of its inputs, in order; None keeps the present ones.
        output_names: Names of its outputs, in order; None keeps the present ones.

    Raises:
        UsageError: There are more names than tensors, or fewer, or a name is empty or given twice.
    """
    given = {
        "input_names": (list(graph.graph.inputs), input_names),
        "output_names": (list(graph.graph.outputs), output_names),
    }
    names = [name for _, wanted in given.values() for name in wanted or ()]
    for option, (values, wanted) in given.items():
        if wanted is None:
            continue
        what = option.removesuffix("_names") + "s" * (len(values) != 1)
        if len(wanted) != len(values):
            own = ", ".join(str(value.name) for value in values)
            raise UsageError(f"{option}: {len(wanted)} names for {len(values)} {what} ({own})")
        for name in wanted:
            if not isinstance(name, str) or not name:
                raise UsageError(f"{option}: {name!r} is no name; give one or more characters")
            if names.count(name) > 1:
                raise UsageError(f"{option}: {name!r} is given twice; a file needs different names")
    renamed = [pair for values, wanted in given.values() for pair in zip(values, wanted or (), strict=False)]
    chosen = {id(value) for value, _ in renamed}
    others = [value for value in _values(graph) if id(value) not in chosen]
    taken = {value.name for value in others} | set(names)
    for value in others:
        if value.name in names:
            value.name = _free(value.name, taken)
            taken.add(value.name)
    for value, _ in renamed:  # so that names can be exchanged
        value.name = None
    for value, name in renamed:
        value.name = name


def _values(graph: Any) -> Iterable[Any]:
    yield from graph.graph.inputs
    yield from graph.graph.initializers.values()
    for node in graph.graph.all_nodes():
        yield from node.outputs


def _free(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
