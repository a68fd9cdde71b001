"""What happened in each epoch, and the statistics of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress_core.contract.statistics import Statistics, Table

Phase = Literal["initial", "search"]


class EpochRecord(BaseModel):
    """One validation.

    Attributes:
        epoch: Number of epochs trained before it.
        phase: `initial`: at the config's own schedule; `search`: at a level of the search.
        target_rate: The level that was asked for; None in the initial phase.
        rate: The measured rate: of the algorithm that moves, or of all in `early_exit`.
        stage: Name of the compression stage.
        metric: The metric, larger is better; None if it was not a number.
        budget: The metric minus the lowest that is allowed; None if the metric was not a number.
        loss: What the training function returned, if it was a number.
        learning_rate: Of the first group of the first optimizer, in this epoch.
        is_candidate: Whether the model may be the result: everything that has to be compressed is, and in the search
            the metric holds.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    epoch: int = Field(ge=0)
    phase: Phase
    target_rate: float | None
    rate: float
    stage: str
    metric: float | None
    budget: float | None
    loss: float | None
    learning_rate: float | None
    is_candidate: bool

    def order(self) -> tuple[float, float]:
        """Returns what the better one of two candidates has more of."""
        metric = -math.inf if self.metric is None else self.metric
        return (self.rate, metric) if self.phase == "search" else (-1.0, metric)


@dataclass(frozen=True)
class AccuracyAwareStatistics(Statistics):
    """The result of accuracy-aware training, with the names of NNCF, and the epochs that led there.

    Attributes:
        uncompressed_accuracy: Metric of the uncompressed model.
        compression_rate: Measured rate of the model that was returned.
        compressed_accuracy: Its metric; None if it was not a number.
        minimal_accuracy: The lowest metric that is allowed.
        epochs: All validations, in order.
        result: Index in `epochs` of the model that was returned.
    """

    uncompressed_accuracy: float
    compression_rate: float
    compressed_accuracy: float | None
    minimal_accuracy: float
    epochs: Sequence[EpochRecord] = ()
    result: int | None = None

    @property
    def absolute_accuracy_degradation(self) -> float | None:
        """Metric of the uncompressed model minus that of the compressed one."""
        return None if self.compressed_accuracy is None else self.uncompressed_accuracy - self.compressed_accuracy

    @property
    def relative_accuracy_degradation(self) -> float | None:
        """The absolute degradation in percent of the size of the uncompressed model's metric; None if that is 0."""
        absolute = self.absolute_accuracy_degradation
        if absolute is None or self.uncompressed_accuracy == 0:
            return None
        return 100 * absolute / abs(self.uncompressed_accuracy)

    @property
    def accuracy_budget(self) -> float | None:
        """The compressed model's metric minus the lowest that is allowed; the accuracy holds if it is not negative."""
        return None if self.compressed_accuracy is None else self.compressed_accuracy - self.minimal_accuracy

    def tables(self) -> list[Table]:
        """Returns the result, and a row for each epoch."""
        figures = [(name.replace("_", " "), _shown(value)) for name, value in self._figures().items()]
        headers = ("epoch", "phase", "level asked for", "measured rate", "stage", "metric", "budget", "loss", "lr", "")
        return [
            Table("Accuracy-aware training", ("figure", "value"), figures),
            Table("Rate and accuracy by epoch", headers, [self._row(*entry) for entry in enumerate(self.epochs)]),
        ]

    def _row(self, index: int, record: EpochRecord) -> tuple[Any, ...]:
        mark = "result" if index == self.result else "holds" if record.is_candidate and _holds(record) else ""
        values = (record.target_rate, record.rate, record.stage, record.metric, record.budget, record.loss)
        return (record.epoch, record.phase, *map(_shown, values), _shown(record.learning_rate), mark)

    def _figures(self) -> dict[str, float | None]:
        return {
            "uncompressed_accuracy": self.uncompressed_accuracy,
            "compressed_accuracy": self.compressed_accuracy,
            "minimal_accuracy": self.minimal_accuracy,
            "accuracy_budget": self.accuracy_budget,
            "absolute_accuracy_degradation": self.absolute_accuracy_degradation,
            "relative_accuracy_degradation": self.relative_accuracy_degradation,
            "compression_rate": self.compression_rate,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the epochs, JSON-able."""
        return {**self._figures(), "epochs": [record.model_dump() for record in self.epochs], "result": self.result}


def _holds(record: EpochRecord) -> bool:
    return record.budget is not None and record.budget >= 0


def _shown(value: Any) -> Any:
    return "-" if value is None else value
