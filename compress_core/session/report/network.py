"""The network of a report: its layers in the order of the forward, what feeds what, and the figures of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from compress_core.contract.stages import Stage
from compress_core.contract.statistics import ByLayer
from compress_core.errors import CompressionError
from compress_core.pages import Block, Flow, Picture, Text, columns_svg
from compress_core.trace.graph import Call, ForwardTrace, ValueId
from compress_core.transforms import transformed_weight
from compress_core.transforms.layers import weight_tensors

# With more rows than this, places where branches meet and layers that are called again have no row of their own.
_MOST_ROWS = 500


@dataclass(frozen=True)
class Layer:
    """A weight of the model.

    Attributes:
        name: Dotted name of the weight.
        module: Dotted name of the module that has it.
        kind: Class of that module.
        shape: Its shape.
        zeros: Measured share of its elements that is zero behind masks; None if it could not be read.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    zeros: float | None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


def layers_of(model: nn.Module, more: Iterable[str] = ()) -> list[Layer]:
    """Returns the weights of a model, in the order of `named_modules`.

    Args:
        model: The model.
        more: Names of further parameters, such as weights of layers of the user's own.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {t.name: tuple(t.shape) for t in weight_tensors(model, "") if t.parameter is not None}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    shapes = {**known, **{name: parameters[name] for name in more if name in parameters}}
    found = []
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0]
        kind = type(modules[owner]).__name__ if owner in modules else ""
        found.append(Layer(name, owner, kind, shape, _zeros(model, name)))
    return found


def _zeros(model: nn.Module, name: str) -> float | None:
    try:
        weight = transformed_weight(model, name, Stage.PRECISION)
        return float((weight == 0).float().mean()) if weight.numel() and not weight.is_meta else None
    except (CompressionError, RuntimeError):
        return None


@dataclass(frozen=True)
class Step:
    """A row of the network: a module with weights, a place where branches meet, the input or the output.

    Attributes:
        label: What it is.
        module: Dotted name of the module; None for the others.
    """

    label: str
    module: str | None = None


class Steps:
    """The steps of a forward and the links between them.

    Args:
        forward: The trace of a forward without transforms.
        modules: Dotted names of the modules with weights.
        in_full: Whether places where branches meet, and layers that are called again, are steps.
    """

    def __init__(self, forward: ForwardTrace, modules: set[str], *, in_full: bool) -> None:
        self._forward, self._modules, self._in_full = forward, modules, in_full
        self.steps = [Step("input")]
        self.links: set[tuple[int, int]] = set()
        # A call of a module -> its step; a module that is called again has several.
        self._numbers: dict[tuple[str, int], int] = {}
        self._first: dict[str, int] = {}
        # A value comes from one step, because what reads two is a step; if not all are, it comes from several.
        self._sources: dict[ValueId, frozenset[int]] = {v.index: frozenset([0]) for v in forward.inputs}
        for call in forward.calls:
            self._take(call)
        last = self._add(Step("output"))
        for value in forward.outputs:
            self._link(self._sources.get(value.index, frozenset()), last)

    @property
    def reached(self) -> set[str]:
        """The modules that have a step."""
        return {step.module for step in self.steps if step.module is not None}

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _link(self, sources: frozenset[int], number: int) -> frozenset[int]:
        self.links |= {(source, number) for source in sources if source != number}
        return frozenset([number])

    def _take(self, call: Call) -> None:
        given = frozenset[int]().union(*(self._sources.get(value, ()) for _, value in call.inputs))
        owners = self._owners(call)
        for key in owners:
            given = self._link(given, self._number(key))
        if not owners and len(given) > 1 and self._in_full:
            given = self._link(given, self._add(Step(call.function.rpartition(".")[2].strip("_"))))
        if given:
            self._sources |= dict.fromkeys([*(v for _, v in call.outputs), *call.overwritten], given)

    def _owners(self, call: Call) -> list[tuple[str, int]]:
        """Returns the modules with weights that make a call, or whose weights it reads, each with which call it is."""
        found = [(f.module, f.invocation) for f in reversed(call.frames) if f.module in self._modules][:1]
        names = [self._forward.values[value].parameter.rpartition(".")[0] for _, value in call.inputs]
        own = {module for module, _ in found}
        others = [name for name in dict.fromkeys(names) if name in self._modules - own]
        if found:  # attention, for example, reads the weight of its last projection without calling that
            return [*found, *((name, 0) for name in others)]
        return [(name, call.index) for name in others[:1]]

    def _number(self, key: tuple[str, int]) -> int:
        module = key[0]
        if key not in self._numbers:
            first = self._first.get(module)
            if first is None:
                self._numbers[key] = self._first[module] = self._add(Step(module, module))
            else:
                self._numbers[key] = self._add(Step(f"{module} again")) if self._in_full else first
        return self._numbers[key]


def network_blocks(layers: Sequence[Layer], columns: Sequence[ByLayer], forward: ForwardTrace | None) -> list[Block]:
    """Returns the pictures of the network.

    Args:
        layers: The weights.
        columns: The figures of layers, from all algorithms.
        forward: The trace of a forward without transforms; None if there is none.
    """
    if not layers:
        return [Text("The model has no layer with weights.")]
    columns = _with_measured(layers, columns)
    modules = {layer.module for layer in layers}
    steps, links = (
        [Step(name, name) for name in dict.fromkeys(layer.module for layer in layers)],
        set[tuple[int, int]](),
    )
    unreached: set[str] = set()
    if forward is not None:
        found = Steps(forward, modules, in_full=True)
        if len(found.steps) > _MOST_ROWS:
            found = Steps(forward, modules, in_full=False)
        unreached = modules - found.reached
        links = found.links
        steps = [*found.steps, *(step for step in steps if step.module in unreached)]
    by_module: dict[str, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)
    in_order = [layer for step in steps if step.module is not None for layer in by_module[step.module]]
    return [_columns(in_order, columns), _flow(steps, links, by_module, columns, unreached)]


def _with_measured(layers: Sequence[Layer], columns: Sequence[ByLayer]) -> list[ByLayer]:
    """Adds the measured share of zeros if an algorithm has made zeros and says nothing of it."""
    if any(column.kind in ("zeros", "pruned") for column in columns) or not any(layer.zeros for layer in layers):
        return list(columns)
    return [
        ByLayer("zeros", {layer.name: layer.zeros for layer in layers if layer.zeros is not None}, "zeros"),
        *columns,
    ]


def _value(column: ByLayer, layer: Layer) -> float | None:
    return column.values.get(layer.name, column.values.get(layer.module))


def _columns(layers: Sequence[Layer], columns: Sequence[ByLayer]) -> Picture:
    pruned = [column for column in columns if column.kind == "pruned"]
    parts = []
    for layer in layers:
        zeros = layer.zeros or 0.0
        # Filters that are pruned are zeros, too.
        gone = min(max((_value(column, layer) or 0.0 for column in pruned), default=0.0), zeros)
        parts.append([("kept", 1 - zeros), ("zeros", zeros - gone), ("pruned", gone)])
    total = sum(layer.elements for layer in layers)
    kept = sum(layer.elements * (1 - (layer.zeros or 0.0)) for layer in layers)
    words = (
        f"{len(layers)} weights with {total:,} elements, of which {kept:,.0f} are not zero. The figures of each are in "
        "the table below."
    )
    names = "kept (blue), zero (orange)" + (", in pruned filters (grey)" if pruned else "")
    caption = (
        "A column for each weight, in the order of the forward; its area in each color is a share of its elements: "
        f"{names}. Heights are square roots of the numbers of elements."
    )
    svg = columns_svg([math.sqrt(layer.elements) for layer in layers], parts)
    return Picture(svg, words, caption)


def _flow(
    steps: Sequence[Step],
    links: Iterable[tuple[int, int]],
    by_module: Mapping[str, Sequence[Layer]],
    columns: Sequence[ByLayer],
    unreached: set[str],
) -> Flow:
    rows: list[tuple[object, ...]] = []
    first: list[int] = []  # number of a step -> its first row
    small = []
    for step in steps:
        first.append(len(rows))
        if step.module is None:
            small.append(len(rows))
            rows.append((step.label, "", "", None, *(None for _ in columns)))
            continue
        for layer in by_module[step.module]:
            kind = f"{layer.kind}, not reached" if step.module in unreached else layer.kind
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, kind, shape, layer.elements, *(_value(column, layer) for column in columns)))
    heads = ("weight", "layer", "shape", "elements", *(column.title for column in columns))
    is_share = ("zeros", "pruned", "share")
    shares = [4 + number for number, column in enumerate(columns) if column.kind in is_share]
    lengths = {
        4 + number: max([8.0, *column.values.values()])
        for number, column in enumerate(columns)
        if column.kind == "bits"
    }
    moved = [(first[start], first[end]) for start, end in links]
    return Flow("Layers in the order of the forward", heads, rows, shares, lengths, moved, small)


def combined(columns: Mapping[str, Sequence[ByLayer]]) -> list[ByLayer]:
    """Returns the figures of all algorithms; those that have the same title get the name of their algorithm.

    Args:
        columns: Name of an algorithm or initializer -> its figures.
    """
    titles = [column.title for found in columns.values() for column in found]
    return [
        replace(column, title=f"{column.title} ({name})") if titles.count(column.title) > 1 else column
        for name, found in columns.items()
        for column in found
        if column.values
    ]
