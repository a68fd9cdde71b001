"""The section `filter_pruning`: NNCF's keys and defaults, and `multiple_of`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress_core import AlgorithmConfig, ChoiceOf, Section
from compress_core.config.sections import Count

Level = Annotated[float, Field(ge=0, lt=1)]

# A choice point that plugins can add to; `importance.py` describes its values.
IMPORTANCE = "filter_pruning.importance"
SCHEDULE = "level_schedule"


class LegrParams(Section):
    """Section `params.legr_params`; parsed only to give a clear error, because LeGR is not available yet."""

    generations: Count = Field(400, ge=1, description="learned ranking: generations of the search")
    train_steps: Count = Field(200, ge=0, description="learned ranking: optimizer steps for each candidate")
    max_pruning: float | None = Field(None, ge=0, lt=1, description="learned ranking: level during the search")
    random_seed: Count = Field(42, description="learned ranking: seed of the search")
    population_size: Count = Field(64, ge=1, description="learned ranking: candidates that are kept")
    num_samples: Count = Field(16, ge=1, description="learned ranking: candidates in a tournament")
    mutate_percent: float = Field(0.1, ge=0, le=1, description="learned ranking: share of the layers that mutate")
    scale_sigma: float = Field(1, gt=0, description="learned ranking: spread of the scales")


class FilterPruningParams(Section):
    """Section `params`."""

    schedule: Annotated[str, ChoiceOf(SCHEDULE)] = Field(
        "exponential", description="how the pruning level grows over the epochs"
    )
    pruning_target: Level | None = Field(
        None,
        description="share of the channels to remove; by default 0.5, or pruning_init if that is higher, unless "
        "pruning_flops_target is given",
    )
    pruning_flops_target: Level | None = Field(
        None, description="share of the floating point operations to remove, instead of pruning_target"
    )
    num_init_steps: Count = Field(0, ge=0, description="epochs of warm-up before the schedule begins")
    pruning_steps: Count = Field(100, ge=1, description="epochs from the initial level to the target")
    filter_importance: Annotated[str, ChoiceOf(IMPORTANCE)] = Field(
        "L2", description="importance of a filter: its norm, or its distance to the others"
    )
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = Field(
        "unweighted_ranking", description="how channels of different layers are compared"
    )
    all_weights: bool = Field(False, description="one ranking over all groups instead of the same level in each")
    prune_first_conv: bool | None = Field(None, description="whether convolutions of the model's input may be pruned")
    prune_downsample_convs: bool | None = Field(None, description="whether convolutions with a stride may be pruned")
    prune_batch_norms: bool = Field(True, description="whether masks cover weight and bias of batch norm as well")
    multiple_of: Count = Field(8, ge=1, description="the number of channels left in a group is a multiple of this")
    legr_params: LegrParams | None = Field(None, description="learned ranking: settings of the search")
    save_ranking_coeffs_path: str | None = Field(None, description="learned ranking: where coefficients are written")
    load_ranking_coeffs_path: str | None = Field(None, description="learned ranking: where coefficients are read from")


class FilterPruningConfig(AlgorithmConfig):
    """Section of the algorithm `filter_pruning`."""

    algorithm: Literal["filter_pruning"] = Field(description="name of the algorithm")
    pruning_init: Level = Field(0.0, description="level that is applied when the model is created")
    params: FilterPruningParams = Field(default_factory=FilterPruningParams, description="schedule and ranking")

    @property
    def default_target(self) -> float:
        """The target if the user gives none; it is not below the initial level."""
        return max(0.5, self.pruning_init)
