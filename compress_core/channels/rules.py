"""How operators carry labels: a table of small functions, one for each kind of ATen operator.

A rule takes a `Step` and returns the labels of the operator's results. Operators that are tagged pointwise share one
rule. An operator without a rule is a barrier: all dimensions that it reads keep their size, and the report names it.
`@rule("aten.name")` adds one, in a third party's package as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from compress_core.channels.algebra import Algebra, Dims, Labels, Obstacle, Role
from compress_core.trace.graph import Operator, Ref

Rule: TypeAlias = "Callable[[Step], list[Dims]]"

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of operators; names are without overload, e.g. `aten.convolution`."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Step:
    """One operator, as a rule sees it.

    Attributes:
        algebra: Where labels are joined and fixed.
        operator: The operator.
        labels: Labels of the values.
        shapes: Shapes of the values.
    """

    algebra: Algebra
    operator: Operator
    labels: dict[int, Dims]
    shapes: list[tuple[int, ...]]

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

    def same(self, dims: Sequence[Labels]) -> list[Dims]:
        """Returns `dims` for the first result; further results carry nothing."""
        return [list(dims), *(untracked(len(shape)) for shape in self.result_shapes[1:])]


def untracked(rank: int) -> Dims:
    """Returns the labels of a tensor no dimension of which depends on a parameter."""
    return [None] * rank


def propagate(step: Step) -> list[Dims]:
    """Returns the labels of an operator's results."""
    name = step.operator.name.rpartition(".")[0]
    found = RULES.get(name) or (RULES.get(name.rstrip("_")) if name.endswith("_") else None)
    if found is not None:
        return found(step)
    if torch.Tag.pointwise in getattr(step.operator.function, "tags", ()):
        return pointwise(step)
    return barrier(step)


def barrier(step: Step) -> list[Dims]:
    """An operator that nothing is known about."""
    for tensor in step.tensors():
        step.fix(step.dims(tensor), "no rule says what this operator does with channels")
    return [untracked(len(shape)) for shape in step.result_shapes]


def pointwise(step: Step) -> list[Dims]:
    """Element by element, with broadcasting: what meets is joined."""
    shape = step.result_shapes[0] if step.result_shapes else ()
    result: Dims = [None] * len(shape)
    operands = [(step.dims(tensor), step.shape(tensor)) for tensor in step.tensors()]
    for dim in range(-1, -len(shape) - 1, -1):
        full = [(d[dim], s[dim]) for d, s in operands if len(s) >= -dim and s[dim] == shape[dim]]
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
    "aten.lift",
)
def _same(step: Step) -> list[Dims]:
    return [step.dims(step.argument(0)) for _ in step.result_shapes]


@rule("aten.copy")
def _copied(step: Step) -> list[Dims]:
    return pointwise(step)


@rule("aten.fill", "aten.zero")
def _filled(step: Step) -> list[Dims]:
    return step.same(step.dims(step.argument(0)))


# Contractions.


@rule("aten.convolution")
def _convolution(step: Step) -> list[Dims]:
    data, weight, bias = (step.argument(position) for position in range(3))
    transposed, groups = bool(step.argument(6)), int(step.argument(8))
    x, w, b = step.dims(data), step.dims(weight), step.dims(bias)
    channel = len(x) - (len(w) - 1)  # unbatched inputs have no batch dimension
    inputs, outputs = (w[0], w[1]) if transposed else (w[1], w[0])
    if inputs is None or outputs is None:  # a weight that is computed from inputs or constants
        step.fix([*x[channel:], *w], "is convolved with a weight of fixed size")
        return step.same([*x[:channel], *untracked(len(step.result_shapes[0]) - channel)])
    step.fix(w[2:], "kernel size")
    step.algebra.mark(Role.MAKES, outputs)
    step.algebra.mark(Role.READS, inputs)
    if groups == 1:
        _contract(step, x[channel], inputs)
        out = outputs
    else:
        out = _grouped(step, x[channel], inputs, outputs, groups, transposed=transposed)
    if b:
        step.algebra.mark(Role.ADDS, b[0])
        step.algebra.join(out, b[0])
    kernel = [(size, None) for size in step.shape(weight)[2:]]
    if transposed:
        sizes = [
            *zip(step.shape(data), [*x[:channel], inputs, *x[channel + 1 :]], strict=True),
            (len(outputs), outputs),
        ]
    else:
        made = step.result_shapes[0]
        sizes = [
            *((n, None) for n in (*made[:channel], *made[channel + 1 :])),
            (made[channel], out),
            (len(inputs), inputs),
        ]
    step.algebra.multiply([*sizes, *kernel])
    result: Dims = [None] * len(step.result_shapes[0])
    result[:channel] = x[:channel]
    result[channel] = out
    step.fix(x[channel + 1 :], "is a dimension in space")
    return step.same(result)


