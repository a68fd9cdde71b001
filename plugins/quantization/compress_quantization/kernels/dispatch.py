"""Which kernel computes what: compiled ones where they exist and pay, eager ones elsewhere."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from compress_quantization.kernels import compiled, eager, formulas, lanes
from compress_quantization.kernels.compiled import Example
from compress_quantization.kernels.lanes import Variant
from compress_quantization.kernels.layout import LANES, Layout, contiguous_view
from compress_quantization.kernels.sources import Source, compute_dtype, levels_of, ranges_of_channels
from compress_quantization.kernels.task import Task

SMALL = 2048
"""Up to this many elements nothing is compiled: there is little to gain, and compiling takes seconds."""

# Sizes that kernels are traced with: of `Layout.view_shape`, and of `Layout.lane_shape` without the lanes. They stand
# for any, and tell the compiler what is long enough for threads, while sums stay below the 4096 elements from which it
# would make them in a more precise and far slower way.
_VIEWS = {
    "flat": (1_000_000,),
    "rows": (520, 1000),
    "planes": (30, 136, 1000),
    "columns": (868, 1000),
    "narrow": (868, 100, 10),
}
_ROWS = {
    "flat": (1022, 1000),
    "rows": (130, 1000),
    "planes": (30, 34, 1000),
    "columns": (62, 14, 1000),
    "narrow": (62, 14, 100, 10),
}
_BYTES = {1: torch.int8, LANES: torch.int32}


def is_small(layout: Layout) -> bool:
    """Tells whether a tensor is too small for compiled kernels."""
    return layout.numel <= SMALL


def quantize(
    x: torch.Tensor, source: Source, task: Task, layout: Layout, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the quantized `x`, in its layout, and the ranges, (3, channels); `in_place` writes it to `x`."""
    dtype = compute_dtype(x.dtype)
    if _may_compile(layout):
        variant = Variant(layout.kind, dtype, task.activation, source.kind)
        channels = _example_channels(layout.kind)
        kernel = compiled.find(
            (x.device.type, "quantize", in_place, x.dtype, source.tensors[0].dtype, variant),
            partial(lanes.quantize_in_place if in_place else lanes.quantize, variant=variant),
            lambda: [(_VIEWS[layout.kind], x.dtype), *_example_source(source, channels, dtype)],
        )
        if kernel is not None:
            view = contiguous_view(x, layout.view_shape)
            *new, ranges = kernel(view, *_source(source, task, (layout.channels,), dtype))
            return layout.restored(new[0]) if new else x, ranges
    return _eager_quantize(x, source, task, layout, in_place=in_place)


