"""First values of the ranges of quantizers, from statistics."""

from __future__ import annotations

import torch

from compress_core.errors import DataError
from compress_quantization.kernels.sources import TINY

_LARGEST = 2.0**126  # ranges are moved and added to, which must not overflow float32
_SCALE_OF_ZEROS = 0.1


def checked(minimum: torch.Tensor, maximum: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ends of ranges in float32, in the shape of the range.

    Raises:
        DataError: A value is not finite or above 2^126, or a minimum is above its maximum.
    """
    low, high = (values.detach().float().broadcast_to(shape) for values in (minimum, maximum))
    for name, values in (("minimum", low), ("maximum", high)):
        is_bad = ~(values.abs() <= _LARGEST)
        if bool(is_bad.any()):
            raise DataError(
                f"the {name} of a quantizer's range is {values[is_bad][0].item():.3g}: the tensors that it was "
                f"calibrated on have values that are not finite in float32 or too large for it (above {_LARGEST:.1e}); "
                "check weights, data and preprocessing"
            )
    if bool((low > high).any()):
        raise DataError("a quantizer's range: a minimum is above its maximum; they may have been swapped")
    return low, high


def magnitudes(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the largest absolute values, where they count as zero, and the scale for these places."""
    largest = torch.maximum(low.abs(), high.abs())
    of_all = largest.max()
    return largest, largest < TINY, torch.where(of_all < TINY, _SCALE_OF_ZEROS, of_all)


def logarithm(values: torch.Tensor) -> torch.Tensor:
    """Returns the logarithms of magnitudes, in float64; those below the smallest count as the smallest."""
    return values.detach().double().abs().clamp_min(TINY).log()
