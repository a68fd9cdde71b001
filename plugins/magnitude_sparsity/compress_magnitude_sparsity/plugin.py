"""What this package contributes to compress-core."""

from __future__ import annotations

from compress_core import Algorithm, hookimpl
from compress_magnitude_sparsity.algorithm import MagnitudeSparsity


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns magnitude sparsity."""
    return [MagnitudeSparsity]
