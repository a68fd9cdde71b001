"""`ScheduledSparsity`: base class of algorithms of sparsity whose level follows a schedule."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from compress_core.config import AlgorithmConfig
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.levels import LevelAlgorithm
from compress_core.contract.masked_weights import MaskingAlgorithm
from compress_core.contract.sparsity_config import SparsityConfig
from compress_core.contract.sparsity_schedules import Schedule, make_schedule
from compress_core.saved import Whole, damaged, parsed
from compress_core.transforms import raw_parameter

logger = logging.getLogger(__name__)

# Longer schedules are not followed to find their end.
_MOST_EPOCHS = 100_000


class SavedSparsity(BaseModel):
    """The state that `ScheduledSparsity.compress_state` returns; `held` is there if masks have to be trained."""

    level: float = Field(ge=0, lt=1)
    frozen: bool
    schedule: dict[str, Any]
    time: tuple[Whole, Whole] | None = None
    held: bool = False


class ScheduledSparsity(MaskingAlgorithm, LevelAlgorithm):
    """Base class of algorithms of sparsity whose section is a `SparsityConfig`.

    It follows the schedule, freezes, saves, and pickles. A subclass implements `kept`, `follow_schedule` and
    `set_sparsity_level`, and its `compress_configure` calls `configure_schedule`.
    """

    config: SparsityConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._schedule: Schedule | None = None
        self._requested = 0.0
        # Epoch and finished optimizer steps when the schedule's level was set; None if it is another one.
        self._time: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Schedules are functions, which pickle cannot store; they are made again from the config.
        return {**self.__dict__, "_schedule": None if self._schedule is None else self._schedule.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_schedule"] is not None:
            self._schedule = make_schedule(self.config)
            self._schedule.load_state(state["_schedule"])

    def configure_schedule(self, context: Context) -> None:
        """Makes the schedule; reads the values of the section on which it depends.

        Raises:
            ConfigError: Levels or epochs contradict one another.
        """
        config = self.config.unread()
        config.check_levels()
        self._schedule = make_schedule(self.config)
        _ = (self.is_global, self.config.sparsity_init)
        if config.params.schedule == "adaptive" and "sparsity_target_epoch" in config.params.model_fields_set:
            # NNCF takes it and ignores it, and documents of its users have it.
            path, _ = context.section(self)
            leaf, value = f"{path}.params.sparsity_target_epoch", config.params.sparsity_target_epoch
            logger.warning("%s: the adaptive schedule ends when it has reached its target; %d is not used", leaf, value)
            context.ledger.record(leaf, value, "no effect: the adaptive schedule ends when it has reached its target")

    def follow_schedule(self, level: float, time: tuple[int, int]) -> None:
        """Sets a level of the schedule.

        Args:
            level: The level.
            time: Epoch and number of finished optimizer steps.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement follow_schedule(level, time)")

    def set_sparsity_level(self, level: float) -> None:
        """Sets the level.

        Args:
            level: Share of weights that is to be zero, 0 <= level < 1.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement set_sparsity_level(level)")

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets the level of the epoch that begins."""
        if clock.epoch >= self.schedule.freeze_epoch and not self._frozen:
            self.freeze(True)
        level = self.schedule.at_epoch(clock, self.sparsity_level)
        if level is not None and not self._frozen:
            self.follow_schedule(level, (clock.epoch, clock.step + 1))

    @hookimpl
    def compress_step(self, clock: Clock) -> None:
        """Sets the level of the optimizer step that begins, with `update_per_optimizer_step`."""
        level = None if self._frozen else self.schedule.at_step(clock)
        if level is not None:
            self.follow_schedule(level, (clock.epoch, clock.step))

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        assert self._schedule is not None, "the algorithm has not been committed"
        return self._schedule

    @property
    def is_global(self) -> bool:
        """Whether a level holds for all layers together."""
        return self.config.params.sparsity_level_setting_mode == "global"

    @property
    def target_level(self) -> float:
        """Level at the end of the schedule."""
        return self.schedule.target

    def level(self) -> float:
        """Returns the sparsity level."""
        return self.sparsity_level

    def set_level(self, level: float) -> None:
        """Calls `set_sparsity_level`."""
        self.set_sparsity_level(level)

    def progress_figures(self) -> dict[str, Any]:
        """Returns the fields that `ScheduledSparsityStatistics` adds."""
        return {"requested_level": self._requested, "target_level": self.target_level, "frozen": self._frozen}

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the level, whether masks are frozen, and the schedule; the rest is in the model's `state_dict`."""
        return {
            "level": self._requested,
            "frozen": self._frozen,
            "schedule": self.schedule.get_state(),
            "time": self._time,
        }

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts what is masked now; at the end it is as much as the schedule asks for."""
        return self.with_last_level(footprint) if at_end else self.with_masks(footprint)

    def with_last_level(self, footprint: Footprint) -> Footprint:
        """Returns a footprint at the end of the schedule: at the target, unless the masks are frozen before."""
        schedule, level = copy.deepcopy(self.schedule), self.config.unread().sparsity_init
        if schedule.freeze_epoch > _MOST_EPOCHS:
            return self.with_level(footprint, schedule.target)
        for epoch in range(schedule.freeze_epoch):
            clock = Clock(epoch, epoch, 0)
            for found in (schedule.at_epoch(clock, level), schedule.at_step(clock)):
                level = level if found is None else found
        reached = self.with_level(footprint, level)
        if level >= schedule.target:
            return reached
        words = f"are frozen in epoch {schedule.freeze_epoch}, before the schedule reaches its target {schedule.target}"
        return reached.noted(f"masks {words}")

    def with_level(self, footprint: Footprint, level: float) -> Footprint:
        """Returns a footprint in which a level is reached."""
        sizes = {name: raw_parameter(self.model, name).numel() for name in self.present}
        if not self.is_global:
            counts = {name: min(round(level * size), max(size - 1, 0)) for name, size in sizes.items()}
            return footprint.with_levels({name: counts[name] / max(size, 1) for name, size in sizes.items()})
        share = round(level * sum(sizes.values())) / max(sum(sizes.values()), 1)
        return footprint.with_levels(dict.fromkeys(sizes, share), together=level > 0)

    def loaded_sparsity(self, state: Mapping[str, Any]) -> SavedSparsity:
        """Returns what `compress_state` returned after a check; the schedule is restored, nothing else is set.

        Raises:
            StateError: It has other values than `compress_state` can return.
        """
        path = f"compression_state.algorithms.{self.name}.state"
        saved = parsed(SavedSparsity, state, path)
        expected = sorted(self.schedule.get_state())
        if sorted(saved.schedule) != expected:
            raise damaged(f"{path}.schedule", f"must have the keys {expected}, got {sorted(saved.schedule)[:5]}")
        try:
            self.schedule.load_state(saved.schedule)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise damaged(f"{path}.schedule", str(error)) from error
        return saved
