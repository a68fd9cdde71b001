"""The section `magnitude_sparsity`: NNCF's keys and defaults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compress_core import AlgorithmConfig, ChoiceOf, Section
from compress_core.config import Count
from compress_core.config.frozen import frozen

Level = Annotated[float, Field(ge=0, lt=1)]

# Choice points that plugins can add to: schedules of this algorithm (`schedules.py`), and pure functions of the time.
SCHEDULES = ("magnitude_sparsity.schedule", "level_schedule")
# `importance.py` describes its values.
IMPORTANCE = "magnitude_sparsity.weight_importance"


class MagnitudeSparsityParams(Section):
    """Section `params`."""

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
        "global", description="global: one ranking over all layers; local: the same level in each layer"
    )
    weight_importance: Annotated[str, ChoiceOf(IMPORTANCE)] = Field(
        "normed_abs", description="|w|, |w| divided by the L2 norm of its layer, or one that needs data"
    )
    importance_steps: Count = Field(
        16, ge=1, description="reconstruction: number of steps in which the initial level is reached"
    )


class MagnitudeSparsityConfig(AlgorithmConfig):
    """Section of the algorithm `magnitude_sparsity`."""

    algorithm: Literal["magnitude_sparsity"] = Field(description="name of the algorithm")
    sparsity_init: Level = Field(0.0, description="level that is applied when the model is created")
    params: MagnitudeSparsityParams = Field(default_factory=MagnitudeSparsityParams, description="schedule and ranking")

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
