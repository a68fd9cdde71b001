"""Registers batch-norm adaptation, through the same hooks as any plugin."""

from __future__ import annotations

from compress_core.batchnorm import estimators
from compress_core.batchnorm.adaptation import BatchNormAdaptation
from compress_core.contract.choices import Choice, ChoicePoint
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.initializer import Initializer


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns batch-norm adaptation."""
    return [BatchNormAdaptation]


@hookimpl
def compress_choice_points() -> list[ChoicePoint]:
    """Returns the choice point of the estimators."""
    return [estimators.POINT]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns the three built-in estimators."""
    return list(estimators.CHOICES)
