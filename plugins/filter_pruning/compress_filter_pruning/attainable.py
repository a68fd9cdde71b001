"""Refuses targets that no choice of channels can reach."""

from __future__ import annotations

from compress_core import ConfigError
from compress_filter_pruning.config import FilterPruningConfig, FilterPruningParams
from compress_filter_pruning.planning import PruningPlan
from compress_filter_pruning.selection import Selector

_COUNTED = {
    "pruning_flops_target": "floating point operations",
    "pruning_parameters_target": "parameters",
    "pruning_latency_target": "measured time",
}


def largest_level(plan: PruningPlan, params: FilterPruningParams) -> float:
    """Returns the largest share that can be removed: of what the target counts, of operations if that is channels."""
    return Selector(plan.groups, plan.costs(params.target_key), True, params.is_global).most()


def check_attainable(plan: PruningPlan, config: FilterPruningConfig, section: str) -> None:
    """Refuses a target that is above what can be removed.

    Args:
        plan: The groups and their costs.
        config: The section.
        section: Its path.

    Raises:
        ConfigError: The target cannot be reached.
    """
    params = config.params
    if params.target_key == "pruning_target":
        if config.target and all(group.rounded(1) == group.full_size for group in plan.groups):
            largest = max(group.full_size for group in plan.groups)
            raise ConfigError(
                f"{params.multiple_of} lets no channel go: the largest group that can be pruned has {largest} "
                "channels. Lower it",
                path=f"{section}.params.multiple_of",
            )
        return
    most = largest_level(plan, params)
    if config.target > most:
        what = _COUNTED[params.target_key]
        raise ConfigError(
            f"{config.target} cannot be reached: at most {most:.3f} of this model's {what} can be "
            "removed. Lower it, lower multiple_of, or allow more layers (prune_first_conv, prune_downsample_convs, "
            "scopes)",
            path=f"{section}.params.{params.target_key}",
        )
