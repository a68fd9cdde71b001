"""The warm-up: threshold and regularization as functions of the time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from compress_core import Clock
from compress_core.contract.schedules import polynomial_level, progress
from compress_learned_sparsity.movement.config import MovementSparsityParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """The course of the warm-up.

    Attributes:
        start: Epoch at which it begins.
        end: Epoch at which it is over.
        power: Exponent of 1 - (1 - progress)^power.
        factor: Factor on the loss at the end.
        initial: Threshold at the beginning, if it is given.
        final: Threshold at the end.
        steps_per_epoch: Optimizer steps in an epoch, if they are given.
    """

    start: int
    end: int
    power: float
    factor: float
    initial: float | None
    final: float
    steps_per_epoch: int | None

    @classmethod
    def of(cls, params: MovementSparsityParams) -> WarmUp:
        """Returns the warm-up that a section asks for."""
        return cls(
            params.warmup_start_epoch,
            params.warmup_end_epoch,
            params.power,
            params.importance_regularization_factor,
            params.init_importance_threshold,
            params.final_importance_threshold,
            params.steps_per_epoch,
        )

    def time(self, clock: Clock) -> float:
        """Returns the epochs that have passed when the present step begins, with a fraction."""
        steps = self.steps_per_epoch or clock.steps_per_epoch
        # The length of the first epoch is being measured.
        within = 0.0 if steps is None else min(max(clock.step_in_epoch, 0) / steps, 1.0)
        return max(clock.epoch, 0) + within

    def share(self, time: float) -> float:
        """Returns how far threshold and loss have risen, 0 to 1."""
        if time < self.start:
            return 0.0
        done = progress(time - self.start, self.end - self.start)
        return polynomial_level(0.0, 1.0, done, power=self.power, concave=True)

    def threshold(self, time: float, initial: float | None) -> float:
        """Returns the threshold; nothing is masked before the warm-up, nor before there is an initial threshold."""
        if time < self.start or initial is None:
            return -math.inf
        return initial + self.share(time) * (self.final - initial)

    def loss_factor(self, time: float) -> float:
        """Returns the factor on the loss."""
        return self.share(time) * self.factor
