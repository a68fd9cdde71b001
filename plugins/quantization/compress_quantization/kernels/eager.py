"""The kernels without a compiler: torch's own operators, on blocks that stay in the cache of a core.

One operator after another over a whole activation is bound by memory. And these are operators that torch vectorizes
well: comparisons, `where` and `masked_fill` were measured up to ten times as slow as arithmetic, while the backward
operators of ReLU and hardtanh select elements in one pass. They compare with numbers, so everything is taken in steps,
where the ends of a symmetric grid are the same for all channels. Where they are not, `formulas` is run as it stands;
were that the only way, a training step of ResNet-18 takes 1.5 times as long (its quantizers 817 instead of 154 ms).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from compress_quantization.kernels import formulas
from compress_quantization.kernels.formulas import ERROR_SCALE, LARGEST_ERROR, SMOOTH, UPPER, Activation, StepLowHigh
from compress_quantization.kernels.layout import Layout, contiguous_view

BLOCK = 131072
"""Elements of a block: a few float32 arrays of this size fit into the caches of a core.

Blocks buy 8 % of the peak memory of a training step of ResNet-18 (the small ViT: 6 %), where the simple way has the
intermediate results of whole activations, and halve the time for activations of 6 million elements (the first of
ResNet-18 at 224 pixels, batch 8). At 64 pixels there is no difference beyond noise in time, and an eval forward of the
ViT would be 5 % faster without.
"""

_Slices = tuple[slice, slice, slice]
_BELOW_UPPER = UPPER * (1 - 2**-23)  # in float32
_aten = torch.ops.aten


def is_host(device: torch.device) -> bool:
    """Tells whether values can be read without waiting for a device, and whether blocks are of use."""
    return device.type == "cpu"


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
    layout: Layout, tensors: tuple[torch.Tensor, ...], ranges: StepLowHigh
) -> Iterator[tuple[tuple[torch.Tensor, ...], StepLowHigh, slice | None]]:
    """Yields the tensors, the ranges that belong to them, and the channels (None for all), block after block."""
    is_one = layout.numel <= BLOCK or not is_host(tensors[0].device)
    if layout.channels == 1:
        flat = [contiguous_view(tensor, (layout.numel,)) for tensor in tensors]
        blocks = zip(*(torch.split(tensor, layout.numel if is_one else BLOCK) for tensor in flat), strict=True)
        yield from ((block, ranges, None) for block in blocks)
        return
    whole = tuple(layout.blocks(tensor) for tensor in tensors)
    step, low, high = (values.unsqueeze(-1) for values in ranges)
    if is_one:
        yield whole, (step, low, high), None
        return
    for block in _blocks(layout):
        channels = block[1]
        yield tuple(tensor[block] for tensor in whole), (step[channels], low[channels], high[channels]), channels


def _common_ends(ranges: StepLowHigh) -> tuple[float, float] | None:
    """Returns the ends of the range in steps, if they are the same for all channels but for rounding.

    None on other devices than the host, whatever they are: each training step would wait there for each quantizer.
    """
    step, low, high = ranges
    if not is_host(step.device):
        return None
    ends = torch.stack([low / step, high / step])
    smallest, largest = ends.amin(1).tolist(), ends.amax(1).tolist()
    tolerance = 4 * torch.finfo(step.dtype).eps
    if any(b - a > tolerance * abs(b) for a, b in zip(smallest, largest, strict=True)):
        return None
    return smallest[0], largest[1]


def _just_outside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the next numbers of this dtype below `low` and above `high`."""
    if dtype == torch.float64:
        return math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    single = np.float32
    return (
        float(np.nextafter(single(low), single(-np.inf))),
        float(np.nextafter(single(high), single(np.inf))),
    )


