"""The section that algorithms of sparsity with a scheduled level share: NNCF's keys and defaults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compress_core.config.choices import ChoiceOf
from compress_core.config.frozen import frozen
from compress_core.config.sections import AlgorithmConfig, Count, Section
from compress_core.errors import ConfigError

Level = Annotated[float, Field(ge=0, lt=1)]
"""A share of weights that are zero."""

SCHEDULES = ("sparsity_schedule", "level_schedule")
"""Choice points of schedules: those that may depend on more than the time, and pure functions of the time."""


class SparsityParams(Section):
    """Section `params`; a subclass adds fields, and may give `schedule` another default."""

    schedule: Annotated[str, ChoiceOf(*SCHEDULES)] = Field(
        "polynomial", description="how the sparsity level grows over the epochs"
    )
    sparsity_target: Level = Field(
        0.5, description="level at the end of the schedule; by default 0.5, or sparsity_init if that is higher"
    )
    sparsity_target_epoch: Count = Field(
        90,
        ge=0,
        description="epoch at which the target is reached; by default 90, or the last before sparsity_freeze_epoch",
    )
    sparsity_freeze_epoch: Count | None = Field(
        None,
        ge=0,
        description="epoch from which the masks are frozen; by default 100, or later if the schedule takes longer",
    )
    update_per_optimizer_step: bool = Field(False, description="polynomial: update the level at each optimizer step")
    steps_per_epoch: Count | None = Field(
        None,
        gt=0,
        description="optimizer steps in an epoch, for update_per_optimizer_step; by default measured in the first",
    )
    power: float = Field(0.9, gt=0, description="polynomial: exponent")
    concave: bool = Field(True, description="polynomial: rises fast first (true) or slowly first (false)")
    multistep_steps: list[Annotated[Count, Field(ge=0)]] = Field(
        [90],
        description="multistep: epochs at which the next level is taken; by default 90, or the last before "
        "sparsity_freeze_epoch",
    )
    multistep_sparsity_levels: list[Level] = Field(
        [0.1, 0.5], description="multistep: levels, one more than steps; by default none below sparsity_init"
    )
    patience: Count = Field(1, ge=1, description="adaptive: epochs between two increases")
    step: float = Field(0.05, gt=0, lt=1, description="adaptive: size of an increase")
    eps: float = Field(0.03, ge=0, lt=1, description="adaptive: tolerance within which a level counts as reached")
    sparsity_level_setting_mode: Literal["global", "local"] = Field(
        "global", description="global: the level holds for all layers together; local: for each layer"
    )


class SparsityConfig(AlgorithmConfig):
    """Section of an algorithm of sparsity whose level follows a schedule."""

    sparsity_init: Level = Field(0.0, description="level that is applied when the model is created")
    params: SparsityParams = Field(default_factory=SparsityParams, description="schedule")

    @model_validator(mode="after")
    def _follow_what_was_given(self) -> Self:
        """Adjusts defaults that contradict what the user wrote."""
        # Through __dict__, so that nothing counts as read or as given.
        initial, params = self.__dict__["sparsity_init"], self.__dict__["params"]
        values, given = params.__dict__, params.model_fields_set
        followed = {
            "sparsity_target": max(values["sparsity_target"], initial),
            "multistep_sparsity_levels": [max(level, initial) for level in values["multistep_sparsity_levels"]],
        }
        if values["sparsity_freeze_epoch"] is not None:
            last = max(values["sparsity_freeze_epoch"] - 1, 0)
            followed["sparsity_target_epoch"] = min(values["sparsity_target_epoch"], last)
            followed["multistep_steps"] = [min(step, last) for step in values["multistep_steps"]]
        values.update({name: frozen(value) for name, value in followed.items() if name not in given})
        return self

    def check_levels(self) -> None:
        """Refuses levels and epochs that contradict one another; call it on a copy (`unread`).

        Raises:
            ConfigError: With the path below the section.
        """
        params = self.params
        if params.schedule == "multistep":
            self._check_steps()
        elif params.sparsity_target < self.sparsity_init:
            raise ConfigError(
                f"sparsity_target {params.sparsity_target} is below sparsity_init {self.sparsity_init}; "
                "raise the target or lower the initial level",
                path="params.sparsity_target",
            )

    def _check_steps(self) -> None:
        params = self.params
        steps, levels = params.multistep_steps, params.multistep_sparsity_levels
        if len(levels) != len(steps) + 1:
            missing = {"multistep_steps", "multistep_sparsity_levels"} - params.model_fields_set
            default = f" ({' and '.join(sorted(missing))} not given: the default)" if missing else ""
            raise ConfigError(
                f"has {len(levels)} levels for {len(steps)} steps {steps}{default}; there must be one level more than "
                "steps",
                path="params.multistep_sparsity_levels",
            )
        if len(set(steps)) < len(steps):
            raise ConfigError(
                f"names an epoch twice: {steps}; one level would never apply", path="params.multistep_steps"
            )
        if levels[-1] < self.sparsity_init:
            raise ConfigError(
                f"ends at {levels[-1]}, below sparsity_init {self.sparsity_init}; raise it or lower the initial level",
                path="params.multistep_sparsity_levels",
            )
