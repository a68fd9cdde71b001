"""The section `filter_pruning`: NNCF's keys and defaults, and `multiple_of`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress_core import AlgorithmConfig, ChoiceOf, Section, choice
from compress_core.config.sections import Count

Level = Annotated[float, Field(ge=0, lt=1)]
SearchLevel = Annotated[float, Field(gt=0, lt=1)]

# Choice points that plugins can add to; `importance.py` and `ranking.py` describe their values.
IMPORTANCE = "filter_pruning.importance"
RANKING = "filter_pruning.interlayer_ranking"
SCHEDULE = "level_schedule"


class LegrParams(Section):
    """Section `params.legr_params`."""

    generations: Count = Field(400, ge=1, description="learned ranking: candidates that are tried")
    train_steps: Count = Field(200, ge=0, description="learned ranking: optimizer steps for each candidate")
    max_pruning: SearchLevel | None = Field(
        None, description="learned ranking: level during the search; by default the target"
    )
    random_seed: Count = Field(42, ge=0, lt=2**63, description="learned ranking: seed of the search")
    population_size: Count = Field(64, ge=1, description="learned ranking: candidates that can have children")
    num_samples: Count = Field(16, ge=1, description="learned ranking: candidates in a tournament")
    mutate_percent: float = Field(0.1, gt=0, le=1, description="learned ranking: share of the layers that mutate")
    scale_sigma: float = Field(1, gt=0, description="learned ranking: spread of the scales")


class AdaptedParams(Section):
    """Section `params.adapted_params`."""

    candidates: Count = Field(64, ge=1, description="adapted ranking: rankings that are tried")
    population_size: Count = Field(16, ge=1, description="adapted ranking: candidates that can have children")
    calibration_samples: Count = Field(256, ge=1, description="adapted ranking: samples to adapt and compare with")
    max_pruning: SearchLevel | None = Field(
        None, description="adapted ranking: level during the search; by default the target"
    )
    random_seed: Count = Field(42, ge=0, lt=2**63, description="adapted ranking: seed of the search")


class FilterPruningParams(Section):
    """Section `params`."""

    schedule: Annotated[str, ChoiceOf(SCHEDULE)] = Field(
        "exponential", description="how the pruning level grows over the epochs"
    )
    pruning_target: Level | None = Field(
        None,
        description="share of the channels to remove; by default 0.5, or pruning_init if that is higher, unless "
        "another target is given",
    )
    pruning_flops_target: Level | None = Field(
        None, description="share of the floating point operations to remove, instead of pruning_target"
    )
    pruning_parameters_target: Level | None = Field(
        None, description="share of the parameters to remove, instead of pruning_target"
    )
    pruning_latency_target: Level | None = Field(
        None, description="share of the measured time of a forward to remove, instead of pruning_target"
    )
    num_init_steps: Count = Field(0, ge=0, description="epochs of warm-up before the schedule begins")
    pruning_steps: Count = Field(100, ge=1, description="epochs from the initial level to the target")
    filter_importance: Annotated[str, ChoiceOf(IMPORTANCE)] = Field(
        "L2", description="importance of a filter: its norm, or its distance to the others"
    )
    interlayer_ranking_type: Annotated[str, ChoiceOf(RANKING)] = Field(
        "unweighted_ranking", description="how channels of different layers are compared"
    )
    all_weights: bool = Field(False, description="one ranking over all groups instead of the same level in each")
    prune_first_conv: bool | None = Field(None, description="whether convolutions of the model's input may be pruned")
    prune_downsample_convs: bool | None = Field(None, description="whether convolutions with a stride may be pruned")
    prune_batch_norms: bool = Field(True, description="whether masks cover weight and bias of batch norm as well")
    multiple_of: Count = Field(8, ge=1, description="the number of channels left in a group is a multiple of this")
    adapted_params: AdaptedParams | None = Field(None, description="adapted ranking: settings of the search")
    legr_params: LegrParams | None = Field(None, description="learned ranking: settings of the search")
    save_ranking_coeffs_path: str | None = Field(None, description="file that coefficients of a search are written to")
    load_ranking_coeffs_path: str | None = Field(
        None, description="file that coefficients are read from, instead of a search"
    )

    @property
    def target_key(self) -> str:
        """The key of the target, which says what levels count: `pruning_target` (channels) unless another is given."""
        keys = ("pruning_flops_target", "pruning_parameters_target", "pruning_latency_target")
        return next((key for key in keys if getattr(self, key) is not None), "pruning_target")

    @property
    def is_searched(self) -> bool:
        """Whether channels are compared by a ranking that is searched for."""
        return hasattr(choice(self.interlayer_ranking_type, RANKING), "search")

    @property
    def is_global(self) -> bool:
        """Whether there is one ranking over all groups; always for one that is searched for."""
        return self.all_weights or self.is_searched

    @property
    def prunes_first(self) -> bool:
        """Whether convolutions of the model's input may be pruned; by default if a ranking is searched for."""
        return self.is_searched if self.prune_first_conv is None else self.prune_first_conv

    @property
    def prunes_downsampling(self) -> bool:
        """Whether convolutions with a stride may be pruned; by default if a ranking is searched for."""
        return self.is_searched if self.prune_downsample_convs is None else self.prune_downsample_convs


class FilterPruningConfig(AlgorithmConfig):
    """Section of the algorithm `filter_pruning`."""

    algorithm: Literal["filter_pruning"] = Field(description="name of the algorithm")
    pruning_init: Level = Field(0.0, description="level that is applied when the model is created")
    params: FilterPruningParams = Field(default_factory=FilterPruningParams, description="schedule and ranking")

    @property
    def default_target(self) -> float:
        """The target if the user gives none; it is not below the initial level."""
        return max(0.5, self.pruning_init)

    @property
    def target(self) -> float:
        """The level at the end, of what is counted: channels, operations, parameters or time."""
        given = getattr(self.params, self.params.target_key)
        return self.default_target if given is None else float(given)