def _contract(step: Step, left: Labels, right: Labels) -> None:
    """Sums over a dimension of a product: what is removed on one side is removed on the other."""
    if left is None or right is None:
        step.fix([left, right], "is summed with a tensor of fixed size")
    step.algebra.mark(Role.READS, left)
    step.algebra.mark(Role.READS, right)
    step.algebra.join(left, right)


def _grouped(
    step: Step, x: Labels, inputs: np.ndarray, outputs: np.ndarray, groups: int, *, transposed: bool
) -> np.ndarray:
    """Convolution in groups: what is removed in one group is removed in each, so that they stay equally large.

    A group that has one channel of input and output goes as a whole: `groups` shrinks (depthwise convolution).
    """
    if transposed:  # the weight has all inputs in its first dimension and one group's outputs in its second
        whole, part, data = inputs, outputs, x
        if len(part) == 1 and len(whole) == groups:
            _contract(step, data, whole)
            step.fix(part, "one channel in a group")
            return whole
        step.fix([data, whole, part], "transposed convolution in groups")
        return np.repeat(part[None], groups, 0).reshape(-1)
    if len(inputs) == 1:  # depthwise, each input with `multiplier` outputs
        multiplier = len(outputs) // groups
        step.fix(inputs, "one channel in a group")
        if x is None:
            step.fix(outputs, "depthwise over channels of fixed number")
        else:
            step.algebra.join(np.repeat(x, multiplier), outputs)
        return outputs
    step.algebra.join_all(outputs.reshape(groups, -1))
    if x is None:
        step.fix(inputs, "is summed with a tensor of fixed size")
    else:
        for part in x.reshape(groups, -1):
            step.algebra.join(inputs, part)
    return outputs


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot")
def _matmul(step: Step) -> list[Dims]:
    return step.same(_product(step, step.argument(0), step.argument(1)))


@rule("aten.addmm", "aten.baddbmm")
def _add_matmul(step: Step) -> list[Dims]:
    result = _product(step, step.argument(1), step.argument(2))
    added = step.dims(step.argument(0))
    shape = step.shape(step.argument(0))
    if added:
        step.algebra.mark(Role.ADDS, added[-1])
    for dim in range(-1, -len(added) - 1, -1):
        if shape[dim] == step.result_shapes[0][dim]:
            if (added[dim] is None) != (result[dim] is None):
                step.fix([added[dim], result[dim]], "meets a tensor of fixed size")
            step.algebra.join(result[dim], added[dim])
    return step.same(result)


def _product(step: Step, first: Any, second: Any) -> Dims:
    left, right = step.dims(first), step.dims(second)
    summed = right[-2] if len(right) > 1 else right[-1]
    _contract(step, left[-1], summed)
    for made in [*left[-2:-1], *(right[-1:] if len(right) > 1 else [])]:
        step.algebra.mark(Role.MAKES, made)
    batch: Dims = []
    for a, b in zip(left[:-2], right[:-2], strict=False):
        if (a is None) != (b is None):
            step.fix([a, b], "meets a tensor of fixed size")
        step.algebra.join(a, b)
        batch.append(b if a is None else a)
    result = [*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else [])]
    sizes = zip(step.result_shapes[0], result, strict=True)
    step.algebra.multiply([*sizes, (step.shape(first)[-1], summed if left[-1] is None else left[-1])])
    return result


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def _attention(step: Step) -> list[Dims]:
    q, k, v = (step.dims(step.argument(position)) for position in range(3))
    # The scores are divided by the square root of the head size: a smaller head would be another function.
    step.fix([q[-1], k[-1]], "scores are scaled by the size of a head")
    for dim in range(len(q) - 2):
        step.algebra.join(q[dim], k[dim])
        step.algebra.join(q[dim], v[dim])
    step.fix([q[-2], k[-2], v[-2]], "softmax over it")
    query, value = step.shape(step.argument(0)), step.shape(step.argument(2))
    batch = list(zip(query[:-1], q[:-1], strict=True))
    step.algebra.multiply([*batch, (value[-2], None), (query[-1], q[-1])])
    step.algebra.multiply([*batch, (value[-2], None), (value[-1], v[-1])])
    return step.same([*q[:-1], v[-1]])


@rule("aten.embedding")
def _embedding(step: Step) -> list[Dims]:
    table = step.dims(step.argument(0))
    step.fix(table[0], "rows are chosen by number")
    step.algebra.mark(Role.MAKES, table[1])
    return step.same([*untracked(len(step.result_shapes[0]) - 1), table[1]])


# Normalization.


