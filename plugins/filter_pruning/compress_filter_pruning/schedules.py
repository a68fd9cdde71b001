"""Schedules: the pruning level as a function of time, with the formulas of NNCF 2.16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compress_core import Choice, choice
from compress_filter_pruning.config import SCHEDULE, FilterPruningConfig

# `exponential_with_bias` has reached this share of the target at this share of the time.
_EARLY_LEVEL, _EARLY_TIME = 3 / 4, 1 / 8


@dataclass(frozen=True)
class Schedule:
    """The level of each epoch.

    Attributes:
        target: Level at the end.
        num_init_steps: Number of epochs before the schedule begins.
        freeze_epoch: Epoch in which the masks are frozen, after its level has been set.
        at: Function of the epochs since the schedule began; returns the level.
    """

    target: float
    num_init_steps: int
    freeze_epoch: int
    at: Callable[[float], float]

    def level(self, epoch: int) -> float | None:
        """Returns the level of an epoch; None before the schedule begins, when the initial level stays."""
        return None if epoch < self.num_init_steps else self.at(epoch - self.num_init_steps)


def make_schedule(config: FilterPruningConfig, target: float) -> Schedule:
    """Returns the schedule that a section asks for; reads only the parameters that this schedule uses."""
    params, initial = config.params, config.pruning_init
    warmup = params.num_init_steps
    if params.schedule == "baseline":
        return Schedule(target, warmup, warmup, lambda epoch: target)
    # The target is reached in the last of the pruning epochs.
    curve = choice(params.schedule, SCHEDULE)(initial, target, params.pruning_steps - 1)
    return Schedule(target, warmup, warmup + params.pruning_steps, curve)


def at_once(initial: float, target: float, duration: float) -> Callable[[float], float]:
    """Sets the target from the first epoch on."""
    return lambda time: target


def biased_exponential(initial: float, target: float, duration: float) -> Callable[[float], float]:
    """Returns the level a * exp(-k * t) + b that is `initial` at 0, 3/4 of `target` at 1/8 of the time, then `target`.

    With a + b = initial, the two other conditions give one equation for x = k * duration, which has a positive solution
    if the level at 1/8 lies above the straight line: (1 - exp(-x/8)) / (1 - exp(-x)) = early, where `early` is the
    share of the way to the target by then. The left side grows steadily from 1/8 to 1, so bisection finds the solution.

    Args:
        initial: Level at the beginning.
        target: Level at the end.
        duration: Epochs in between.
    """
    if duration <= 0 or target == initial:
        return lambda time: target
    early = (_EARLY_LEVEL * target - initial) / (target - initial)
    if early <= _EARLY_TIME:
        # If the initial level is this high, no such curve passes the early point; a straight line is the limit.
        return lambda time: initial + (target - initial) * min(max(time / duration, 0.0), 1.0)
    low, high = 0.0, 1.0
    while -math.expm1(-high * _EARLY_TIME) / -math.expm1(-high) < early:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if -math.expm1(-middle * _EARLY_TIME) / -math.expm1(-middle) < early:
            low = middle
        else:
            high = middle
    rate = (low + high) / 2

    def level(time: float) -> float:
        done = min(max(time / duration, 0.0), 1.0)
        share = math.expm1(-rate * done) / math.expm1(-rate)
        return target if done >= 1 else min(initial + (target - initial) * share, target)

    return level


# `exponential` belongs to the core.
CHOICES = [Choice(SCHEDULE, "exponential_with_bias", biased_exponential), Choice(SCHEDULE, "baseline", at_once)]
