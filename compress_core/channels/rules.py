"""The rules that carry labels through operators: a table with a small function for each kind of ATen operator.

A rule takes a `Step` and returns the labels of the operator's results. Operators that torch tags as pointwise share one
rule. An operator without a rule is a barrier: all dimensions that it reads keep their size, and the report names it.
A plugin adds rules for its own operators as choices of the point `channels.rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from compress_core.channels.algebra import Algebra, Dims, Labels, Obstacle
from compress_core.trace.graph import Operator, Ref

Rule: TypeAlias = "Callable[[Step], list[Dims]]"

RULES: dict[str, Rule] = {}

# Each returns the rule that a plugin has for an operator, or None; only the last source is used. The registry registers
# itself here, because this layer cannot import it.
_sources: list[Callable[[str], Rule | None]] = []


def look_up_rules_with(source: Callable[[str], Rule | None]) -> None:
    """Makes `source` the one that provides rules for operators that are not in the table."""
    _sources.append(source)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of operators, named without overload, e.g. `aten.convolution`."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Step:
    """One operator of a trace, as the argument of a rule.

    Attributes:
        algebra: Joins and fixes labels.
        operator: The operator.
        labels: Labels of the values.
        shapes: Shapes of the values.
        activations: Values that depend on the input of the model.
    """

    algebra: Algebra
    operator: Operator
    labels: dict[int, Dims]
    shapes: list[tuple[int, ...]]
    activations: set[int] = field(default_factory=set)

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """Returns an argument, by position or by name."""
        if position < len(self.operator.arguments):
            return self.operator.arguments[position]
        return self.operator.keywords.get(name, default)

    def dims(self, argument: Any) -> Dims:
        """Returns a copy of the labels of a tensor argument; an empty list for None."""
        return list(self.labels[argument.value]) if isinstance(argument, Ref) else []

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Returns the shape of a tensor argument."""
        return self.shapes[argument.value] if isinstance(argument, Ref) else ()

    def tensors(self) -> list[Ref]:
        """Returns the tensor arguments."""
        return [Ref(value) for value in self.operator.inputs]

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the results."""
        return [self.shapes[value] for _, value in self.operator.outputs]

    def fix(self, labels: Labels | Iterable[Labels], reason: str) -> None:
        """Keeps dimensions at their size."""
        obstacle = Obstacle(self.operator.module, self.operator.name, reason)
        for entry in [labels] if labels is None or isinstance(labels, np.ndarray) else labels:
            self.algebra.fix(entry, obstacle)

    def met(self, column: Sequence[Labels]) -> Labels:
        """Joins dimensions that an operator combines; if one of them has a fixed size, fixes all and returns None."""
        tracked = [labels for labels in column if labels is not None]
        if tracked and len(tracked) < len(column):
            self.fix(tracked, "meets a tensor of fixed size")
            return None
        for other in tracked[1:]:
            self.algebra.join(tracked[0], other)
        return tracked[0] if tracked else None

    def same(self, dims: Sequence[Labels]) -> list[Dims]:
        """Returns `dims` for the first result, and no labels for further results."""
        return [list(dims), *(untracked(len(shape)) for shape in self.result_shapes[1:])]


def untracked(rank: int) -> Dims:
    """Returns the labels of a tensor whose dimensions do not depend on parameters."""
    return [None] * rank


def propagate(step: Step) -> list[Dims]:
    """Returns the labels of an operator's results."""
    name = step.operator.name.rpartition(".")[0]
    found = RULES.get(name) or (RULES.get(name.rstrip("_")) if name.endswith("_") else None)
    if found is None and not name.startswith("aten.") and _sources:
        found = _sources[-1](name)
    if found is not None:
        return found(step)
    if torch.Tag.pointwise in getattr(step.operator.function, "tags", ()):
        return pointwise(step)
    return barrier(step)


def barrier(step: Step) -> list[Dims]:
    """Handles an unknown operator: fixes all dimensions that it reads."""
    for tensor in step.tensors():
        step.fix(step.dims(tensor), "no rule says what this operator does with channels")
    return [untracked(len(shape)) for shape in step.result_shapes]


@rule(  # pointwise operators that torch does not tag as such
    "aten._prelu_kernel",
    "aten.copy",
    "aten.hardswish",
    "aten.log_sigmoid_forward",
    "aten.rrelu_with_noise",
    "aten.floor_divide",
    "aten.complex",
    "aten.polar",
    "aten.fake_quantize_per_tensor_affine",
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)
def pointwise(step: Step) -> list[Dims]:
    """Handles elementwise operators with broadcasting: joins the dimensions that they combine."""
    shape = step.result_shapes[0] if step.result_shapes else ()
    result: Dims = [None] * len(shape)
    operands = [(step.dims(tensor), step.shape(tensor)) for tensor in step.tensors()]
    for dim in range(-1, -len(shape) - 1, -1):
        meeting = [(d[dim], s[dim]) for d, s in operands if len(s) >= -dim]
        full = [(labels, size) for labels, size in meeting if size == shape[dim]]
        if len(full) < len(meeting):
            step.fix([labels for labels, size in meeting if size != shape[dim]], "is broadcast")
        tracked = [labels for labels, _ in full if labels is not None]
        if not tracked:
            continue
        if shape[dim] > 1 and len(tracked) < len(full):
            step.fix(tracked, "meets a tensor of fixed size")
            continue
        for other in tracked[1:]:
            step.algebra.join(tracked[0], other)
        result[dim] = tracked[0]
    return step.same(result)


@rule(
    "aten.clone",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh",
    "aten._to_copy",
    "aten.contiguous",
    "aten.native_dropout",
    "aten.bernoulli",
    "aten.dropout",
    "aten.rand_like",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.empty_like",
    "aten.full_like",
    "aten.randn_like",
    "aten.positive",
    "aten.exponential",
    "aten.normal",
    "aten.uniform",
    "aten.random",
    "aten._conj",
    "aten.resolve_conj",
    "aten.real",
    "aten.imag",
    "aten.lift",
)
def _same(step: Step) -> list[Dims]:
    return [step.dims(step.argument(0)) for _ in step.result_shapes]


@rule("aten.new_empty", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty_strided")
def _like(step: Step) -> list[Dims]:
    """Handles new tensors made like another one: dimensions of the same length are taken to be the same."""
    dims, shape, made = step.dims(step.argument(0)), step.shape(step.argument(0)), step.result_shapes[0]
    if len(shape) != len(made):
        return [untracked(len(made))]
    return [[labels if old == new else None for labels, old, new in zip(dims, shape, made, strict=True)]]


@rule("aten.fill", "aten.zero")
def _filled(step: Step) -> list[Dims]:
    return step.same(step.dims(step.argument(0)))
