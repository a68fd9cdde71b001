"""`MetricGuard`: keeps adapted statistics only if the user's metric does not get worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from compress_core.batchnorm.report import GuardVerdict
from compress_core.data.forwards import running
from compress_core.data.ranks import exchange, number_of_ranks
from compress_core.data.rng import preserved_rng
from compress_core.errors import DataError
from compress_core.transforms.model_wide import evaluating


class MetricGuard:
    """Measures a model before adaptation (when the guard is created) and after it (`verdict`).

    Args:
        evaluate: Takes the model and returns a number, larger is better.
        model: The compressed model, before adaptation.
        path: Config path of the value, for messages.

    Raises:
        DataError: The metric is not a number.
    """

    def __init__(self, evaluate: Callable[[nn.Module], Any], model: nn.Module, path: str) -> None:
        self._evaluate = evaluate
        self._model = model
        self._path = path
        self._before = self._measure()

    def verdict(self) -> GuardVerdict:
        """Measures the model again and compares; NaN counts as worse."""
        after = self._measure()
        return GuardVerdict(self._before, after, kept=after >= self._before or math.isnan(self._before))

    def _measure(self) -> float:
        with preserved_rng(), evaluating(self._model), running(self._model):
            metric = self._evaluate(self._model)
        try:
            # Processes may measure parts of the data; the decision has to be the same.
            return float(metric if number_of_ranks() == 1 else exchange("metrics", float(metric))[0])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self._path}: the function must return one number, larger is better, got {type(metric).__name__}"
            ) from error
