"""Which kernel computes what: compiled ones where they exist and pay, eager ones elsewhere."""

from __future__ import annotations

import torch

from compress_quantization.kernels import compiled, eager, formulas
from compress_quantization.kernels.launches import encode_launch, gradients_launch, quantize_launch
from compress_quantization.kernels.layout import LANES, Layout, contiguous_view
from compress_quantization.kernels.sources import Source, compute_dtype, ranges_of_channels
from compress_quantization.kernels.task import Task

SMALL = 2048
"""Up to this many elements nothing is compiled: there is little to gain, and compiling takes seconds."""


def is_small(layout: Layout) -> bool:
    """Tells whether a tensor is too small for compiled kernels."""
    return layout.numel <= SMALL


def quantize(
    x: torch.Tensor, source: Source, task: Task, layout: Layout, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the quantized `x`, in its layout, and the ranges, (3, channels); `in_place` writes it to `x`."""
    launch = quantize_launch(x, source, task, layout, in_place=in_place) if _may_compile(layout) else None
    if launch is not None:
        tensors = [_seen_as(tensor, launch.of_channels) for tensor in source.tensors]
        *new, ranges = launch.kernel(contiguous_view(x, launch.shape), launch.constants, *tensors)
        return layout.restored(new[0]) if new else x, ranges
    return _eager_quantize(x, source, task, layout, in_place=in_place)


def quantize_and_encode(
    x: torch.Tensor, source: Source, task: Task, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the quantized `x`, in its layout, what to keep for gradients, and the ranges, (3, channels).

    What is kept are codes of one byte, whose arrangement only this module knows, or, without compiled kernels, `x`:
    making codes of many eager operators takes longer than anything else.
    """
    launch = encode_launch(x, source, task, layout) if _may_compile(layout) else None
    if launch is not None:
        tensors = [_seen_as(tensor, launch.of_channels) for tensor in source.tensors]
        out, code, ranges = launch.kernel(contiguous_view(x, launch.shape), launch.constants, *tensors)
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
    grad = layout.arranged(grad)
    # Behind a function that clips, eager kernels have kept x, and compiled ones make codes.
    may_compile = _may_compile(layout) and not (kept.is_floating_point() and formulas.is_clip(task.activation))
    launch = gradients_launch(grad, kept, ranges, learned, task, layout) if may_compile else None
    if launch is not None:
        grad_x, *totals = launch.kernel(
            contiguous_view(grad, launch.shape),
            _seen_as(kept, launch.kept_shape),
            _seen_as(ranges, (3, *launch.of_channels)),
            launch.constants,
            _seen_as(learned, launch.of_channels),
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
        code = code.view(torch.int8).reshape(-1, code.shape[-1], LANES).movedim(-1, -2).contiguous()
    return code.as_strided(layout.shape, layout.strides)


def _seen_as(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the memory of a tensor as a contiguous one; the tensor itself where it is that."""
    return tensor if tensor.shape == shape and tensor.is_contiguous() else contiguous_view(tensor, shape)


def _may_compile(layout: Layout) -> bool:
    return not is_small(layout) and compiled.is_available()
