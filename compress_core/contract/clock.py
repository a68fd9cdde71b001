"""The clock of a training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where training stands; -1 means that the first has not begun.

    Attributes:
        epoch: Index of the current epoch.
        step: Index of the current optimizer step, over all epochs.
        step_in_epoch: Index of the current optimizer step in its epoch.
        steps_per_epoch: Optimizer steps of the last epoch that was finished, if any was.
    """

    epoch: int = -1
    step: int = -1
    step_in_epoch: int = -1
    steps_per_epoch: int | None = None
