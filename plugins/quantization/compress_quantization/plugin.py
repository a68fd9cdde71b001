"""What this package contributes to compress-core."""

from __future__ import annotations

from compress_core import Algorithm, hookimpl
from compress_quantization.algorithm import Quantization


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns quantization."""
    return [Quantization]
