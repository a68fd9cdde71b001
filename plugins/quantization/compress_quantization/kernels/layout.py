"""Views of a tensor in the order of its memory, so that a kernel need not know about dimensions or memory formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

LANES = 4
"""Codes of one byte in a word of 32 bits, because compilers load single bytes slowly.

Buys 11 % of a training step of MobileNetV2 with 256-bit vectors, 0.5 % (ResNet-18: 0.4 %) with AVX-512. The simple way
would be codes in int8, without `lanes` (the quantizers of a step: 82 instead of 45 ms, with AVX-512 38 instead of 37).
"""

LONGEST_ROW = 2048
"""Sums run over rows of up to so many elements.

Rows are what threads share (two of them take 30 % less for 2 million elements), and keep sums exact: 6e-8 instead of
1.5e-6 off for 6 million elements in one row. With one thread one row would be as fast.
"""

_VECTOR = 8
# Rows of `columns` that are summed at a time: what threads share (18 % of such a kernel with two, 0 to 2 % with one).
_BLOCK = 16


@dataclass(frozen=True)
class Layout:
    """How a dense tensor is seen as (outer, channels, inner), contiguous in this order.

    Attributes:
        shape: Shape of the tensor.
        strides: Strides of the tensor.
        outer: Number of elements before the channel, counted in the order of memory.
        channels: Number of channels; 1 for one grid for the whole tensor.
        inner: Number of elements behind the channel.
        launches: How kernels are called for such tensors, see `launches`.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    outer: int
    channels: int
    inner: int
    launches: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def kind(self) -> str:
        """`flat`, `rows` (channels, inner), `columns` (outer, channels) or `planes` (all three).

        Each kind has kernels of its own, because loops over dimensions of size one cost time (channels last as `planes`
        with one element behind each channel: ten times the time of `columns`), and compilers specialize on that size.
        Planes of few elements have none: it would save 0.7 % of a training step of MobileNetV2 at 64 pixels.
        """
        if self.channels == 1:
            return "flat"
        if self.outer == 1:
            return "rows"
        return "columns" if self.inner == 1 else "planes"

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return self.outer * self.channels * self.inner

    @cached_property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of the tensor as a kernel sees it that treats elements one by one."""
        outer, channels, inner = self.outer, self.channels, self.inner
        shapes = {"flat": (outer * inner,), "rows": (channels, inner), "columns": (outer, channels)}
        return shapes.get(self.kind, (outer, channels, inner))

    @cached_property
    def lanes(self) -> int:
        """How many neighbouring rows a kernel can treat together: `LANES` or 1."""
        rows = {"flat": self.numel, "columns": self.outer}.get(self.kind, self.channels)
        return 1 if rows % LANES else LANES

    def lane_shape(self, lanes: int) -> tuple[int, ...]:
        """Returns the shape of the tensor as a kernel sees it that treats `lanes` rows together.

        Lanes come before what is within a row: (rows, lanes, row) for `flat`, (channels, lanes, inner) for `rows`,
        (outer, channels, lanes, inner) for `planes`, and (blocks, rows, lanes, channels) for `columns`.
        """
        if self.kind == "flat":
            row = _row_length(self.numel // lanes)
            return self.numel // (lanes * row), lanes, row
        if self.kind == "columns":
            rows = self.outer // lanes
            block = _largest_divisor(rows, _BLOCK)
            return rows // block, block, lanes, self.channels
        rows_shape = (self.channels // lanes, lanes, self.inner)
        return rows_shape if self.kind == "rows" else (self.outer, *rows_shape)

    def blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the memory of `tensor`, which has this layout, as (outer, channels, inner); without a graph."""
        return contiguous_view(tensor, (self.outer, self.channels, self.inner))

    def arranged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`, of the same shape, in this layout; a copy unless it is so already."""
        if tensor.stride() == self.strides:
            return tensor
        return self.empty(tensor).copy_(tensor)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Returns an uninitialized tensor in this layout."""
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)

    def restored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gives a new, contiguous tensor this shape and these strides, in place.

        In place, because an autograd.Function that returns a view breaks under in-place operations on what it returned.
        """
        return tensor.as_strided_(self.shape, self.strides)


def contiguous_view(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the memory of a dense tensor, from its first element on, as a contiguous tensor."""
    return tensor.as_strided(shape, _contiguous_strides(shape))


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...], channel_dim: int | None) -> Layout | None:
    """Returns the layout of a tensor, or None when it has gaps in memory or elements that overlap.

    Args:
        shape: Its shape; no dimension is 0.
        strides: Its strides.
        channel_dim: Dimension of the channels; None for one grid for the whole tensor.
    """
    order = sorted((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: strides[dim], reverse=True)
    expected = 1
    for dim in reversed(order):
        if strides[dim] != expected:
            return None
        expected *= shape[dim]
    if channel_dim is None or shape[channel_dim] == 1:
        return Layout(shape, strides, 1, 1, expected)
    position = order.index(channel_dim)
    outer = _product(shape[dim] for dim in order[:position])
    inner = _product(shape[dim] for dim in order[position + 1 :])
    return Layout(shape, strides, outer, shape[channel_dim], inner)


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _row_length(count: int) -> int:
    """Returns a divisor of `count` that is short enough, of whole vectors if possible; `count` where there is none."""
    row = _largest_divisor(count, LONGEST_ROW, _VECTOR) or _largest_divisor(count, LONGEST_ROW)
    return count if row < _VECTOR else row


@lru_cache(maxsize=4096)
def _largest_divisor(count: int, limit: int, multiple_of: int = 1) -> int:
    """Returns the largest divisor of `count` up to `limit` that is a multiple of `multiple_of`, or 0."""
    candidates = range(min(limit, count) // multiple_of * multiple_of, 0, -multiple_of)
    return next((size for size in candidates if count % size == 0), 0)


@lru_cache(maxsize=4096)
def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
