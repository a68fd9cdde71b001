"""The section `rb_sparsity`: NNCF's keys and defaults, and `seed`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress_core import ChoiceOf, Count
from compress_core.contract.sparsity_config import SCHEDULES, Level, SparsityConfig, SparsityParams


class RBSparsityParams(SparsityParams):
    """Section `params`."""

    schedule: Annotated[str, ChoiceOf(*SCHEDULES)] = Field(
        "exponential", description="how the level that the loss asks for grows over the epochs"
    )
    sparsity_level_setting_mode: Literal["global", "local"] = Field(
        "global", description="global: the loss asks for a level of all layers together; local: of each layer"
    )
    seed: Count = Field(0, ge=0, description="seed of the noise of the gates")


class RBSparsityConfig(SparsityConfig):
    """Section of the algorithm `rb_sparsity`."""

    algorithm: Literal["rb_sparsity"] = Field(description="name of the algorithm")
    sparsity_init: Level = Field(0.0, description="level that the loss asks for when the model is created")
    params: RBSparsityParams = Field(default_factory=RBSparsityParams, description="schedule and noise")
    compression_lr_multiplier: float | None = Field(
        None, gt=0, description="factor on the gradients of the gates; overrides the one at the top of the config"
    )
