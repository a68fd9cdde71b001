"""The section `magnitude_sparsity`: NNCF's keys and defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress_core import ChoiceOf, Count
from compress_core.contract.sparsity_config import Level, SparsityConfig, SparsityParams

# A choice point that plugins can add to; `importance.py` describes its values.
IMPORTANCE = "magnitude_sparsity.weight_importance"


class MagnitudeSparsityParams(SparsityParams):
    """Section `params`."""

    sparsity_level_setting_mode: Literal["global", "local"] = Field(
        "global", description="global: one ranking over all layers; local: the same level in each layer"
    )
    weight_importance: Annotated[str, ChoiceOf(IMPORTANCE)] = Field(
        "normed_abs", description="|w|, |w| divided by the L2 norm of its layer, or one that needs data"
    )
    importance_steps: Count = Field(
        16, ge=1, description="reconstruction: number of steps in which the initial level is reached"
    )


class MagnitudeSparsityConfig(SparsityConfig):
    """Section of the algorithm `magnitude_sparsity`."""

    algorithm: Literal["magnitude_sparsity"] = Field(description="name of the algorithm")
    sparsity_init: Level = Field(0.0, description="level that is applied when the model is created")
    params: MagnitudeSparsityParams = Field(default_factory=MagnitudeSparsityParams, description="schedule and ranking")
