"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Choice, Initializer, hookimpl
from compress_weight_reconstruction import filter_importance, importance
from compress_weight_reconstruction.data_free.initializer import DataFreeCorrection
from compress_weight_reconstruction.initializer import WeightReconstruction


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns weight reconstruction, and the correction that needs no data."""
    return [WeightReconstruction, DataFreeCorrection]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns importances of weights and of filters that are measured with data."""
    return [*importance.CHOICES, *filter_importance.CHOICES]
