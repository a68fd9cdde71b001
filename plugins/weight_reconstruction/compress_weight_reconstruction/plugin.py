"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Choice, Initializer, hookimpl
from compress_weight_reconstruction import filter_importance
from compress_weight_reconstruction.initializer import WeightReconstruction


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns weight reconstruction."""
    return [WeightReconstruction]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns the filter importance that is measured on data."""
    return [*filter_importance.CHOICES]
