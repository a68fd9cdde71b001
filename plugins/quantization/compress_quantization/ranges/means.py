"""Statistics that are means over batches or samples."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import torch

from compress_quantization.ranges.quantiles import QuantileSketch
from compress_quantization.ranges.statistics import RangeStatistics, TensorInfo


class _Mean(RangeStatistics):
    """Base class of means over batches or samples; sums are float64."""

    def __init__(self, tensor: TensorInfo, *settings: Any) -> None:
        super().__init__(tensor, *settings)
        self._sum: torch.Tensor | None = None
        self._number = 0
        self._parts: list[torch.Tensor] | None = None  # of the batch that is being added

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        self._parts = []
        try:
            yield
            if self._parts:
                self._add_batch(self._parts)
        finally:
            self._parts = None

    def _add(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        part = self._part(x, low, high)
        if self._parts is None:
            self._add_batch([part])
        else:
            self._parts.append(part)

    @abstractmethod
    def _part(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Returns what is needed of a part of a batch; it shares no memory with `x`."""

    @abstractmethod
    def _add_batch(self, parts: list[torch.Tensor]) -> None:
        """Adds a batch, given what is needed of its parts."""

    def _accumulate(self, sums: torch.Tensor, number: int) -> None:
        """Adds the sums of `number` minima and maxima; float64, shape (2, channels)."""
        self._sum = sums if self._sum is None else self._sum.to(sums.device) + sums
        self._number += number

    def _merge(self, other: Self) -> None:
        assert other._sum is not None
        self._accumulate(other._sum, other._number)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._sum is not None
        low, high = self._sum / self._number
        return low, high


class MeanMinMax(_Mean):
    """Means over batches of the smallest and of the largest value; batches of any size have the same weight.

    Args:
        tensor: What the statistics are about.
        abs_max: Whether the maximum is that of |x|.
    """

    def __init__(self, tensor: TensorInfo, abs_max: bool) -> None:
        super().__init__(tensor, abs_max)
        self._abs_max = abs_max

    def _part(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.stack([low, torch.maximum(high, -low) if self._abs_max else high]).double()

    def _add_batch(self, parts: list[torch.Tensor]) -> None:
        self._accumulate(_extremes(parts), 1)


class SampleMeanMinMax(_Mean):
    """Means over samples of each sample's smallest and largest value, over all parts that it has in a batch.

    Parts may disagree about the number of samples, such as windows of an image. A part with one sample belongs to all;
    otherwise neighbours are one sample, as many as give all parts the same number.

    Args:
        tensor: The tensor, as a whole.
        symmetric: Whether to use each sample's largest |x| instead, and the smallest value of all samples.
    """

    def __init__(self, tensor: TensorInfo, symmetric: bool) -> None:
        super().__init__(tensor, symmetric)
        self._symmetric = symmetric
        self._lowest: torch.Tensor | None = None

    def _part(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        self._lowest = low.clone() if self._lowest is None else torch.minimum(low, self._lowest.to(low))
        lows, highs = torch.aminmax(x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1), dim=1)
        return torch.stack([lows, torch.maximum(highs, -lows) if self._symmetric else highs])

    def _add_batch(self, parts: list[torch.Tensor]) -> None:
        number = math.gcd(*[part.shape[1] for part in parts if part.shape[1] > 1]) or 1
        by_sample = [part.reshape(2, number, -1) if part.shape[1] > 1 else part.unsqueeze(-1) for part in parts]
        of_samples = _extremes([torch.stack([low.amin(-1), high.amax(-1)]) for low, high in by_sample])
        self._accumulate(of_samples.sum(1, keepdim=True, dtype=torch.float64), number)

    def _merge(self, other: Self) -> None:
        super()._merge(other)
        assert self._lowest is not None
        assert other._lowest is not None
        self._lowest = torch.minimum(self._lowest, other._lowest.to(self._lowest))

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super()._range()
        assert self._lowest is not None
        return (self._lowest if self._symmetric else low), high


def _extremes(parts: list[torch.Tensor]) -> torch.Tensor:
    """Returns the smallest of the first and the largest of the second entries of tensors that broadcast."""
    low, high = parts[0]
    for part in parts[1:]:
        low, high = torch.minimum(low, part[0].to(low)), torch.maximum(high, part[1].to(high))
    return torch.stack([low, high])


class MeanPercentile(_Mean):
    """Means over batches of two exact percentiles of each batch.

    Args:
        tensor: What the statistics are about.
        low: Percentile of the minimum, 0 to 100.
        high: Percentile of the maximum, 0 to 100.
    """

    def __init__(self, tensor: TensorInfo, low: float, high: float) -> None:
        super().__init__(tensor, low, high)
        self._shares = low / 100, high / 100

    def _part(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return self._tensor.rows(x).clone()

    def _add_batch(self, parts: list[torch.Tensor]) -> None:
        batch = QuantileSketch(parts[0].shape[0], budget=None)
        for part in parts:
            batch.update(part.to(parts[0]))
        self._accumulate(batch.quantiles(self._shares), 1)
