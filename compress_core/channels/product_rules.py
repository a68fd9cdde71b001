"""Label rules of the operators that sum over channels: convolutions, matrix products, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compress_core.channels.algebra import Dims, Labels, Role
from compress_core.channels.rules import Step, barrier, rule, untracked


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
    """Joins the summed dimensions of a product: an index removed on one side is removed on the other."""
    if left is None or right is None:
        step.fix([left, right], "is summed with a tensor of fixed size")
    step.algebra.mark(Role.READS, left)
    step.algebra.mark(Role.READS, right)
    step.algebra.join(left, right)


def _grouped(
    step: Step, x: Labels, inputs: np.ndarray, outputs: np.ndarray, groups: int, *, transposed: bool
) -> np.ndarray:
    """Handles convolutions in groups: an index removed in one group is removed in all, so that groups stay equal.

    A group with one input and one output channel is removed as a whole, so `groups` shrinks (depthwise convolution).
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


@rule("aten.linear")
def _linear(step: Step) -> list[Dims]:
    x, weight, bias = (step.dims(step.argument(position)) for position in range(3))
    step.algebra.mark(Role.MAKES, weight[0])
    _contract(step, x[-1], weight[1])
    if bias:
        step.algebra.mark(Role.ADDS, bias[0])
        step.met([weight[0], bias[0]])
    result = [*x[:-1], weight[0]]
    step.algebra.multiply([*zip(step.result_shapes[0], result, strict=True), (step.shape(step.argument(0))[-1], x[-1])])
    return step.same(result)


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
    if step.activations.issuperset((first.value, second.value)):
        # No weight reads these channels, so they cannot be masked; values that are not zero would still be summed.
        step.fix([left[-1], summed], "two activations are multiplied and summed over it")
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
    # The scores are divided by the square root of the head size, so a smaller head computes another function.
    step.fix([q[-1], k[-1]], "scores are scaled by the size of a head")
    step.fix([q[-2], k[-2], v[-2]], "softmax over it")
    mask = step.argument(3, "attn_mask") if "scaled_dot_product_flash" not in step.operator.name else None
    mask = step.operator.keywords.get("attn_mask", step.operator.keywords.get("attn_bias", mask))
    operands = [
        (step.dims(ref), step.shape(ref)) for ref in (step.argument(0), step.argument(1), step.argument(2), mask)
    ]
    step.fix(operands[3][0][-2:], "softmax over it")
    for dim in range(-3, -len(q) - 1, -1):  # batch and heads
        column = [(dims[dim], shape[dim]) for dims, shape in operands if len(dims) >= -dim]
        if dim == -3:
            q[dim] = _heads(step, column)
        elif len({size for _, size in column}) > 1:
            step.fix([labels for labels, _ in column], "is broadcast")
        else:
            q[dim] = step.met([labels for labels, _ in column])
    query, value = step.shape(step.argument(0)), step.shape(step.argument(2))
    batch = list(zip(query[:-1], q[:-1], strict=True))
    step.algebra.multiply([*batch, (value[-2], None), (query[-1], q[-1])])
    step.algebra.multiply([*batch, (value[-2], None), (value[-1], v[-1])])
    return step.same([*q[:-1], v[-1]])


def _heads(step: Step, operands: Sequence[tuple[Labels, int]]) -> Labels:
    """Joins the heads of queries with those of keys, values and a mask, which may each serve several heads."""
    (queries, count), *others = operands
    for labels, size in others:
        if size == 1 < count:
            step.fix(labels, "is broadcast")
        elif count % size:
            step.fix([queries, labels], "is broadcast")
        elif size < count and labels is not None and queries is not None:  # grouped queries
            step.algebra.join(queries, np.repeat(labels, count // size))
        else:
            queries = step.met([queries, labels])
    return queries


@rule("aten.mkldnn_rnn_layer")
def _lstm(step: Step) -> list[Dims]:
    """Counts one direction of a layer of an LSTM, which oneDNN computes as a whole; its channels stay."""
    x = step.shape(step.argument(0))
    weights = [step.shape(step.argument(position)) for position in (1, 2)]  # of inputs, and of what it has computed
    for made, read in weights:
        step.algebra.multiply([*((size, None) for size in x[:-1]), (made, None), (read, None)])
    return barrier(step)


@rule("aten.embedding", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def _embedding(step: Step) -> list[Dims]:
    table = step.dims(step.argument(0))
    step.fix(table[0], "rows are chosen by number")
    step.algebra.mark(Role.MAKES, table[1])
    vectors, *counts = step.result_shapes  # bags are summed, averaged or maximized channel by channel
    return [[*untracked(len(vectors) - 1), table[1]], *(untracked(len(shape)) for shape in counts)]
