"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Algorithm, Choice, ChoicePoint, hookimpl
from compress_magnitude_sparsity import importance
from compress_magnitude_sparsity.algorithm import MagnitudeSparsity


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns magnitude sparsity."""
    return [MagnitudeSparsity]


@hookimpl
def compress_choice_points() -> list[ChoicePoint]:
    """Returns the choice point of importances."""
    return [importance.POINT]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns two importances."""
    return [*importance.CHOICES]
