"""Renders traces as text, as a Graphviz graph, or as a picture."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from compress_core.errors import UsageError
from compress_core.trace.graph import Call, Forwards, ForwardTrace, Operator, Value, ValueId
from compress_core.transforms.places import Path

Level: TypeAlias = Literal["calls", "operators"]
LEVELS: tuple[Level, ...] = ("calls", "operators")

# Time limit for Graphviz in seconds; it may never finish on a large graph.
_PATIENCE = 300
_WIDEST_RULE = 100
_INDENT = "    "
_STYLE = (
    'graph [fontname="Helvetica", fontsize=11, style=rounded, color="#9aa5b1", labeljust=l];',
    'node [shape=box, style="rounded,filled", fillcolor="#f5f7fa", color="#52606d", margin="0.12,0.05", height=0.3,',
    '      fontname="Helvetica", fontsize=11];',
    'edge [fontname="Helvetica", fontsize=9, color="#52606d", fontcolor="#52606d", arrowsize=0.7];',
)


def to_text(trace: Forwards, level: Level = "calls") -> str:
    """Returns tables of the forwards: number, module, function, inputs -> outputs; then the modules not reached.

    Args:
        trace: The trace.
        level: `calls` of functions, or ATen `operators`.
    """
    parts = [_forward_text(title, forward, level) for title, forward in _titled(trace)]
    parts += [f"{title}: the model fails in training mode on this example" for title in _failed(trace)]
    unreached = trace.unreached
    if unreached:
        lines = [f"  {name} ({trace.modules[name]})" for name in unreached]
        parts.append("\n".join(["Modules that no example has reached:", *lines]))
    return "\n\n".join(parts)


def to_dot(trace: Forwards, level: Level = "calls", forward: int = 0) -> str:
    """Returns one forward as a graph in the language of Graphviz.

    Modules are boxes around their calls. Edges are tensors, with their shapes. Parameters are not drawn, nor are steps
    that read only parameters and whose result is not used.

    Args:
        trace: The trace.
        level: `calls` of functions, or ATen `operators`.
        forward: Index of the forward in `Trace.forwards`.

    Raises:
        UsageError: There is no such forward.
    """
    if not 0 <= forward < len(trace.forwards):
        raise UsageError(f"there is no forward {forward}: the trace has {len(trace.forwards)}, counted from 0")
    return _Dot(trace.forwards[forward], _level(level), trace.modules).text()


def to_svg(trace: Forwards, level: Level = "calls", forward: int = 0) -> str:
    """Returns one forward as a picture, drawn by the program `dot` of Graphviz; arguments as in `to_dot`.

    Raises:
        UsageError: Graphviz is not installed, or fails.
    """
    source = to_dot(trace, level, forward)
    program = shutil.which("dot")
    if program is None:
        raise UsageError(
            "a picture needs the program 'dot', which is not on the PATH: install Graphviz (apt-get install graphviz, "
            "brew install graphviz, or graphviz.org), or write a .dot file"
        )
    try:
        done = subprocess.run(
            [program, "-Tsvg"], input=source, capture_output=True, encoding="utf-8", timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"Graphviz did not finish within {_PATIENCE} s: the graph is too large to draw; write a .dot or .txt file"
        ) from None
    except OSError as error:
        raise UsageError(f"Graphviz fails: {error}") from error
    if done.returncode != 0:
        raise UsageError(f"Graphviz fails: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _level(level: str) -> Level:
    for known in LEVELS:
        if level == known:
            return known
    raise UsageError(f"there is no level {level!r}; levels are {' and '.join(LEVELS)}")


# Text.


def _titled(trace: Forwards) -> Iterator[tuple[str, ForwardTrace]]:
    for name, forwards in (("eval mode", trace.forwards), ("training mode", trace.training)):
        for number, forward in enumerate(forwards):
            if forward is not None:
                yield _title(name, number, len(forwards)), forward


def _failed(trace: Forwards) -> Iterator[str]:
    for number, forward in enumerate(trace.training):
        if forward is None:
            yield _title("training mode", number, len(trace.training))


def _title(name: str, number: int, count: int) -> str:
    return f"Forward in {name}" if count == 1 else f"Forward in {name}, example {number + 1} of {count}"


def _forward_text(title: str, forward: ForwardTrace, level: Level) -> str:
    kind = ", on real values because the forward needs them" if forward.real else ""
    rows = [("#", "module", "call" if _level(level) == "calls" else "operator", "inputs -> outputs")]
    rows += [
        (str(step.index), step.module or "(model)", _short(_function(step)), _signature(forward, step))
        for step in _steps(forward, level)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{number:>{widths[0]}}  {module:<{widths[1]}}  {function:<{widths[2]}}  {rest}".rstrip()
        for number, module, function, rest in rows
    ]
    lines.insert(1, "-" * min(_WIDEST_RULE, max(map(len, lines))))
    return "\n".join([f"{title}: {counts_text(forward)}{kind}", *lines])


def counts_text(forward: ForwardTrace) -> str:
    """Returns the numbers of calls and operators in a forward: `1 call, 2 operators`."""
    counts = {"call": len(forward.calls), "operator": len(forward.operators)}
    return ", ".join(f"{number} {what}" if number == 1 else f"{number} {what}s" for what, number in counts.items())


def _steps(forward: ForwardTrace, level: Level) -> list[Call] | list[Operator]:
    return forward.calls if level == "calls" else forward.operators


def _function(step: Call | Operator) -> str:
    return step.function if isinstance(step, Call) else step.name


def _short(function: str) -> str:
    return re.sub(r"^(aten\.|torch\.(nn\.functional\.)?)|\.default$", "", function)


def _inputs(step: Call | Operator) -> list[ValueId]:
    return [value for _, value in step.inputs] if isinstance(step, Call) else step.inputs


def _results(step: Call | Operator) -> list[ValueId]:
    return list(dict.fromkeys([*(value for _, value in step.outputs), *step.overwritten]))


def _signature(forward: ForwardTrace, step: Call | Operator) -> str:
    given = ", ".join(_described(forward.values[value], step.module) for value in _inputs(step))
    made = ", ".join(_described(forward.values[value], step.module) for value in _results(step))
    note = " (in place)" if isinstance(step, Call) and step.writes else ""
    return f"{given} -> {made}{note}".strip()


def _described(value: Value, module: str) -> str:
    marks = [f"{kind} {path_text(path)}".rstrip() for kind, paths in _ends(value) for path in paths]
    name = value.parameter or f"%{value.index}"
    if module and name.startswith(f"{module}."):
        name = name[len(module) :]  # `.weight` of the module that the line is about
    return f"{name}:{_shape(value)}" + (f" <{', '.join(marks)}>" if marks else "")


def _ends(value: Value) -> tuple[tuple[str, list[Path]], tuple[str, list[Path]]]:
    return ("input", value.inputs), ("output", value.outputs)


def _shape(value: Value) -> str:
    sizes = "x".join(map(str, value.shape))
    kind = str(value.dtype).removeprefix("torch.")
    # Almost all tensors are float32, so only other dtypes are shown.
    return f"[{sizes}]" if kind == "float32" else f"{kind}[{sizes}]"


def path_text(path: Path) -> str:
    """Returns a path as text for messages: `0.hidden_states`."""
    return ".".join(str(part) for part in path)


# Graphviz.


@dataclass
class _Cluster:
    """The box of a module: its own calls and the boxes of its submodules, in the order of the forward."""

    name: str
    items: list[Call | Operator | _Cluster] = field(default_factory=list)
    children: dict[str, _Cluster] = field(default_factory=dict)

    def child(self, name: str) -> _Cluster:
        """Returns the box of a module inside this one."""
        if name not in self.children:
            self.children[name] = _Cluster(name)
            self.items.append(self.children[name])
        return self.children[name]

    @property
    def label(self) -> str:
        """The last part of the module's name."""
        return self.name.rpartition(".")[2]


