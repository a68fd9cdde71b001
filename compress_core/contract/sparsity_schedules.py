"""Schedules of sparsity: the level as a function of time, with the formulas of NNCF 2.16.

A section that derives from `SparsityConfig` has their settings, and `make_schedule` makes the one that it asks for.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from compress_core.config.choices import Choice, ChoicePoint, callable_choice, find_choice
from compress_core.contract.clock import Clock
from compress_core.contract.schedules import polynomial_level, progress
from compress_core.contract.sparsity_config import SCHEDULES, SparsityConfig

logger = logging.getLogger(__name__)

_DEFAULT_FREEZE_EPOCH = 100


class Schedule(Protocol):
    """Gives the level at the beginning of each epoch and step.

    Attributes:
        target: Level at the end.
        freeze_epoch: Epoch from which the masks are frozen.
    """

    target: float
    freeze_epoch: int

    def at_epoch(self, clock: Clock, reached: float) -> float | None:
        """Returns the level to set when an epoch begins, or None for no change; `reached` is the present level."""
        ...

    def at_step(self, clock: Clock) -> float | None:
        """Returns the level to set when an optimizer step begins, or None for no change."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the JSON-able state on which the level depends besides the clock."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `get_state` returned; it may come from anywhere.

        Raises:
            ValueError: It has other values than `get_state` can return.
        """
        ...


class _TimeSchedule:
    """Base class of schedules that depend only on the clock."""

    def __init__(self, target: float, freeze_epoch: int) -> None:
        self.target = target
        self.freeze_epoch = freeze_epoch

    def at_step(self, clock: Clock) -> float | None:
        """See `Schedule`."""
        return None

    def get_state(self) -> dict[str, Any]:
        """See `Schedule`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Schedule`."""


class PolynomialSchedule(_TimeSchedule):
    """Raises the level from the initial level to the target along a polynomial, by epoch or by optimizer step."""

    def __init__(self, config: SparsityConfig) -> None:
        params = config.params
        self._algorithm = config.algorithm
        self._initial, self._duration = config.sparsity_init, params.sparsity_target_epoch
        self._power, self._concave = params.power, params.concave
        self._per_step = params.update_per_optimizer_step
        self._steps_per_epoch = params.steps_per_epoch if self._per_step else None
        super().__init__(params.sparsity_target, _freeze_epoch(config, self._duration))
        self._warned = False

    def at_epoch(self, clock: Clock, reached: float) -> float | None:
        """See `Schedule`."""
        return None if self._per_step else self._level(clock.epoch)

    def at_step(self, clock: Clock) -> float | None:
        """See `Schedule`."""
        if not self._per_step:
            return None
        steps = self._steps_per_epoch or clock.steps_per_epoch
        if steps is None:
            # The length of the first epoch is still being measured, so the progress within it is not known.
            return self._level(max(clock.epoch, 0))
        if clock.step_in_epoch >= steps and not self._warned:
            self._warned = True
            logger.warning(
                "%s: params.steps_per_epoch is %d, but epoch %d has more steps; the level waits for the next epoch",
                self._algorithm,
                steps,
                clock.epoch,
            )
        return self._level(max(clock.epoch, 0) + min(clock.step_in_epoch / steps, 1.0))

    def _level(self, time: float) -> float:
        done = progress(time, self._duration)
        return polynomial_level(self._initial, self.target, done, power=self._power, concave=self._concave)


class CurveSchedule(_TimeSchedule):
    """A schedule made from a choice of `level_schedule`: the level is a function of the epoch.

    Args:
        config: The section.
        curve: The value of the choice.
    """

    def __init__(self, config: SparsityConfig, curve: Callable[..., Callable[[float], float]]) -> None:
        target, duration = config.params.sparsity_target, config.params.sparsity_target_epoch
        super().__init__(target, _freeze_epoch(config, duration))
        self._level = curve(config.sparsity_init, target, duration)

    def at_epoch(self, clock: Clock, reached: float) -> float | None:
        """See `Schedule`."""
        return self._level(clock.epoch)


class MultistepSchedule(_TimeSchedule):
    """Sets a constant level for each range of epochs."""

    def __init__(self, config: SparsityConfig) -> None:
        self._steps = sorted(config.params.multistep_steps)
        self._levels = config.params.multistep_sparsity_levels
        super().__init__(self._levels[-1], _freeze_epoch(config, self._steps[-1] if self._steps else 0))

    def at_epoch(self, clock: Clock, reached: float) -> float | None:
        """See `Schedule`."""
        return self._levels[bisect.bisect_right(self._steps, clock.epoch)]


class AdaptiveSchedule(_TimeSchedule):
    """Raises the level by a step whenever the model has kept the last level for `patience` epochs."""

    def __init__(self, config: SparsityConfig) -> None:
        params = config.params
        self._step, self._eps, self._patience = params.step, params.eps, params.patience
        self._level, self._held = config.sparsity_init, 0
        # The first increase comes after `patience` epochs, and so does each further one.
        increases = math.ceil(max(params.sparsity_target - config.sparsity_init, 0.0) / params.step)
        super().__init__(params.sparsity_target, _freeze_epoch(config, increases * params.patience))

    def at_epoch(self, clock: Clock, reached: float) -> float | None:
        """See `Schedule`."""
        if reached >= self._level - self._eps:
            self._held += 1
        if self._held >= self._patience:
            self._held = 0
            self._level += self._step
        self._level = min(self._level, self.target)
        return self._level

    def get_state(self) -> dict[str, Any]:
        """See `Schedule`."""
        return {"level": self._level, "num_bad_epochs": self._held}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Schedule`."""
        level, held = state["level"], state["num_bad_epochs"]
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level < 1:
            raise ValueError(f"level: must be a number, at least 0 and below 1, got {level!r}")
        if type(held) is not int or not 0 <= held < self._patience:
            raise ValueError(
                f"num_bad_epochs: must be a whole number below the patience {self._patience}, got {held!r}"
            )
        self._level, self._held = float(level), held


POINT = ChoicePoint(
    SCHEDULES[0],
    "a class made with the section (`compress_core.contract.sparsity_config.SparsityConfig`), with the methods of "
    "`compress_core.contract.sparsity_schedules.Schedule`",
    callable_choice,
)

CHOICES = [
    Choice(SCHEDULES[0], "polynomial", PolynomialSchedule),
    Choice(SCHEDULES[0], "multistep", MultistepSchedule),
    Choice(SCHEDULES[0], "adaptive", AdaptiveSchedule),
]


def make_schedule(config: SparsityConfig) -> Schedule:
    """Returns the schedule that a section asks for; reads only the parameters that this schedule uses."""
    found = find_choice(config.params.schedule, *SCHEDULES)
    assert found is not None, "the section has been validated"
    if found.point == SCHEDULES[0]:
        schedule: Schedule = found.value(config)
        return schedule
    return CurveSchedule(config, found.value)


def _freeze_epoch(config: SparsityConfig, last_change: int) -> int:
    """Returns the epoch from which masks are frozen, and warns if that is before the end of the schedule."""
    given = config.params.sparsity_freeze_epoch
    if given is None:
        return max(_DEFAULT_FREEZE_EPOCH, last_change + 1)
    if given <= last_change:
        logger.warning(
            "%s: params.sparsity_freeze_epoch is %d, the schedule ends at epoch %d: the level will stay where epoch %d "
            "has brought it, below the target",
            config.algorithm,
            given,
            last_change,
            given - 1,
        )
    return given
