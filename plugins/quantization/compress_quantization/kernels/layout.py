"""Views of a tensor in the order of its memory, so that a kernel need not know about dimensions or memory formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class Layout:
    """How a dense tensor is seen as (outer, channels, inner), contiguous in this order.

    Attributes:
        shape: Shape of the tensor.
        strides: Strides of the tensor.
        outer: Number of elements before the channel, counted in the order of memory.
        channels: Number of channels; 1 for one grid for the whole tensor.
        inner: Number of elements behind the channel.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    outer: int
    channels: int
    inner: int

    @cached_property
    def kind(self) -> str:
        """`flat`, `rows` (channels, inner), `columns` (outer, channels) or `planes` (all three).

        Each kind has kernels of its own: loops over dimensions of size one cost time, and torch.compile specializes on
        that size.
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
        """Shape of the tensor as a kernel of this kind sees it."""
        outer, channels, inner = self.outer, self.channels, self.inner
        shapes = {"flat": (outer * inner,), "rows": (channels, inner), "columns": (outer, channels)}
        return shapes.get(self.kind, (outer, channels, inner))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the memory of `tensor`, which has this layout, as a contiguous view.

        Detached: torch.compile guards what a view is a view of, and would compile again for other shapes of that.
        """
        shape = self.view_shape
        return tensor.detach().as_strided(shape, _contiguous_strides(shape))

    def blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the memory of `tensor`, which has this layout, as (outer, channels, inner); without a graph."""
        shape = (self.outer, self.channels, self.inner)
        return tensor.as_strided(shape, _contiguous_strides(shape))

    @cached_property
    def unrolled(self) -> Layout:
        """The same tensor with each element behind the channel as a channel of its own: `columns` for `planes`.

        Loops over `inner` that are shorter than a vector register waste it.
        """
        return Layout(self.shape, self.strides, self.outer, self.channels * self.inner, 1)

    def arranged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`, of the same shape, in this layout; a copy unless it is so already."""
        if tensor.stride() == self.strides:
            return tensor
        return torch.empty_strided(self.shape, self.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Returns an uninitialized tensor in this layout."""
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)


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


@lru_cache(maxsize=4096)
def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
