"""Statistics of tensors for the initial ranges of quantizers; NNCF's six range initializers."""

from __future__ import annotations

from compress_quantization.config import RangeConfig
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.ranges.quantiles import QuantileSketch
from compress_quantization.ranges.statistics import (
    MeanMinMax,
    MeanPercentile,
    MinMax,
    Percentile,
    Range,
    RangeStatistics,
    SampleMeanMinMax,
    TensorInfo,
    ThreeSigma,
)

__all__ = ["QuantileSketch", "Range", "RangeStatistics", "TensorInfo", "collector_for"]


def collector_for(
    config: RangeConfig, spec: QuantizerSpec, *, is_weight: bool, name: str, channel_dim: int | None = None
) -> RangeStatistics:
    """Returns the empty statistics that a quantizer's range is computed from.

    A weight is shown once, an activation batch by batch.

    Args:
        config: The range initializer.
        spec: The quantizer.
        is_weight: Whether the tensor is a weight.
        name: What messages call the tensor.
        channel_dim: Dimension of the channels for `spec.per_channel`; by default 0 of a weight, 1 of an activation.
    """
    if channel_dim is None:
        channel_dim = 0 if is_weight else 1
    tensor = TensorInfo(name, channel_dim if spec.per_channel else None, is_weight)
    abs_max = spec.mode == "symmetric"
    match config.type:
        case "min_max":
            return MinMax(tensor, abs_max)
        case "mixed_min_max":
            per_sample = not is_weight and not spec.per_channel
            return SampleMeanMinMax(tensor, abs_max) if per_sample else MinMax(tensor, abs_max)
        case "mean_min_max":
            return MeanMinMax(tensor, abs_max)
        case "threesigma":
            return ThreeSigma(tensor)
        case "percentile":
            return Percentile(tensor, config.params.min_percentile, config.params.max_percentile)
        case "mean_percentile":
            return MeanPercentile(tensor, config.params.min_percentile, config.params.max_percentile)
