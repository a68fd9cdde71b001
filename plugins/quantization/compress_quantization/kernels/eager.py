"""The kernels without a compiler: torch's own operators, on blocks that stay in the cache of a core.

One operator after another over a whole activation is bound by memory. And these are operators that torch vectorizes:
comparisons, `where` and `masked_fill` were measured up to ten times as slow as arithmetic, so masks are computed as
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from compress_quantization.kernels.formulas import (
    ABOVE,
    ERROR_SCALE,
    LARGEST_ERROR,
    UPPER,
    Activation,
    Ranges,
    activate,
)
from compress_quantization.kernels.layout import Layout

BLOCK = 32768  # elements; a few float32 arrays of this size fit into a typical second-level cache
_STEEP = 1e30  # makes any difference of two float32 numbers that matters larger than a code
_Slices = tuple[slice, slice, slice]
_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _blocks(layout: Layout) -> Iterator[_Slices]:
    outer, channels, inner = layout.outer, layout.channels, layout.inner
    inner_size = min(inner, BLOCK)
    channel_size = min(channels, max(BLOCK // inner_size, 1))
    outer_size = min(outer, max(BLOCK // (inner_size * channel_size), 1))
    for i in range(0, outer, outer_size):
        for j in range(0, channels, channel_size):
            for k in range(0, inner, inner_size):
                yield slice(i, i + outer_size), slice(j, j + channel_size), slice(k, k + inner_size)


def _each_block(
    layout: Layout, tensors: tuple[torch.Tensor, ...], ranges: Ranges
) -> Iterator[tuple[tuple[torch.Tensor, ...], Ranges, slice | None]]:
    """Yields the tensors, the ranges that belong to them, and the channels (None for all), block after block."""
    whole = tuple(layout.blocks(tensor) for tensor in tensors)
    step, low, high = ranges if layout.channels == 1 else (values.unsqueeze(-1) for values in ranges)
    if layout.numel <= BLOCK or tensors[0].device.type != "cpu":
        yield whole, (step, low, high), None
        return
    for block in _blocks(layout):
        channels = block[1]
        yield tuple(tensor[block] for tensor in whole), (step[channels], low[channels], high[channels]), channels


def quantize(x: torch.Tensor, out: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout) -> None:
    """Writes the quantized `x` to `out`; both have the layout."""
    for (source, target), (step, low, high), _ in _each_block(layout, (x, out), ranges):
        value = activate(source.to(step.dtype), activation)
        rounded = value.clamp(low, high).div_(step).round_()
        _write(target, rounded, step)


def _write(target: torch.Tensor, rounded: torch.Tensor, step: torch.Tensor) -> None:
    if target.dtype == rounded.dtype:
        torch.mul(rounded, step, out=target)
    else:
        target.copy_(rounded * step)


def quantize_and_encode(
    x: torch.Tensor, out: torch.Tensor, code: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout
) -> None:
    """Writes the quantized `x` to `out` and codes to `code`; all have the layout."""
    for (source, target, codes), (step, low, high), _ in _each_block(layout, (x, out, code), ranges):
        given = source.to(step.dtype)
        value = activate(given, activation)
        clipped = value.clamp(low, high)
        beyond = torch.sub(value, clipped)
        ratio = clipped.div_(step)
        rounded = ratio.round()
        _write(target, rounded, step)
        error = rounded.sub_(ratio).mul_(ERROR_SCALE).add_(beyond, alpha=_STEEP)
        if activation is not None:
            # The sign is 0 or -1 where ReLU does not pass, and UPPER - x is 0 or negative where ReLU6 clips.
            error.add_(torch.sign(given).sub_(1.0), alpha=_STEEP)
        if activation == "relu6":
            error.sub_(torch.sign(UPPER - given).sub_(1.0), alpha=_STEEP)
        codes.copy_(error.clamp_(-ABOVE, ABOVE).round_())


def gradients_from_code(
    grad: torch.Tensor, code: torch.Tensor, grad_x: torch.Tensor, dtype: torch.dtype, layout: Layout
) -> torch.Tensor:
    """Writes dx to `grad_x`, returns the sums of `formulas`, of shape (3, channels) and `dtype`."""

    def parts(kept: torch.Tensor, _: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        value = kept.to(dtype)
        error = value.clamp(-LARGEST_ERROR, LARGEST_ERROR)
        side = value.sub_(error).mul_(1.0 / (ABOVE - LARGEST_ERROR)).round_()
        return error.sub_(side, alpha=LARGEST_ERROR).mul_(1.0 / ERROR_SCALE), side

    nothing = torch.empty(layout.channels, dtype=dtype, device=grad.device)
    return _gradients(grad, code, grad_x, (nothing, nothing, nothing), layout, parts)


def gradients_from_input(
    grad: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor, ranges: Ranges, layout: Layout
) -> torch.Tensor:
    """Does what `gradients_from_code` does where x is at hand."""

    def parts(kept: torch.Tensor, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        step, low, high = ranges
        value = kept.to(step.dtype)
        clipped = value.clamp(low, high)
        side = torch.sub(value, clipped).sign_()
        ratio = clipped.div_(step)
        return ratio.round().sub_(ratio), side

    return _gradients(grad, x, grad_x, ranges, layout, parts)


def _gradients(
    grad: torch.Tensor,
    kept: torch.Tensor,
    grad_x: torch.Tensor,
    ranges: Ranges,
    layout: Layout,
    parts: Callable[[torch.Tensor, Ranges], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Sums for each channel.

    `parts` gives for each element the rounding error in steps (0 outside) and the side: 1 above, -1 below, 0 inside.
    """
    dtype = ranges[0].dtype
    totals = torch.zeros(3, layout.channels, dtype=dtype, device=grad.device)
    for (given, keeping, target), local, channels in _each_block(layout, (grad, kept, grad_x), ranges):
        error, side = parts(keeping, local)
        sums = _write_and_sum(given.to(dtype), error, side, target)
        of_block = totals if channels is None else totals[:, channels]
        of_block += torch.stack(sums)
    return totals


def _write_and_sum(
    grad: torch.Tensor, error: torch.Tensor, side: torch.Tensor, grad_x: torch.Tensor
) -> list[torch.Tensor]:
    """Writes dx; returns, for each channel, the gradient's sums weighed by the error, above, and outside."""
    # Not above from above + below and above - below: behind a ReLU half of all elements are below.
    sums = [_sum(grad, error), _sum(grad, side.clamp_min(0.0))]
    side = side.abs_()
    sums.append(_sum(grad, side))
    if grad_x.dtype == grad.dtype:
        torch.addcmul(grad, grad, side, value=-1, out=grad_x)
    else:
        grad_x.copy_(torch.addcmul(grad, grad, side, value=-1))
    return sums


def _sum(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if grad.shape[1] == 1:
        return torch.dot(grad.reshape(-1), weight.reshape(-1)).reshape(1)
    return (grad * weight).sum((0, 2))