def quantize(x: torch.Tensor, out: torch.Tensor, ranges: StepLowHigh, activation: Activation, layout: Layout) -> None:
    """Writes the quantized `x` to `out`; both have the layout."""
    dtype, ends = ranges[0].dtype, _common_ends(ranges)
    for (source, target), local, _ in _each_block(layout, (x, out), ranges):
        if ends is None:
            target.copy_(formulas.representable(formulas.quantized(source, local, activation), target.dtype))
            continue
        value = formulas.activate(source.to(dtype), activation)
        rounded = torch.div(value, local[0]).clamp_(*ends).round_()
        if target.dtype == dtype:
            torch.mul(rounded, local[0], out=target)
        else:
            target.copy_(formulas.representable(rounded.mul_(local[0]), target.dtype))


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor,
    ranges: StepLowHigh,
    activation: Activation,
    layout: Layout,
) -> torch.Tensor:
    """Writes dx to `grad_x`, returns the sums of `formulas`, of shape (3, channels); all have the layout."""
    dtype, ends = ranges[0].dtype, _common_ends(ranges)
    totals = torch.zeros(3, layout.channels, dtype=dtype, device=grad.device)
    of_all: list[torch.Tensor] = []
    dims = () if layout.channels == 1 else (0, 2)
    for (given, source, target), local, channels in _each_block(layout, (grad, x, grad_x), ranges):
        out = target if target.dtype == dtype else torch.empty_like(given, dtype=dtype)
        taken = source.to(dtype)
        error, *others = _parts(given.to(dtype), taken, out, local, activation, ends)
        of_error = (out * error).sum(dims) if dims else torch.dot(out, error)
        sums = [of_error, *(part.sum(dims) for part in others)]
        if channels is None:
            of_all += sums
        else:
            totals[:, channels] += torch.stack(sums)
        result = SMOOTH[activation](out, taken) if activation in SMOOTH else out
        if result is not target:
            target.copy_(result)
    if of_all:
        totals = torch.stack(of_all).view(-1, 3, layout.channels).sum(0)
    if activation == "relu6" and ends is not None:
        # Where the range ends before 6, what is above the range, otherwise what ReLU6 clips.
        totals[1] = torch.where(UPPER / ranges[0] > ends[1], totals[1], totals[2])
    if formulas.is_clip(activation):
        totals[2] = totals[1]  # below, nothing counts
    return totals


def _parts(
    grad: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor,
    ranges: StepLowHigh,
    activation: Activation,
    ends: tuple[float, float] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes dx to `grad_x`; returns the rounding error in steps, and what the other sums run over.

    These are what is above, and what is outside; behind a ReLU6, what it clips. The backward of a smooth activation
    function is not part of dx yet.
    """
    if ends is None:
        _, code = formulas.encoded(x, ranges, activation)
        inside, _, above, outside = formulas.from_code(grad, code)
        grad_x.copy_(inside)
        return code.clamp_(-LARGEST_ERROR, LARGEST_ERROR).mul_(1.0 / ERROR_SCALE), above, outside
    value = formulas.activate(x, activation)
    ratio = torch.div(value, ranges[0])
    # With one range for all, ends are compared exactly; in steps, rounding may move what is within it of an end.
    compared, (low, high) = ratio, ends
    if ranges[0].ndim == 1:
        compared, low, high = value, float(ranges[1]), float(ranges[2])
    inside = grad
    if activation == "relu":
        inside = _aten.threshold_backward(grad, x, 0.0)
    elif activation == "relu6":
        inside = _aten.hardtanh_backward(grad, x, 0.0, UPPER)
    # These leave out their ends, which are inside the range.
    below_low, above_high = _just_outside(low, high, ratio.dtype)
    _aten.hardtanh_backward.grad_input(inside, compared, below_low, above_high, grad_input=grad_x)
    above = _aten.threshold_backward(grad, compared, high)
    ratio.clamp_(*ends)
    error = ratio.round().sub_(ratio)
    if activation == "relu6":
        return error, above, _aten.threshold_backward(grad, x, _BELOW_UPPER)
    return error, above, above if formulas.is_clip(activation) else grad - grad_x
