"""Finds operators that torch's exporter lacks, and says where a model uses them."""

from __future__ import annotations

import re

import torch

from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE

_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'")


def missing_operator(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Returns which operator of a program torch cannot export, and where it comes from.

    Args:
        program: The program.
        error: What torch's exporter has raised.

    Returns:
        Text for a message; empty if the error is about something else.
    """
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__  # type: ignore[assignment]
    found = _OPERATOR.search("\n".join(texts[::-1]))
    if found is None or not any("No ONNX function" in text or "No decompositions" in text for text in texts):
        return ""
    name = found.group(1)
    text = f"it has no ONNX form of the operator {name}"
    nodes = _calls(program, name)
    if not nodes:  # what torch makes of other operators
        nodes = _calls(program, f"aten.special_{name.rpartition('.')[2]}")
    if not nodes:
        return text
    scope, module = _place(nodes[0])
    line = _line(nodes[0])
    text += (
        f" in '{scope or 'the model'}'" + (f" ({module})" if module else "") + (f", called at {line}" if line else "")
    )
    if not name.startswith("aten.") and ACTIVATIONS_ATTRIBUTE in scope:
        layer = scope.partition(ACTIVATIONS_ATTRIBUTE)[0].rstrip(".")
        text += f"; it belongs to the quantizer there: put '{layer}' into ignored_scopes"
    return f"{text}. Compute it outside the model, or write it with operators that ONNX has"


def _calls(program: torch.export.ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and re.fullmatch(rf"{re.escape(name)}(\.\w+)?", str(node.target))
    ]


def _place(node: torch.fx.Node) -> tuple[str, str]:
    """Returns the innermost module that a node comes from: its name and class."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    name, cls = list(stack.values())[-1]
    return str(name).removeprefix("L['self'].").removeprefix("L['self']"), str(cls).rpartition(".")[2]


def _line(node: torch.fx.Node) -> str:
    """Returns the file's name and line that calls an operator."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{found[-1][0].rpartition('/')[2]}:{found[-1][1]}" if found else ""