def quantize_and_encode(
    x: torch.Tensor, source: Source, task: Task, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the quantized `x`, in its layout, what to keep for gradients, and the ranges, (3, channels).

    What is kept are codes of one byte, whose arrangement only this module knows, or, without compiled kernels, `x`:
    making codes of many eager operators takes longer than anything else.
    """
    dtype = compute_dtype(x.dtype)
    if _may_compile(layout):
        variant, count = Variant(layout.kind, dtype, task.activation, source.kind), _lanes(layout, x)
        channels = _example_channels(layout.kind, count)
        kernel = compiled.find(
            (x.device.type, "encode", count, x.dtype, source.tensors[0].dtype, variant),
            partial(lanes.quantize_and_encode, variant=variant),
            lambda: [(_example(variant, count), x.dtype), *_example_source(source, channels, dtype)],
        )
        if kernel is not None:
            view = contiguous_view(x, layout.lane_shape(count))
            out, code, ranges = kernel(view, *_source(source, task, _of_channels(layout, count), dtype))
            return layout.restored(out), code, ranges
    out, ranges = _eager_quantize(x, source, task, layout)
    return out, x, ranges


def gradients(
    grad: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, learned: torch.Tensor, task: Task, layout: Layout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns dx, and a list of drange times the sign of what is learned and, with an offset, dlow, (channels,) each.

    Args:
        grad: dy, of any layout.
        kept: x, or codes of a compiled kernel.
        ranges: What came with them.
        learned: The parameter.
        task: What was done.
        layout: Layout of x.
    """
    grad, is_code = layout.arranged(grad), not kept.is_floating_point()
    if _may_compile(layout) and (is_code or not formulas.is_clip(task.activation)):
        # The gradients of a plain ReLU are a matter of factors.
        activation = None if task.activation == "relu" else task.activation
        variant = Variant(layout.kind, ranges.dtype, activation, offset=task.offset)
        count = min(_lanes(layout, grad), 2) if not is_code else LANES if kept.dtype == torch.int32 else 1
        kernel = compiled.find(
            (grad.device.type, is_code, count, grad.dtype, learned.dtype, variant),
            partial(lanes.gradients_from_code if is_code else lanes.gradients_from_input, variant=variant),
            lambda: _example_gradients(variant, count, (grad.dtype, learned.dtype), is_code=is_code),
        )
        if kernel is not None:
            shape = layout.lane_shape(count)
            dim = len(shape) + variant.lane_dim
            of_channels = _of_channels(layout, count)
            kept_shape = shape[:dim] + shape[dim + 1 :] if is_code else shape
            grad_x, *totals = kernel(
                contiguous_view(grad, shape),
                contiguous_view(kept, kept_shape),
                contiguous_view(ranges, (3, *of_channels)),
                _constants(task.factors, ranges.dtype, grad.device),
                contiguous_view(learned, of_channels),
            )
            return layout.restored(grad_x), totals
    return _eager_gradients(grad, kept, ranges, learned, task, layout)


def _eager_quantize(
    x: torch.Tensor, source: Source, task: Task, layout: Layout, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    ranges = ranges_of_channels(source, task.levels, compute_dtype(x.dtype))
    out = x if in_place else layout.empty(x)
    eager.quantize(x, out, ranges, task.activation, layout)
    return out, torch.stack(ranges)


def _eager_gradients(
    grad: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, learned: torch.Tensor, task: Task, layout: Layout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    step, low, high = ranges.reshape(3, -1).unbind()
    grad_x = layout.empty(grad)
    if kept.is_floating_point():
        sums = eager.gradients(grad, kept, grad_x, (step, low, high), task.activation, layout)
    else:  # compiled kernels have been switched off since
        code = layout.blocks(code_of_elements(kept, layout)).to(step.dtype)
        inside, *parts = formulas.from_code(layout.blocks(grad), code)
        layout.blocks(grad_x).copy_(inside)
        sums = torch.stack([part.sum((0, 2)) for part in parts])
    slopes = formulas.slopes((step, low, high), task.factors, task.activation)
    drange, *dlow = formulas.weighed(sums.unbind(), slopes, task.offset)
    return grad_x, [drange * learned.reshape(-1).sign(), *dlow]


def code_of_elements(code: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns codes as int8, in the shape and the layout of the tensor that they belong to."""
    if code.dtype == torch.int32:
        width = layout.channels * layout.inner if layout.kind == "narrow" else code.shape[-1]
        code = code.view(torch.int8).reshape(-1, width, LANES).movedim(-1, -2).contiguous()
    return code.as_strided(layout.shape, layout.strides)


def _may_compile(layout: Layout) -> bool:
    return not is_small(layout) and compiled.is_available()


def _lanes(layout: Layout, x: torch.Tensor) -> int:
    # Compilers for GPUs load bytes as well as anything.
    return layout.lanes if x.device.type == "cpu" else 1


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # An ordinary tensor, whatever mode the first call is made in.
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        return torch.tensor(values, dtype=dtype, device=device)


def _source(source: Source, task: Task, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns what kernels take: the levels, and the tensors of the source in the shape that channels have there."""
    tensors = [tensor if tensor.shape == shape else contiguous_view(tensor, shape) for tensor in source.tensors]
    return [_constants(levels_of(*task.levels, dtype), dtype, tensors[0].device), *tensors]


def _of_channels(layout: Layout, count: int) -> tuple[int, ...]:
    """Returns the shape in which kernels of this many lanes take what belongs to channels."""
    return (layout.channels // count, count) if layout.kind in {"rows", "planes"} else (layout.channels,)


def _example_channels(kind: str, count: int | None = None) -> tuple[int, ...]:
    """Returns what `_of_channels` does, for the examples; without lanes, for `Layout.view_shape`."""
    if kind == "flat":
        return (1,)
    if kind in {"columns", "narrow"}:
        return (_VIEWS[kind][1],)
    return (_VIEWS[kind][-2],) if count is None else (_ROWS[kind][-2], count)


def _example(variant: Variant, count: int) -> tuple[int, ...]:
    shape = _ROWS[variant.kind]
    dim = len(shape) + 1 + variant.lane_dim
    return (*shape[:dim], count, *shape[dim:])


def _example_source(source: Source, channels: tuple[int, ...], dtype: torch.dtype) -> list[Example]:
    return [((3,), dtype), *[(channels, tensor.dtype) for tensor in source.tensors]]


def _example_gradients(
    variant: Variant, count: int, dtypes: tuple[torch.dtype, torch.dtype], *, is_code: bool
) -> list[Example]:
    shape, channels = _example(variant, count), _example_channels(variant.kind, count)
    kept: Example = (_ROWS[variant.kind], _BYTES[count]) if is_code else (shape, dtypes[0])
    others: list[Example] = [((3, *channels), variant.dtype), ((3,), variant.dtype), (channels, dtypes[1])]
    return [(shape, dtypes[0]), kept, *others]
