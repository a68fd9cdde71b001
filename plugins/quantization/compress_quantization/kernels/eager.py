"""The kernels without a compiler: torch's own operators, on blocks that stay in the cache of a core.

One operator after another over a whole activation is bound by memory: it was measured more than twice as slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from compress_quantization.kernels import formulas
from compress_quantization.kernels.formulas import Activation
from compress_quantization.kernels.layout import Layout

BLOCK = 32768  # elements; a few float32 arrays of this size fit into a typical second-level cache
Ranges = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Slices = tuple[slice, slice, slice]


def _blocks(layout: Layout, device: torch.device) -> Iterator[_Slices]:
    outer, channels, inner = layout.outer, layout.channels, layout.inner
    size = BLOCK if device.type == "cpu" else outer * channels * inner
    inner_size = min(inner, size)
    channel_size = min(channels, max(size // inner_size, 1))
    outer_size = min(outer, max(size // (inner_size * channel_size), 1))
    for i in range(0, outer, outer_size):
        for j in range(0, channels, channel_size):
            for k in range(0, inner, inner_size):
                yield slice(i, i + outer_size), slice(j, j + channel_size), slice(k, k + inner_size)


def _of_channels(ranges: Ranges, channels: slice) -> Ranges:
    step, low, high = (values.reshape(-1, 1)[channels] for values in ranges)
    return step, low, high


def quantize(x: torch.Tensor, out: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout) -> None:
    """Writes the quantized `x` to `out`; both have the layout."""
    source, target = layout.blocks(x), layout.blocks(out)
    for block in _blocks(layout, x.device):
        formulas.quantize(source[block], target[block], *_of_channels(ranges, block[1]), activation)


def quantize_and_encode(
    x: torch.Tensor, out: torch.Tensor, code: torch.Tensor, ranges: Ranges, activation: Activation, layout: Layout
) -> None:
    """Writes the quantized `x` to `out` and codes to `code`; all have the layout."""
    source, target, codes = layout.blocks(x), layout.blocks(out), layout.blocks(code)
    for block in _blocks(layout, x.device):
        _quantize_and_encode(source[block], target[block], codes[block], _of_channels(ranges, block[1]), activation)


def _quantize_and_encode(
    x: torch.Tensor, out: torch.Tensor, code: torch.Tensor, ranges: Ranges, activation: Activation
) -> None:
    # As formulas.quantize_and_encode, in place: each temporary that is not made saves a pass.
    step, low, high = ranges
    x = x.to(step.dtype)
    value = formulas.activate(x, activation)
    ratio = value.clamp(low, high).div_(step)
    rounded = ratio.round()
    out.copy_(rounded * step)
    code.copy_(rounded.sub_(ratio).mul_(formulas.ERROR_SCALE).round_())
    code.masked_fill_(value > high, formulas.ABOVE)
    if activation is None:
        code.masked_fill_(value < low, formulas.BELOW)
    else:
        code.masked_fill_(x <= 0, formulas.OFF)
    if activation == "relu6":
        code.masked_fill_(x >= formulas.UPPER, formulas.CUT)


def gradients_from_code(
    grad: torch.Tensor,
    code: torch.Tensor,
    grad_x: torch.Tensor,
    ranges: Ranges,
    activation: Activation,
    offset: bool,
    layout: Layout,
) -> tuple[torch.Tensor, ...]:
    """Writes dx to `grad_x`, returns drange and, with `offset`, dlow, each of shape (channels,)."""
    given, codes, target = layout.blocks(grad), layout.blocks(code), layout.blocks(grad_x)
    totals = _totals(ranges, layout, offset)
    for block in _blocks(layout, grad.device):
        local = _of_channels(ranges, block[1])
        sums = formulas.gradients_from_code(
            given[block], codes[block], target[block], *local, activation, offset, (0, 2)
        )
        for total, part in zip(totals, sums, strict=True):
            total[block[1]] += part
    return tuple(totals)


def gradients_from_input(
    grad: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor, ranges: Ranges, offset: bool, layout: Layout
) -> tuple[torch.Tensor, ...]:
    """Does what `gradients_from_code` does where x is at hand."""
    given, source, target = layout.blocks(grad), layout.blocks(x), layout.blocks(grad_x)
    totals = _totals(ranges, layout, offset)
    for block in _blocks(layout, grad.device):
        local = _of_channels(ranges, block[1])
        sums = formulas.gradients_from_input(given[block], source[block], target[block], *local, offset, (0, 2))
        for total, part in zip(totals, sums, strict=True):
            total[block[1]] += part
    return tuple(totals)


def _totals(ranges: Ranges, layout: Layout, offset: bool) -> list[torch.Tensor]:
    step = ranges[0]
    return [step.new_zeros(layout.channels) for _ in range(1 + offset)]


def number_of_blocks(layout: Layout) -> int:
    """Returns how many blocks a tensor on a CPU is taken in."""
    return math.ceil(layout.outer * layout.channels * layout.inner / BLOCK)
