"""The statistics from which initial ranges are computed; they can be merged, and their memory is bounded."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from compress_core import DataError, ModelError
from compress_quantization.ranges.quantiles import QuantileSketch, weighted_quantile

# Factor from the median absolute deviation to the standard deviation of a normal distribution, as in NNCF.
_MAD_TO_SIGMA = 1.4826230


class Range(NamedTuple):
    """The range of a tensor's values.

    Attributes:
        min: Shape () or (channels,); float32, or float64 for float64 tensors.
        max: Shape and dtype of `min`.
    """

    min: torch.Tensor
    max: torch.Tensor


@dataclass(frozen=True)
class TensorInfo:
    """The tensor whose statistics are collected.

    Attributes:
        name: Its name in messages.
        channel_dim: Dimension of the channels, for statistics by channel; None for the tensor as a whole.
        is_weight: Whether it is a weight, which is passed to the statistics only once.
    """

    name: str
    channel_dim: int | None = None
    is_weight: bool = False

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the values by channel, shape (channels, n) or (1, n)."""
        if self.channel_dim is None:
            return x.reshape(1, -1)
        return x.movedim(self.channel_dim, 0).reshape(x.shape[self.channel_dim], -1)

    def bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the smallest and the largest values, shape (channels,) or (1,)."""
        if self.channel_dim is None:
            low, high = torch.aminmax(x)
            return low.reshape(1), high.reshape(1)
        dims = [dim for dim in range(x.ndim) if dim != self.channel_dim % x.ndim]
        return (x.amin(dims), x.amax(dims)) if dims else (x, x)

    @property
    def remedy(self) -> str:
        """The remedy for messages, if no range can be determined."""
        return "or name the layer in ignored_scopes" if self.is_weight else "or put its name into ignored_scopes"

    def error(self, message: str) -> DataError | ModelError:
        """Returns the exception for a tensor whose range cannot be determined."""
        if self.is_weight:
            return ModelError(f"the weight '{self.name}' {message}")
        return DataError(f"the activation '{self.name}' {message}")


class RangeStatistics(ABC):
    """Collects the statistics from which a range is computed.

    `update` adds a tensor; `merge` adds the statistics of another instance, such as that of another process. Where
    samples or batches count, tensors that are added within `one_batch` are parts of one batch.

    Args:
        tensor: The tensor.
        settings: Further settings of a subclass.
    """

    def __init__(self, tensor: TensorInfo, *settings: Any) -> None:
        self._tensor = tensor
        self._settings = settings
        self._channels: int | None = None
        self._dtype = torch.float32

    def empty(self) -> Self:
        """Returns empty statistics of the same kind."""
        return type(self)(self._tensor, *self._settings)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Adds a floating-point tensor on any device. The first dimension of an activation is that of the samples.

        A tensor without elements is skipped.

        Raises:
            DataError: An activation has values that are not finite, or its number of channels has changed.
            ModelError: The same for a weight; or the tensor has no channel dimension.
        """
        if x.numel() == 0:
            return
        x = self._checked(x)
        low, high = self._tensor.bounds(x)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise self._tensor.error(
                f"has {bad} values of {x.numel()} that are not finite (NaN or infinite); check the model"
                f"{'' if self._tensor.is_weight else ' and the calibration data'}, {self._tensor.remedy}"
            )
        self._take_channels(low.numel())
        self._dtype = x.dtype
        self._add(x, low, high)

    def one_batch(self) -> AbstractContextManager[None]:
        """Returns a context manager in which all tensors are parts of one batch, such as those of a concatenation."""
        return contextlib.nullcontext()

    def merge(self, other: Self) -> None:
        """Adds the statistics of `other`, which has the same kind and is not changed.

        Raises:
            DataError: The numbers of channels differ.
        """
        if other._channels is None:
            return
        if self._channels is None:
            self.__dict__.update(copy.deepcopy(other.__dict__))
            return
        self._take_channels(other._channels)
        self._merge(other)

    @property
    def has_seen_values(self) -> bool:
        """Whether any value has been added."""
        return self._channels is not None

    def finalize(self) -> Range:
        """Returns the range.

        Raises:
            DataError: An activation had no values.
            ModelError: A weight has no values.
        """
        if self._channels is None:
            if self._tensor.is_weight:
                raise self._tensor.error(f"has no elements; remove the layer, {self._tensor.remedy}")
            raise self._tensor.error(
                "was never computed in calibration: no sample reaches this place. Give data that does, "
                f"{self._tensor.remedy}"
            )
        low, high = (bound.to(self._dtype) for bound in self._range())
        return Range(low, high) if self._tensor.channel_dim is not None else Range(low.reshape(()), high.reshape(()))

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor in float32 or float64."""
        if not x.is_floating_point():
            raise self._tensor.error(
                f"has the dtype {x.dtype}, and only floating-point tensors are quantized; {self._tensor.remedy}"
            )
        dim = self._tensor.channel_dim
        if dim is not None and not -x.ndim <= dim < x.ndim:
            raise ModelError(
                f"'{self._tensor.name}' has the shape {tuple(x.shape)} and so no dimension {dim} for channels; set "
                '"per_channel": false for its quantizer'
            )
        return x.detach().to(torch.promote_types(x.dtype, torch.float32))

    def _take_channels(self, channels: int) -> None:
        if self._channels not in (None, channels):
            raise self._tensor.error(
                f'had {self._channels} channels and now has {channels}; set "per_channel": false for its quantizer'
            )
        self._channels = channels

    @abstractmethod
    def _add(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Adds a finite tensor, given with its bounds by channel."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Adds the statistics of another instance; neither of the two is empty."""

    @abstractmethod
    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns minimum and maximum, shape (channels,) or (1,)."""


class MinMax(RangeStatistics):
    """The exact smallest and largest value of all tensors.

    Args:
        tensor: What the statistics are about.
        abs_max: Whether the maximum is that of |x|.
    """

    def __init__(self, tensor: TensorInfo, abs_max: bool) -> None:
        super().__init__(tensor, abs_max)
        self._abs_max = abs_max
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def _add(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        high = torch.maximum(high, -low) if self._abs_max else high
        if self._bounds is not None:
            low, high = torch.minimum(low, self._bounds[0].to(low)), torch.maximum(high, self._bounds[1].to(high))
        # Copies, because the bound of a tensor of one element is the tensor itself, which the model may write to.
        self._bounds = low.clone(), high.clone()

    def _merge(self, other: Self) -> None:
        assert other._bounds is not None
        self._add(other._bounds[0], *other._bounds)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._bounds is not None
        return self._bounds


class _Pooled(RangeStatistics):
    """Base class of statistics of all values together; see `QuantileSketch` for the accuracy.

    All values of a weight are kept, so that its statistics are exact.
    """

    def __init__(self, tensor: TensorInfo, *settings: Any) -> None:
        super().__init__(tensor, *settings)
        self._sketch: QuantileSketch | None = None

    @property
    def rank_error(self) -> float:
        """Bound on the error of a quantile, as a share of the values: 0 means exact."""
        return self._sketch.rank_error if self._sketch is not None else 0.0

    @property
    def _values(self) -> QuantileSketch:
        assert self._sketch is not None
        return self._sketch

    def _add(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        if self._sketch is None:
            unlimited = {"budget": None} if self._tensor.is_weight else {}
            self._sketch = QuantileSketch(low.numel(), **unlimited)
        self._sketch.update(self._tensor.rows(x))

    def _merge(self, other: Self) -> None:
        self._values.merge(other._values)


class Percentile(_Pooled):
    """Two percentiles of all values.

    Args:
        tensor: What the statistics are about.
        low: Percentile of the minimum, 0 to 100.
        high: Percentile of the maximum, 0 to 100.
    """

    def __init__(self, tensor: TensorInfo, low: float, high: float) -> None:
        super().__init__(tensor, low, high)
        self._shares = low / 100, high / 100

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self._values.quantiles(self._shares)
        return low, high


class ThreeSigma(_Pooled):
    """The median plus and minus three standard deviations, estimated from the median absolute deviation.

    The median leaves out zeros, as in NNCF: after a ReLU they are often the majority, and the range would be empty. The
    deviation is that of all values.
    """

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, weights = self._values.weighted()
        # Relative to the largest value, where NNCF compares with the number: a range must not depend on the unit.
        largest = values.abs().amax(dim=1, keepdim=True)
        not_zero = values.abs() > torch.finfo(torch.float32).eps * largest
        median = weighted_quantile(values, weights * not_zero, 0.5)
        deviations, order = (values.double() - median[:, None]).abs().sort(dim=1)
        mad = weighted_quantile(deviations, weights.gather(1, order), 0.5)
        return median - 3 * _MAD_TO_SIGMA * mad, median + 3 * _MAD_TO_SIGMA * mad
