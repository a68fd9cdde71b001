"""Label rules of normalizations, reductions, pooling, and other operators that combine values along dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compress_core.channels.algebra import Dims, Labels, Role
from compress_core.channels.rules import Step, pointwise, rule
from compress_core.torch_internals import schema_of
from compress_core.trace.graph import Ref

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
    """Joins a dimension with vectors that have a value for each of its indices."""
    for vector in vectors:
        if not vector:
            continue
        if labels is None or vector[0] is None:
            step.fix([labels, vector[0]], "meets a tensor of fixed size")
        step.algebra.join(labels, vector[0])


@rule(
    "aten.fake_quantize_per_channel_affine",
    "aten.fake_quantize_per_channel_affine_cachemask",
    "aten._fake_quantize_learnable_per_channel_affine",
)
def _fake_quantize(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    _parallel(step, dims[int(step.argument(3))], [step.dims(step.argument(position)) for position in (1, 2)])
    return [list(dims) for _ in step.result_shapes]


@rule(
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten._fake_quantize_learnable_per_tensor_affine",
)
def _fake_quantize_with_one_scale(step: Step) -> list[Dims]:
    return [list(step.dims(step.argument(0))) for _ in step.result_shapes]


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
    dims = step.dims(step.argument(0))
    groups = int(step.argument(6, "group", 1) if "native" in step.operator.name else step.argument(1))
    affine = [step.dims(step.argument(position)) for position in ((1, 2) if "native" in step.operator.name else (2, 3))]
    for vector in affine:
        for labels in vector:
            step.algebra.mark(Role.NORMALIZES, labels)
    _parallel(step, dims[1], affine)
    if groups == 1:
        step.fix(dims[1], "all channels are normalized together")
    elif not any(affine):
        # `update_attributes` finds layers by their tensors; one without any would keep its number of groups.
        step.fix(dims[1], "the number of groups is written in the code")
    elif dims[1] is not None:
        # Channels that are normalized together go together, so that mean and variance of the other groups stay.
        step.algebra.join_all(dims[1].reshape(groups, -1).T)
    return step.same(dims)


# Reductions and other operators along a dimension.


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
    over = step.argument(position, "dim") if "dim" in str(schema_of(step.operator.function)) else None
    reduced = _dims_argument(over, len(dims))
    step.fix([dims[dim] for dim in reduced], "is reduced")
    keeps = step.result_shapes and len(step.result_shapes[0]) == len(dims)
    result = [None if dim in reduced else labels for dim, labels in enumerate(dims) if keeps or dim not in reduced]
    return [list(result) for _ in step.result_shapes]


@rule(
    "aten._softmax",
    "aten._safe_softmax",
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
_SPATIAL += [f"aten.{name}{n}d" for name in ("max_unpool", "fractional_max_pool", "grid_sampler_") for n in (2, 3)]
_SPATIAL += ["aten._upsample_nearest_exact2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa"]
_SPATIAL += [f"aten.{name}_pad{n}d" for name in ("reflection", "replication") for n in (1, 2, 3)]


@rule(*_SPATIAL)
def _spatial(step: Step) -> list[Dims]:
    dims = step.dims(step.argument(0))
    changed = next((f"{n}d" for n in "123" if f"{n}d" in step.operator.name), "2d")
    spatial = int(changed[0])
    step.fix(dims[-spatial:], "is a dimension in space")
    if "grid_sampler" in step.operator.name:
        step.fix(step.dims(step.argument(1)), "says where in space to look")
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
