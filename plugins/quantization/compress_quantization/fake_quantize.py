"""Fake-quantizers: tensors take the values that integers of a few bits can stand for, and stay floating point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_core import DataError
from compress_quantization.grid import Grid

_EPS = 1e-16


class FakeQuantize(nn.Module):
    """Base of the fake-quantizers."""

    cacheable = True

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bits: int = 8,
        signed: bool = False,
        narrow_range: bool = False,
        half_range: bool = False,
        logarithm_scale: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.signed = tuple(shape), bits, signed
        self.narrow_range, self.half_range, self.logarithm_scale = narrow_range, half_range, logarithm_scale
        self.enabled = True
        self.lr_multiplier = 1.0
        self.observer: Callable[[torch.Tensor], Any] | None = None

    @property
    def channel_dim(self) -> int | None:
        """Dimension of the channels, or None for one grid for the whole tensor."""
        dims = [dim for dim, size in enumerate(self.shape) if size > 1]
        return dims[0] if dims else None

    def levels(self) -> tuple[int, int]:
        """Returns the smallest and the largest integer of the grid."""
        raise NotImplementedError

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the low end and the width of the range; the shape of the scale."""
        raise NotImplementedError

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the smallest and the largest value of the grid; the shape of the scale."""
        low, width = self.bounds()
        return low, low + width

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Sets the range from statistics."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` on the grid."""
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.enabled or not x.is_floating_point() or x.numel() == 0:
            return x
        low, width = self.bounds()
        smallest, largest = self.levels()
        steps = (largest - smallest) / width
        clipped = torch.maximum(torch.minimum(x, low + width), low)
        zero_point = torch.round(-low * steps).detach()
        u = (clipped - low) * steps
        return ((u + (torch.round(u) - u).detach()) - zero_point) / steps

    def grid(self) -> Grid:
        """Returns the grid for runtimes."""
        low, width = self.bounds()
        smallest, largest = self.levels()
        scale = (width / (largest - smallest)).detach().float().reshape(-1)
        zero = torch.round(-low.detach() / width * (largest - smallest)).to(torch.int32).reshape(-1) + smallest
        if self.channel_dim is None:
            scale, zero = scale.reshape(()), zero.reshape(())
        return Grid(scale, zero, smallest, largest, self.channel_dim)


def _checked(minimum: torch.Tensor, maximum: torch.Tensor) -> None:
    if not (torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise DataError(f"a range must be finite, got [{minimum.min():.4g}, {maximum.max():.4g}]")


class SymmetricFakeQuantize(FakeQuantize):
    """Learns the scale."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(shape, **options)
        self.scale = nn.Parameter(torch.ones(shape))

    def levels(self) -> tuple[int, int]:
        """See base."""
        bits = self.bits - 1 if self.half_range else self.bits
        if self.signed:
            return -(2 ** (bits - 1)) + int(self.narrow_range), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1 - int(self.narrow_range)

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See base."""
        smallest, largest = self.levels()
        high = self.scale.abs() + _EPS
        low = high * (smallest / largest)
        return low, high - low

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """See base."""
        _checked(minimum, maximum)
        scale = torch.maximum(minimum.abs(), maximum.abs())
        with torch.no_grad():
            self.scale.copy_(torch.where(scale <= 0.1, torch.full_like(scale, 0.1), scale))


class AsymmetricFakeQuantize(FakeQuantize):
    """Learns both ends of the range."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(shape, **options)
        self.input_low = nn.Parameter(torch.zeros(shape))
        self.input_range = nn.Parameter(torch.ones(shape))

    def levels(self) -> tuple[int, int]:
        """See base."""
        return 0, 2 ** (self.bits - 1 if self.half_range else self.bits) - 1

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See base."""
        _, n = self.levels()
        low = self.input_low
        high = low + self.input_range.abs() + _EPS
        low, high = low.clamp(max=0), high.clamp(min=0)
        zero = torch.round(-low * n / (high - low))
        a = torch.where(zero < n, zero / (zero - n) * high, low)
        b = torch.where(zero > 0, (zero - n) / zero * low, high)
        first = high - a > b - low
        tuned_low, tuned_high = torch.where(first, a, low), torch.where(first, high, b)
        low = low + (tuned_low - low).detach()
        high = high + (tuned_high - high).detach()
        return low, high - low

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """See base."""
        _checked(minimum, maximum)
        width = maximum - minimum
        floor = torch.maximum(0.01 * width.max(), torch.full_like(width.max(), 1e-3))
        slack = (width.clamp(min=floor) - width) / 2
        with torch.no_grad():
            self.input_low.copy_(minimum - slack)
            self.input_range.copy_(width + 2 * slack)
