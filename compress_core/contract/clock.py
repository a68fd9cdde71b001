"""`Clock`: the current epoch and step of a training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The current epoch and step of training; -1 means that the first one has not begun.

    Attributes:
        epoch: Index of the current epoch.
        step: Index of the current optimizer step, over all epochs.
        step_in_epoch: Index of the current optimizer step in its epoch.
        steps_per_epoch: Number of optimizer steps of the last finished epoch; None before the first is finished.
    """

    epoch: int = -1
    step: int = -1
    step_in_epoch: int = -1
    steps_per_epoch: int | None = None
