"""The statistics of knowledge distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_core import Statistics, Table


@dataclass(frozen=True)
class DistillationStatistics(Statistics):
    """The losses of the last call of `controller.loss()`, in this process.

    Attributes:
        losses: What was compared -> its loss with its scale, without the weight of the schedule; empty before the first
            call and while the weight is 0.
        weight: Factor of the schedule on all of them.
        teacher: Class of the teacher.
        teacher_parameters: Number of its parameters.
    """

    losses: Mapping[str, float]
    weight: float
    teacher: str
    teacher_parameters: int

    @property
    def loss(self) -> float | None:
        """The loss that was added to the task's; None if there has been none, which a weight of 0 is not."""
        if not self.weight:
            return 0.0
        return self.weight * math.fsum(self.losses.values()) if self.losses else None

    def tables(self) -> list[Table]:
        """Returns a table of the whole, and one of the pairs."""
        loss = "none yet" if self.loss is None else self.loss
        rows = [
            ("loss added last", loss),
            ("weight of the schedule", self.weight),
            ("teacher", f"{self.teacher}, {self.teacher_parameters} parameters"),
        ]
        tables = [Table("Knowledge distillation", ("figure", "value"), rows)]
        if self.losses:
            tables.append(Table("Knowledge distillation: pairs", ("student", "loss"), list(self.losses.items())))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON-able values; a loss that is not finite is a string."""
        return {
            "loss": _json_able(self.loss),
            "losses": {what: _json_able(loss) for what, loss in self.losses.items()},
            "weight": self.weight,
            "teacher": self.teacher,
            "teacher_parameters": self.teacher_parameters,
        }


def _json_able(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
