"""From learned parameters to the range of a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress_quantization.kernels.formulas import Number, StepLowHigh

TINY = 2.0**-108
"""The smallest scale or width, 3e-33: a step of 2^16 of it, the range moved for its zero point, is a normal float32."""

Levels = tuple[Number, Number, Number]


class Source(NamedTuple):
    """What a range is computed from.

    Attributes:
        kind: `symmetric`: the scale S; `asymmetric`: the low end and the width; `given`: step, low and high.
        tensors: These, of the shape of the learned range, or (channels,) when given.
    """

    kind: str
    tensors: tuple[torch.Tensor, ...]


def levels_of(smallest: int, largest: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Returns the ends of the grid, in steps, and how far up values count as inside.

    Both S and the largest value of the grid are inside the range, whatever rounding did to the step: a saturated value
    that comes back, or the 6 of a ReLU6, is not outside.
    """
    return smallest, largest, largest * (1 + 2 * torch.finfo(dtype).eps)


def ranges_of(source: Source, levels: Levels, dtype: torch.dtype) -> StepLowHigh:
    """Returns `step`, `low` and `high` of `formulas`, of the shape of the source.

    Args:
        source: Parameters, used without a graph.
        levels: See `levels_of`; numbers, or tensors of no dimension.
        dtype: What is computed in.
    """
    if source.kind == "given":
        step, low, high = source.tensors
        return step, low, high
    if source.kind == "symmetric":
        smallest, largest, top = levels
        step = source.tensors[0].detach().to(dtype).abs().clamp_min(TINY) / largest
        return step, step * smallest, step * top
    low, width = (tensor.detach().to(dtype) for tensor in source.tensors)
    return from_ends(low, width.abs().clamp_min(TINY), levels[1])


def ranges_of_channels(source: Source, levels: tuple[int, int], dtype: torch.dtype) -> StepLowHigh:
    """Returns `step`, `low` and `high` of a grid with these levels, of shape (channels,)."""
    step, low, high = ranges_of(source, levels_of(*levels, dtype), dtype)
    return step.reshape(-1), low.reshape(-1), high.reshape(-1)


def raised(ranges: StepLowHigh, smallest: float) -> StepLowHigh:
    """Returns the range of a grid whose step is at least `smallest`, with the same integers and zero point.

    Runtimes compute with such a grid instead of one with a smaller step. Where the step is not smaller, the range stays
    the same to the last bit.
    """
    step, low, high = ranges
    is_small = step < smallest
    wide = torch.full_like(step, smallest)
    upward = 1 + 2 * torch.finfo(step.dtype).eps  # as in `levels_of`
    return (
        torch.where(is_small, wide, step),
        torch.where(is_small, torch.round(low / step) * wide, low),
        torch.where(is_small, torch.round(high / step) * (wide * upward), high),
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what is computed in for tensors of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def from_ends(low: torch.Tensor, width: torch.Tensor, n: Number) -> StepLowHigh:
    """Returns the range, with zero on the grid, of `n` steps between a low end and `width` above it."""
    low, high, zero_point = _tuned(low, low + width, n)
    step = (high - low) / n
    return step, torch.minimum(low, -zero_point * step), torch.maximum(high, (n - zero_point) * step)


def _tuned(low: torch.Tensor, high: torch.Tensor, n: Number) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the range with zero on the grid, and the integer that stands for zero."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    zero_point = torch.round(-low / (high - low) * n)
    moved_low = torch.where(zero_point < n, zero_point / (zero_point - n).clamp_max(-1) * high, low)
    moved_high = torch.where(zero_point > 0, (zero_point - n) / zero_point.clamp_min(1) * low, high)
    first = high - moved_low > moved_high - low
    return torch.where(first, moved_low, low), torch.where(first, high, moved_high), zero_point
