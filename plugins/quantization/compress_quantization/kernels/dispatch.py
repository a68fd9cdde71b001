"""Which kernel computes what: compiled ones where they exist and pay, eager ones elsewhere."""

from __future__ import annotations

from functools import partial

import torch

from compress_quantization.kernels import compiled, eager, lanes
from compress_quantization.kernels.compiled import Example
from compress_quantization.kernels.formulas import Activation, Ranges
from compress_quantization.kernels.layout import LANES, Layout, contiguous_view

SMALL = 2048
"""Up to this many elements nothing is compiled: there is little to gain, and compiling takes seconds."""

NARROW = 32
"""Up to so many elements behind a channel, they are taken as channels of their own."""

# Sizes that kernels are traced with: of `Layout.view_shape`, and of `Layout.lane_shape` without the lanes. They stand
# for any, and tell the compiler what is long enough for threads, while sums stay below the 4096 elements from which it
# would make them in a more precise and far slower way.
_VIEWS = {"flat": (1_000_000,), "rows": (130, 1000), "planes": (30, 34, 1000), "columns": (868, 1000)}
_ROWS = {"flat": (1022, 1000), "rows": (130, 1000), "planes": (30, 34, 1000), "columns": (62, 14, 1000)}

_BYTES = {1: torch.int8, LANES: torch.int32}


def is_small(layout: Layout) -> bool:
    """Tells whether a tensor is too small for compiled kernels."""
    return layout.numel <= SMALL


def quantize(x: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout) -> torch.Tensor:
    """Returns the quantized `x`, in its layout."""
    if _may_compile(layout):
        wide, ranges_of = _unrolled(layout, ranges)
        kind = wide.kind
        kernel = compiled.find(
            (x.device.type, "quantize", kind, x.dtype, ranges[0].dtype, activation),
            partial(lanes.quantize, activation=activation, kind=kind),
            lambda: [(_VIEWS[kind], x.dtype), *_example_ranges(kind, 1, ranges[0].dtype)],
        )
        if kernel is not None:
            return layout.restored(kernel(contiguous_view(x, wide.view_shape), *ranges_of)[0])
    out = layout.empty(x)
    eager.quantize(x, out, ranges, activation, layout)
    return out


def quantize_and_encode(
    x: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the quantized `x`, in its layout, and codes; only this module knows how these are arranged."""
    if _may_compile(layout):
        wide, ranges_of = _unrolled(layout, ranges)
        kind, count = wide.kind, _lanes(wide, x)
        kernel = compiled.find(
            (x.device.type, "encode", kind, count, x.dtype, ranges[0].dtype, activation),
            partial(lanes.quantize_and_encode, activation=activation, kind=kind),
            lambda: [(_example(kind, count), x.dtype), *_example_ranges(kind, count, ranges[0].dtype)],
        )
        if kernel is not None:
            out, code = kernel(contiguous_view(x, wide.lane_shape(count)), *ranges_of)
            return layout.restored(out), code
    out, code = layout.empty(x), layout.empty(x, torch.int8)
    eager.quantize_and_encode(x, out, code, ranges, activation, layout)
    return out, code


def gradients_from_code(
    grad: torch.Tensor, code: torch.Tensor, ranges: Ranges, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dx and the sums of `formulas`, of shape (3, channels)."""
    grad, dtype = layout.arranged(grad), ranges[0].dtype
    if _may_compile(layout):
        wide = _unrolled(layout, None)[0]
        kind = "rows" if wide.kind == "planes" else wide.kind
        count = LANES if code.dtype == torch.int32 else 1
        kernel = compiled.find(
            (grad.device.type, "from code", kind, count, grad.dtype, dtype),
            partial(lanes.gradients_from_code, kind=kind, dtype=dtype),
            lambda: [(_example(kind, count), grad.dtype), (_ROWS[kind], _BYTES[count])],
        )
        if kernel is not None:
            shape = wide.lane_shape(count)
            if wide.kind == "planes":
                shape = (shape[0] * shape[1], *shape[2:])
            code = contiguous_view(code, (*shape[:-2], shape[-1]))
            grad_x, sums = kernel(contiguous_view(grad, shape), code)
            return layout.restored(grad_x), _of_channels(sums, layout)
    grad_x = layout.empty(grad)
    return grad_x, eager.gradients_from_code(grad, code_of_elements(code, layout), grad_x, dtype, layout)


def gradients_from_input(
    grad: torch.Tensor, x: torch.Tensor, ranges: Ranges, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what `gradients_from_code` does where x is at hand."""
    grad = layout.arranged(grad)
    if _may_compile(layout) and layout.kind == "rows":
        count = _lanes(layout, x)
        kernel = compiled.find(
            (x.device.type, "from input", "rows", count, x.dtype, ranges[0].dtype),
            partial(lanes.gradients_from_input, kind="rows"),
            lambda: [
                *[(_example("rows", count), x.dtype)] * 2,
                *_example_ranges("rows", count, ranges[0].dtype),
            ],
        )
        if kernel is not None:
            shape = layout.lane_shape(count)
            grad_x, sums = kernel(contiguous_view(grad, shape), contiguous_view(x, shape), *ranges)
            return layout.restored(grad_x), _of_channels(sums, layout)
    grad_x = layout.empty(grad)
    return grad_x, eager.gradients_from_input(grad, x, grad_x, ranges, layout)


def code_of_elements(code: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns codes as int8, in the shape and the layout of the tensor that they belong to."""
    if code.dtype == torch.int32:
        code = code.view(torch.int8).reshape(*code.shape, LANES).movedim(-1, -2).contiguous()
    return code.as_strided(layout.shape, layout.strides)


def _may_compile(layout: Layout) -> bool:
    return not is_small(layout) and compiled.is_available()


def _lanes(layout: Layout, x: torch.Tensor) -> int:
    # Compilers for GPUs load bytes as well as anything.
    return layout.lanes if x.device.type == "cpu" else 1


def _unrolled(layout: Layout, ranges: Ranges | None) -> tuple[Layout, Ranges]:
    """Returns a layout that suits compiled kernels, and the ranges that belong to it."""
    if layout.kind != "planes" or layout.inner > NARROW:
        return layout, ranges  # type: ignore[return-value]
    repeated = None if ranges is None else tuple(values.repeat_interleave(layout.inner) for values in ranges)
    return layout.unrolled, repeated  # type: ignore[return-value]


def _of_channels(sums: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns the sums of a compiled kernel as sums for each channel, (3, channels)."""
    if layout.kind == "flat":
        return sums.sum(1, keepdim=True)
    if layout.kind == "columns":
        return sums.sum(1)
    if layout.kind == "planes" and layout.inner <= NARROW:
        return sums.sum(1).reshape(3, layout.channels, layout.inner).sum(2)
    lanes = sums.shape[1]
    groups = sums if layout.kind == "rows" else sums.reshape(3, lanes, layout.outer, -1).sum(2)
    return groups.transpose(1, 2).reshape(3, layout.channels)


def _example(kind: str, count: int) -> tuple[int, ...]:
    *rows, row = _ROWS[kind]
    return (*rows, count, row)


def _example_ranges(kind: str, count: int, dtype: torch.dtype) -> list[Example]:
    shape = _ROWS[kind]
    channels = {"flat": 1, "columns": shape[-1]}.get(kind, shape[-2] * count)
    return [((channels,), dtype)] * 3
