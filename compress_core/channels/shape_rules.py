"""Label rules of the operators that only move elements: views, permutations, slices, concatenations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress_core.channels.algebra import Dims, Labels, Split
from compress_core.channels.rules import Step, rule, untracked


@rule("aten.permute", "aten.numpy_T")
def _permute(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    return step.same([dims[dim] for dim in step.argument(1)])


@rule("aten.t")
def _t(step: Step) -> list[Dims]:
    return step.same(step.dims(step.argument(0))[::-1])


@rule("aten.transpose", "aten.swapaxes")
def _transpose(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    left, right = step.argument(1), step.argument(2)
    dims[left], dims[right] = dims[right], dims[left]
    return step.same(dims)


@rule("aten.unsqueeze")
def _unsqueeze(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    dims.insert(step.argument(1) % (len(dims) + 1), None)
    return step.same(dims)


@rule("aten.squeeze")
def _squeeze(step: Step) -> list[Dims]:
    data = step.argument(0)
    dims, shape = step.dims(data), step.shape(data)
    over = step.argument(1, "dim")
    chosen = range(len(dims)) if over is None else [over] if isinstance(over, int) else list(over)
    gone = {dim % len(dims) for dim in chosen if shape[dim] == 1} if dims else set()
    step.fix([dims[dim] for dim in gone], "is squeezed")
    return step.same([labels for dim, labels in enumerate(dims) if dim not in gone])


@rule("aten.expand", "aten.broadcast_to")
def _expand(step: Step) -> list[Dims]:
    data = step.argument(0)
    dims, shape, result = step.dims(data), step.shape(data), step.result_shapes[0]
    dims = [*untracked(len(result) - len(dims)), *dims]
    old = (1,) * (len(result) - len(shape)) + tuple(shape)
    for dim, labels in enumerate(dims):
        if old[dim] != result[dim]:
            step.fix(labels, "is broadcast")
            dims[dim] = None
    return step.same(dims)


@rule("aten.repeat", "aten.tile")
def _repeat(step: Step) -> list[Dims]:
    data = step.argument(0)
    dims, times = step.dims(data), list(step.argument(1))
    dims = [*untracked(len(times) - len(dims)), *dims]
    return step.same([None if d is None else np.tile(d, n) for d, n in zip(dims, times, strict=True)])


@rule("aten.cat", "aten.concat")
def _cat(step: Step) -> list[Dims]:
    tensors = [tensor for tensor in step.argument(0) if len(step.shape(tensor)) == len(step.result_shapes[0])]
    parts = [step.dims(tensor) for tensor in tensors]
    axis = int(step.argument(1, "dim", 0)) % len(step.result_shapes[0])
    result: Dims = []
    for dim in range(len(step.result_shapes[0])):
        column = [part[dim] for part in parts]
        tracked = [labels for labels in column if labels is not None]
        if dim != axis:
            result.append(step.met(column))
        elif not tracked:
            result.append(None)
        else:
            result.append(_joined(step, column, [step.shape(tensor)[dim] for tensor in tensors]))
    return step.same(result)


def _joined(step: Step, column: list[Labels], sizes: list[int]) -> np.ndarray:
    """Concatenates labels; parts of fixed size get new labels, which are fixed."""
    parts: list[np.ndarray] = []
    for labels, size in zip(column, sizes, strict=True):
        if labels is None:
            labels = step.algebra.parameter(f"constant {step.operator.index}.{len(parts)}", (size,))[0]  # noqa: PLW2901
            step.fix(labels, "is of fixed size")
        assert labels is not None
        parts.append(labels)
    return np.concatenate(parts)


@rule("aten.stack")
def _stack(step: Step) -> list[Dims]:
    parts = [step.dims(tensor) for tensor in step.argument(0)]
    result = [step.met([part[dim] for part in parts]) for dim in range(len(parts[0]))]
    result.insert(int(step.argument(1, "dim", 0)) % (len(result) + 1), None)
    return step.same(result)


@rule(
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_chunk", "aten.unsafe_split"
)
def _split(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    axis = int(step.argument(2, "dim", 0)) % len(dims)
    labels = dims[axis]
    if labels is None:
        return [list(dims) for _ in step.result_shapes]
    sizes = [shape[axis] for shape in step.result_shapes]
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    if len(set(sizes)) == 1 and len(sizes) > 1:
        # Code usually computes equal parts from the size of the tensor, so they must shrink by the same amount.
        step.algebra.join_all(np.stack(parts))
    else:
        step.fix(labels, "is split at positions that are written in the code")
    return [[*dims[:axis], part, *dims[axis + 1 :]] for part in parts]


@rule("aten.unbind")
def _unbind(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    axis = int(step.argument(1, "dim", 0)) % len(dims)
    step.fix(dims[axis], "is taken apart")
    return [dims[:axis] + dims[axis + 1 :] for _ in step.result_shapes]


@rule("aten.select")
def _select(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    axis = int(step.argument(1)) % len(dims)
    step.fix(dims[axis], "one index is chosen by number")
    return step.same(dims[:axis] + dims[axis + 1 :])


@rule("aten.slice", "aten.narrow")
def _slice(step: Step) -> list[Dims]:
    data = step.argument(0)
    dims = step.dims(data)
    axis = int(step.argument(1, "dim", 0)) % len(dims)
    if step.shape(data)[axis] != step.result_shapes[0][axis]:
        step.fix(dims[axis], "a part is chosen by number")
        dims[axis] = None
    return step.same(dims)


@rule("aten.index", "aten.index_select", "aten.gather", "aten.take_along_dim", "aten._unsafe_index")
def _index(step: Step) -> list[Dims]:
    data, chosen = step.argument(0), step.argument(1)
    dims = step.dims(data)
    if isinstance(chosen, int):  # index_select, gather: one dimension
        axes = [chosen % len(dims)] if "index_select" in step.operator.name else list(range(len(dims)))
    else:
        axes = [axis for axis, entry in enumerate(chosen) if entry is not None]
    step.fix([dims[axis] for axis in axes], "is indexed by number")
    rank = len(step.result_shapes[0])
    kept: Dims = [None if axis in axes else labels for axis, labels in enumerate(dims)]
    if rank == len(dims):
        return step.same(kept)
    step.fix(dims, "is indexed by number")
    return step.same([None] * rank)


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def _channel_shuffle(step: Step) -> list[Dims]:
    dims, groups = step.dims(step.argument(0)), int(step.argument(1))
    if dims[1] is not None:
        rows = dims[1].reshape(groups, -1)
        step.algebra.join_all(rows)
        dims[1] = rows.T.reshape(-1)
    return step.same(dims)


@rule("aten.pixel_shuffle")
def _pixel_shuffle(step: Step) -> list[Dims]:
    dims, factor = step.dims(step.argument(0)), int(step.argument(1))
    labels = dims[-3]
    if labels is not None:
        dims[-3] = step.algebra.join_all(labels.reshape(-1, factor * factor).T)
    dims[-2:] = [None, None]
    return step.same(dims)


@rule("aten.pixel_unshuffle")
def _pixel_unshuffle(step: Step) -> list[Dims]:
    dims, factor = step.dims(step.argument(0)), int(step.argument(1))
    if dims[-3] is not None:
        dims[-3] = np.repeat(dims[-3], factor * factor)
    dims[-2:] = [None, None]
    return step.same(dims)


@rule("aten.im2col")
def _unfold(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    area = int(np.prod(step.argument(1)))
    channels = None if dims[1] is None else np.repeat(dims[1], area)
    return step.same([dims[0], channels, None])


@rule("aten.col2im")
def _fold(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    area = int(np.prod(step.argument(2)))
    step.fix(dims[-1], "is a dimension in space")
    channels = None if dims[-2] is None else step.algebra.join_all(dims[-2].reshape(-1, area).T)
    return step.same([*dims[:-2], channels, None, None])


@rule("aten.glu")
def _gated(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    axis = int(step.argument(1, "dim", -1))
    labels = dims[axis]
    if labels is not None:
        dims[axis] = step.algebra.join_all(labels.reshape(2, -1))
    return step.same(dims)


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten._reshape_alias", "aten.unflatten")
def _view(step: Step) -> list[Dims]:
    data = step.argument(0)
    dims, old, new = step.dims(data), step.shape(data), step.result_shapes[0]
    result: Dims = [None] * len(new)
    for before, after in _matching_dimensions(old, new):
        tracked = [dim for dim in before if dims[dim] is not None and old[dim] > 1]
        step.fix([dims[dim] for dim in before if old[dim] == 1], "has a single channel")
        if not tracked:
            continue
        sizes_before, sizes_after = [old[dim] for dim in before], [new[dim] for dim in after]
        labels = dims[tracked[0]]
        large_before = [dim for dim in before if old[dim] > 1]
        large_after = [dim for dim in after if new[dim] > 1]
        if len(tracked) > 1 or labels is None or not large_after:
            step.fix([dims[dim] for dim in tracked], "is mixed with other dimensions")
            continue
        if len(large_before) == len(large_after) == 1:
            result[large_after[0]] = labels
            continue
        # The label of each element of the block, from its index in the tracked dimension.
        shape = [1] * len(before)
        shape[before.index(tracked[0])] = len(labels)
        block = np.broadcast_to(labels.reshape(shape), sizes_before).reshape(sizes_after)
        _place(step, block, after, large_after, result)
    return step.same(result)


def _place(step: Step, block: np.ndarray, after: list[int], large: list[int], result: Dims) -> None:
    """Decides which dimension of a reshaped block shrinks.

    It is the dimension along which labels differ. If there are several (channels are split into heads), it is the one
    that the code leaves open, as in `view(batch, time, -1, head_size)`. If no size is open, it is the last one, because
    the number of heads is usually written in the code; `Algebra.whole_heads` makes it the one before, so that heads go
    as a whole. If each label occurs in only one column, nothing is joined; otherwise columns are joined.
    """
    varying = [dim for dim in large if _varies(block, after.index(dim))]
    target = varying[-1] if varying else large[-1]
    if len(varying) > 1:
        module, open_size = step.operator.module, _open_dimension(step)
        if open_size in varying:
            target = open_size
        else:
            target = varying[-2 if module in step.algebra.whole_heads else -1]
            heads = block.shape[after.index(varying[-2])]
            place = (step.operator.index, varying[-1]) if step.algebra.counting else None
            step.algebra.splits.append(Split(module, np.unique(block), heads, place))
    rows = np.moveaxis(block, after.index(target), -1).reshape(-1, block.shape[after.index(target)])
    if len(large) > 1:
        step.algebra.join_all(np.unique(rows, axis=0))
    result[target] = rows[0].copy()


def _open_dimension(step: Step) -> int | None:
    """Returns the dimension whose size a view computes from the number of elements (-1), if there is one."""
    sizes = step.argument(1)
    return sizes.index(-1) if isinstance(sizes, (list, tuple)) and -1 in sizes else None


def _varies(block: np.ndarray, axis: int) -> bool:
    return bool((np.diff(block, axis=axis) != 0).any())


def _matching_dimensions(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the shortest runs of dimensions of both shapes that have the same elements."""
    left = right = 0
    while left < len(old) or right < len(new):
        before: list[int] = []
        after: list[int] = []
        product_before = product_after = 1
        while True:
            if product_before <= product_after and left < len(old) and (not before or product_before < product_after):
                before.append(left)
                product_before *= old[left]
                left += 1
            elif right < len(new) and (not after or product_after < product_before):
                after.append(right)
                product_after *= new[right]
                right += 1
            elif left < len(old) and product_before < product_after:
                before.append(left)
                product_before *= old[left]
                left += 1
            else:
                break
        if not before and not after:
            return
        # Trailing dimensions of size one belong to the last run.
        yield before, after
