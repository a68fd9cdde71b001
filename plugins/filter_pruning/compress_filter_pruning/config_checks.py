"""Checks of the section `filter_pruning` that the schema cannot do."""

from __future__ import annotations

from compress_core import ConfigError
from compress_core.errors import Problem
from compress_filter_pruning.config import FilterPruningConfig


def check_config(config: FilterPruningConfig, *, may_begin_above: bool = False) -> None:
    """Refuses values that contradict each other, and reads the values that take effect once there is a model.

    Args:
        config: The section.
        may_begin_above: Whether the initial level may lie above the target, because a search and not the schedule sets
            the levels.

    Raises:
        ConfigError: Lists all problems.
    """
    problems = _problems(config.unread(), may_begin_above)
    if problems:
        raise ConfigError(problems)
    params = config.params
    _ = (params.filter_importance, params.all_weights, params.prune_first_conv, params.prune_downsample_convs)
    _ = (params.prune_batch_norms, params.multiple_of, params.interlayer_ranking_type)


def _problems(config: FilterPruningConfig, may_begin_above: bool) -> list[Problem]:
    params, problems = config.params, []
    if params.interlayer_ranking_type == "learned_ranking":
        problems.append(
            Problem(
                "params.interlayer_ranking_type",
                "'learned_ranking' (LeGR) is not available yet; use 'unweighted_ranking' with all_weights",
            )
        )
    if params.legr_params is not None and not params.legr_params.model_fields_set:
        problems.append(
            Problem("params.legr_params", "is for learned ranking (LeGR), which is not available yet; remove it")
        )
    if params.pruning_target is not None and params.pruning_flops_target is not None:
        problems.append(
            Problem("params.pruning_flops_target", "is given together with pruning_target; choose one of them")
        )
    key = "pruning_target" if params.pruning_flops_target is None else "pruning_flops_target"
    target = getattr(params, key)
    if target is not None and target < config.pruning_init and not may_begin_above:
        problems.append(
            Problem(
                f"params.{key}",
                f"{target} is below pruning_init {config.pruning_init}; raise the target or lower the initial level",
            )
        )
    return problems
