"""Statistics of tensors for the initial ranges of quantizers; NNCF's six range initializers."""

from __future__ import annotations

from dataclasses import dataclass

from compress_core import Choice, ChoicePoint, callable_choice, choice
from compress_quantization.config import RANGE, RangeConfig
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.ranges.means import MeanMinMax, MeanPercentile, SampleMeanMinMax
from compress_quantization.ranges.quantiles import QuantileSketch
from compress_quantization.ranges.statistics import MinMax, Percentile, Range, RangeStatistics, TensorInfo, ThreeSigma

__all__ = [
    "CHOICES",
    "POINT",
    "QuantileSketch",
    "Range",
    "RangeRequest",
    "RangeStatistics",
    "TensorInfo",
    "collector_for",
]


@dataclass(frozen=True)
class RangeRequest:
    """The argument of a choice of `quantization.range`: the tensor and the settings of its range.

    Attributes:
        tensor: The tensor. A weight is passed to the statistics once, an activation batch by batch.
        symmetric: Whether the range has to be symmetric around zero.
        config: The section `initializer.range`; statistics should read only the parameters that they use.
    """

    tensor: TensorInfo
    symmetric: bool
    config: RangeConfig


def min_max(request: RangeRequest) -> RangeStatistics:
    """Uses the smallest and the largest value."""
    return MinMax(request.tensor, request.symmetric)


def mixed_min_max(request: RangeRequest) -> RangeStatistics:
    """Uses `min_max` for weights and for ranges per channel, else the means of each sample's extreme values."""
    per_sample = not request.tensor.is_weight and request.tensor.channel_dim is None
    return SampleMeanMinMax(request.tensor, request.symmetric) if per_sample else min_max(request)


def mean_min_max(request: RangeRequest) -> RangeStatistics:
    """Uses the means of each batch's smallest and largest value."""
    return MeanMinMax(request.tensor, request.symmetric)


def threesigma(request: RangeRequest) -> RangeStatistics:
    """Uses the median plus and minus three standard deviations."""
    return ThreeSigma(request.tensor)


def percentile(request: RangeRequest) -> RangeStatistics:
    """Uses two percentiles of all values."""
    params = request.config.params
    return Percentile(request.tensor, params.min_percentile, params.max_percentile)


def mean_percentile(request: RangeRequest) -> RangeStatistics:
    """Uses the means of two percentiles of each batch."""
    params = request.config.params
    return MeanPercentile(request.tensor, params.min_percentile, params.max_percentile)


POINT = ChoicePoint(
    RANGE,
    "a function (compress_quantization.ranges.RangeRequest) -> compress_quantization.ranges.RangeStatistics that have "
    "seen nothing yet",
    callable_choice,
)

CHOICES = [
    Choice(RANGE, function.__name__, function)
    for function in (min_max, mixed_min_max, mean_min_max, threesigma, percentile, mean_percentile)
]


def collector_for(
    config: RangeConfig, spec: QuantizerSpec, *, is_weight: bool, name: str, channel_dim: int | None
) -> RangeStatistics:
    """Returns empty statistics, from which the range of a quantizer will be computed.

    A weight is passed to them once, an activation batch by batch.

    Args:
        config: The range initializer.
        spec: The settings of the quantizer.
        is_weight: Whether the tensor is a weight.
        name: Name of the tensor in messages.
        channel_dim: Dimension of the channels; None for one range for the whole tensor.
    """
    tensor = TensorInfo(name, channel_dim, is_weight)
    found: RangeStatistics = choice(config.type, RANGE)(RangeRequest(tensor, spec.mode == "symmetric", config))
    return found
