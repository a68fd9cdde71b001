"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Algorithm, Choice, ChoicePoint, hookimpl
from compress_filter_pruning import importance, ranking, rankings, schedules
from compress_filter_pruning.algorithm import FilterPruning


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns filter pruning."""
    return [FilterPruning]


@hookimpl
def compress_choice_points() -> list[ChoicePoint]:
    """Returns the choice points of filter importances and of rankings over all groups."""
    return [importance.POINT, ranking.POINT]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns three importances, three rankings and two schedules."""
    return [*importance.CHOICES, *rankings.CHOICES, *schedules.CHOICES]
