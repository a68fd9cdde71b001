"""What this package contributes to compress-core."""

from __future__ import annotations

from compress_core import Algorithm, hookimpl
from compress_filter_pruning.algorithm import FilterPruning


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns filter pruning."""
    return [FilterPruning]