class _Dot:
    def __init__(self, forward: ForwardTrace, level: Level, classes: dict[str, str]) -> None:
        self._forward = forward
        self._steps = _steps(forward, level)
        self._classes = classes
        self._drawn: set[str] = set()
        self._lines: list[str] = []

    def text(self) -> str:
        self._lines = ["digraph trace {", *(_INDENT + line for line in _STYLE)]
        for value in self._forward.values:
            self._ends_at(value)
        edges = self._edges()
        self._write(self._clusters(), 1)
        self._lines += edges
        self._lines.append("}")
        return "\n".join(self._lines) + "\n"

    def _add(self, indent: int, line: str) -> None:
        self._lines.append(_INDENT * indent + line)

    def _ends_at(self, value: Value) -> None:
        for prefix, (kind, paths), colour in zip(("in", "out"), _ends(value), ("#d9f2e3", "#fde8d0"), strict=True):
            if paths:
                label = f"{kind} {', '.join(map(path_text, paths))}".rstrip() + f"\n{_shape(value)}"
                self._add(1, f'{prefix}{value.index} [label={quoted(label)}, shape=ellipse, fillcolor="{colour}"];')

    def _clusters(self) -> _Cluster:
        # Nested by name and not by caller, so that a module that two others call has one box.
        root = _Cluster("")
        for step in (step for step in self._steps if f"n{step.index}" in self._drawn):
            cluster = root
            parts = step.module.split(".") if step.module else []
            for end in range(1, len(parts) + 1):
                cluster = cluster.child(".".join(parts[:end]))
            cluster.items.append(step)
        return root

    def _write(self, cluster: _Cluster, indent: int) -> None:
        for item in cluster.items:
            if not isinstance(item, _Cluster):
                self._node(item, indent)
            elif len(item.items) == 1 and not isinstance(item.items[0], _Cluster):
                self._node(item.items[0], indent, item.label)  # a box around one node would add no information
            else:
                self._add(indent, f"subgraph {quoted('cluster ' + item.name)} {{")
                kind = self._classes.get(item.name)
                self._add(indent + 1, f"label={quoted(f'{item.label}: {kind}' if kind else item.label)};")
                self._write(item, indent + 1)
                self._add(indent, "}")

    def _node(self, step: Call | Operator, indent: int, module: str = "") -> None:
        label = _short(_function(step))
        tooltip = f"#{step.index} {_function(step)}: {_signature(self._forward, step)}"
        label = f"{module}: {label}" if module else label
        self._add(indent, f"n{step.index} [label={quoted(label)}, tooltip={quoted(tooltip)}];")

    def _edges(self) -> list[str]:
        lines = []
        # Parameters and constants come from no node, and are not drawn.
        latest = {value.index: f"in{value.index}" for value in self._forward.values if value.inputs}
        for step in self._steps:
            for value in dict.fromkeys(_inputs(step)):
                lines += self._edge(latest, value, f"n{step.index}")
            # A tensor that a call returns unchanged (dropout in eval mode) is drawn as passing through it.
            latest.update(dict.fromkeys(_results(step), f"n{step.index}"))
        for result in self._forward.outputs:
            lines += self._edge(latest, result.index, f"out{result.index}")
        return lines

    def _edge(self, latest: dict[ValueId, str], value: ValueId, to: str) -> list[str]:
        if value not in latest:
            return []
        self._drawn |= {latest[value], to}
        # The space keeps the label off the line.
        label = quoted(f" {_shape(self._forward.values[value])}")
        return [f"{_INDENT}{latest[value]} -> {to} [label={label}];"]


def quoted(text: str) -> str:
    """Returns text as a quoted string of Graphviz, with everything escaped except line breaks."""
    escaped = (
        text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "\\n")
    )
    return f'"{escaped}"'