@rule(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten.cudnn_batch_norm",
    "aten.batch_norm",
    "aten._native_batch_norm_legit_functional",
    "aten._batch_norm_with_update",
    "aten._batch_norm_no_update",
)
def _batch_norm(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    for position in (1, 2):
        for labels in step.dims(step.argument(position)):
            step.algebra.mark(Role.NORMALIZES, labels)
    _parallel(step, dims[1], [step.dims(step.argument(position)) for position in range(1, 5)])
    return step.same(dims)


def _parallel(step: Step, labels: Labels, vectors: Iterable[Dims]) -> None:
    """Joins vectors that run along a dimension."""
    for vector in vectors:
        if not vector:
            continue
        if labels is None or vector[0] is None:
            step.fix([labels, vector[0]], "meets a tensor of fixed size")
        step.algebra.join(labels, vector[0])


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm", "aten.layer_norm")
def _layer_norm(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    count = len(step.argument(1))
    normalized = dims[len(dims) - count :]
    step.fix(normalized, "is normalized over: mean and variance would be those of fewer channels")
    for position in (2, 3):
        vector = step.dims(step.argument(position)) if isinstance(step.argument(position), Ref) else []
        for labels, other in zip(normalized, vector, strict=False):
            step.fix(other, "is normalized over")
            step.algebra.join(labels, other)
    return step.same(dims)


@rule("aten.native_group_norm", "aten.group_norm")
def _group_norm(step: Step) -> list[Dims]:
    dims, groups = step.dims(step.argument(0)), int(step.argument(6, "group", 1))
    if dims[1] is not None and groups != len(dims[1]):
        step.fix(dims[1], "groups of channels are normalized together")
    _parallel(step, dims[1], [step.dims(step.argument(1)), step.dims(step.argument(2))])
    if dims[1] is not None and groups == len(dims[1]):
        step.fix(dims[1], "the number of groups is written in the code")
    return step.same(dims)


# Reductions and what looks along a dimension.


def _dims_argument(value: Any, rank: int) -> list[int]:
    if value is None:
        return list(range(rank))
    values = [value] if isinstance(value, int) else list(value) or list(range(rank))
    return [int(dim) % rank for dim in values] if rank else []


@rule(
    "aten.mean",
    "aten.sum",
    "aten.amax",
    "aten.amin",
    "aten.prod",
    "aten.var",
    "aten.std",
    "aten.var_mean",
    "aten.max",
    "aten.min",
    "aten.logsumexp",
    "aten.linalg_vector_norm",
    "aten.norm",
    "aten.any",
    "aten.all",
    "aten.argmax",
    "aten.argmin",
    "aten.median",
    "aten.count_nonzero",
)
def _reduction(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    if len(step.operator.inputs) > 1:
        return pointwise(step)  # max and min of two tensors
    position = 2 if "vector_norm" in step.operator.name else 1
    over = step.argument(position, "dim") if "dim" in str(step.operator.function._schema) else None
    reduced = _dims_argument(over, len(dims))
    step.fix([dims[dim] for dim in reduced], "is reduced")
    keeps = step.result_shapes and len(step.result_shapes[0]) == len(dims)
    result = [None if dim in reduced else labels for dim, labels in enumerate(dims) if keeps or dim not in reduced]
    return [list(result) for _ in step.result_shapes]


@rule(
    "aten._softmax",
    "aten._log_softmax",
    "aten.softmax",
    "aten.log_softmax",
    "aten.cumsum",
    "aten.sort",
    "aten.topk",
    "aten.flip",
    "aten.roll",
    "aten.cumprod",
)
def _along(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    name = step.operator.name
    position = 2 if ("roll" in name or "topk" in name) else 1
    default = -1 if ("topk" in name or "sort" in name) else None
    for dim in _dims_argument(step.argument(position, "dims" if "roll" in name else "dim", default), len(dims)):
        step.fix(dims[dim], "the operator looks along it")
        dims[dim] = None
    return [list(dims) for _ in step.result_shapes]


_SPATIAL = [
    f"aten.{name}{n}d"
    for name in ("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "max_pool")
    for n in (1, 2, 3)
]
_SPATIAL += [
    f"aten.{name}max_pool{n}d{suffix}"
    for name in ("", "adaptive_")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
]
_SPATIAL += [
    f"aten.upsample_{name}"
    for name in (
        "nearest1d",
        "nearest2d",
        "nearest3d",
        "_nearest_exact2d",
        "linear1d",
        "bilinear2d",
        "trilinear3d",
        "bicubic2d",
        "_bilinear2d_aa",
        "_bicubic2d_aa",
    )
]
_SPATIAL += ["aten._upsample_nearest_exact2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa"]
_SPATIAL += [f"aten.{name}_pad{n}d" for name in ("reflection", "replication") for n in (1, 2, 3)]


@rule(*_SPATIAL)
def _spatial(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    changed = next((f"{n}d" for n in "123" if f"{n}d" in step.operator.name), "2d")
    spatial = int(changed[0])
    step.fix(dims[-spatial:], "is a dimension in space")
    return [dims[:-spatial] + [None] * spatial for _ in step.result_shapes]


@rule("aten.constant_pad_nd")
def _pad(step: Step) -> list[Dims]:
    dims, pads = step.dims(step.argument(0)), list(step.argument(1))
    for index in range(len(pads) // 2):
        if pads[2 * index] or pads[2 * index + 1]:
            dim = len(dims) - 1 - index
            step.fix(dims[dim], "is padded")
            dims[dim] = None
    return step.same(dims)
