"""The kernels as compilers get them: a few neighbouring rows of a tensor at a time.

A tensor comes in a view of `Layout.lane_shape`, (..., lanes, row), and its codes as (..., row): with four lanes, words
of 32 bits that hold a byte of each, else bytes. Besides making codes cheap to load, this keeps the loop that writes
elements and the loop that sums rows one loop: whole tensors would be written in a flat loop of their own.

What comes out of lanes is new: with results in tensors that are given, they would be written twice. From the learned
parameters to their gradients everything is in the kernels, because each operator that runs outside costs as much time
as some ten thousand elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress_quantization.kernels import formulas
from compress_quantization.kernels.formulas import Activation, Parts, StepLowHigh
from compress_quantization.kernels.sources import Source, ranges_of

_GROUPED = ("rows", "planes")  # kinds whose ranges come as (channels / lanes, lanes), since each lane has its own


class Variant(NamedTuple):
    """What a kernel is specialized on.

    Attributes:
        kind: Kind of the layout.
        dtype: What is computed in.
        activation: Activation function before the quantizer.
        source: Kind of the source of the range, for kernels that compute it.
        offset: Whether the range has a low end of its own, for gradients.
    """

    kind: str
    dtype: torch.dtype
    activation: Activation = None
    source: str = ""
    offset: bool = False


def quantize(
    x: torch.Tensor, levels: torch.Tensor, *source: torch.Tensor, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and the ranges, (3, channels): step, low, high.

    Here `x` is a view of `Layout.view_shape`: nothing but elements is computed.
    """
    ranges = _ranges(source, levels, variant)
    step, low, high = ranges.unbind() if variant.kind in {"flat", "columns"} else ranges.unsqueeze(-1).unbind()
    y = formulas.quantized(x, (step, low, high), variant.activation)
    return formulas.representable(y, x.dtype).to(x.dtype), ranges


def quantize_in_place(
    x: torch.Tensor, levels: torch.Tensor, *source: torch.Tensor, variant: Variant
) -> tuple[torch.Tensor, ...]:
    """Does what `quantize` does, writes y to `x`, and returns the ranges."""
    y, ranges = quantize(x, levels, *source, variant=variant)
    x.copy_(y)
    return (ranges,)


def quantize_and_encode(
    x: torch.Tensor, levels: torch.Tensor, *source: torch.Tensor, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, the codes, and the ranges, of the shape of the source, with a dimension of 3 before.

    What belongs to channels has the shape (channels,), or (channels / lanes, lanes) for `rows` and `planes`.
    """
    ranges = _ranges(source, levels, variant)
    lanes = x.shape[-2]
    parts, words = [], []
    for lane, local in enumerate(_of_lanes(ranges, x, variant)):
        y, code = formulas.encoded(x.select(-2, lane), local, variant.activation)
        parts.append(formulas.representable(y, x.dtype).to(x.dtype))
        words.append(code.to(torch.int8) if lanes == 1 else (code.to(torch.int32) & 255) << (8 * lane))
    word = words[0]
    for other in words[1:]:
        word = word | other
    return torch.stack(parts, -2), word, ranges


def gradients_from_code(
    grad: torch.Tensor,
    code: torch.Tensor,
    ranges: torch.Tensor,
    factors: torch.Tensor,
    learned: torch.Tensor,
    *,
    variant: Variant,
) -> tuple[torch.Tensor, ...]:
    """Returns dx, drange times the sign of what is learned, and, with an offset, dlow.

    Args:
        grad: View of `Layout.lane_shape`.
        code: View of the codes, without the dimension of lanes.
        ranges: As `quantize_and_encode` returns them.
        factors: The numbers of `formulas.factors_of`.
        learned: Of the shape that ranges have for each channel.
        variant: What this is about.
    """
    lanes = grad.shape[-2]
    parts = []
    for lane in range(lanes):
        # Shifted to the left and back, so that the sign comes along.
        byte = code if lanes == 1 else (code << (24 - 8 * lane)) >> 24
        parts.append(formulas.from_code(grad.select(-2, lane), byte.to(variant.dtype)))
    return _collected(grad, parts, ranges, factors, learned, variant)


def gradients_from_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    ranges: torch.Tensor,
    factors: torch.Tensor,
    learned: torch.Tensor,
    *,
    variant: Variant,
) -> tuple[torch.Tensor, ...]:
    """Does what `gradients_from_code` does where x is at hand; both in views with one lane: no bytes are loaded."""
    (local,) = _of_lanes(ranges, x, variant)
    parts = formulas.from_input(grad.squeeze(-2), x.squeeze(-2), local, variant.activation)
    return _collected(grad, [parts], ranges, factors, learned, variant)


def _ranges(source: tuple[torch.Tensor, ...], levels: torch.Tensor, variant: Variant) -> torch.Tensor:
    # Stacked, so that they are computed once, and not for each element anew.
    smallest, largest, top = levels.unbind()
    return torch.stack(ranges_of(Source(variant.source, source), (smallest, largest, top), variant.dtype))


def _of_lanes(ranges: torch.Tensor, x: torch.Tensor, variant: Variant) -> list[StepLowHigh]:
    """Returns for each lane the ranges that broadcast against its rows."""
    lanes = x.shape[-2]
    if variant.kind in _GROUPED:
        grouped = ranges.unsqueeze(-1)
        return [(grouped[0, :, lane], grouped[1, :, lane], grouped[2, :, lane]) for lane in range(lanes)]
    return [(ranges[0], ranges[1], ranges[2])] * lanes


def _collected(
    grad: torch.Tensor,
    parts: list[Parts],
    ranges: torch.Tensor,
    factors: torch.Tensor,
    learned: torch.Tensor,
    variant: Variant,
) -> tuple[torch.Tensor, ...]:
    grad_x = torch.stack([inside.to(grad.dtype) for inside, *_ in parts], -2)
    sums = [_sum([part[index] for part in parts], variant) for index in (1, 2, 3)]
    step, low, high = ranges.unbind()
    of_error, below_range, below_low = factors.unbind()
    slopes = formulas.slopes((step, low, high), (of_error, below_range, below_low), variant.activation)
    drange, *dlow = formulas.weighed(sums, slopes, variant.offset)
    return grad_x, drange * torch.sign(learned.to(drange.dtype)), *dlow


def _sum(lanes: list[torch.Tensor], variant: Variant) -> torch.Tensor:
    """Returns sums for each channel, of the shape that ranges have."""
    if variant.kind in _GROUPED:
        sums = [lane.sum(-1) for lane in lanes]
        return torch.stack(sums if variant.kind == "rows" else [total.sum(0) for total in sums], -1)
    # Added before they are summed: a sum for each lane would not fit into the registers.
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    if variant.kind == "flat":
        return total.sum(-1).sum(0, keepdim=True)
    return total.sum(1).sum(0)
