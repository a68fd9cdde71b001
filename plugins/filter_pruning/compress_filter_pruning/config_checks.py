"""Checks of the section `filter_pruning` that the schema cannot do."""

from __future__ import annotations

from compress_core import ConfigError, choice
from compress_core.errors import Problem
from compress_filter_pruning.config import IMPORTANCE, FilterPruningConfig, FilterPruningParams
from compress_filter_pruning.measured import DataImportance

_TARGETS = ("pruning_target", "pruning_flops_target", "pruning_parameters_target", "pruning_latency_target")
# Searches with settings of their own -> the section that holds these.
_SECTIONS = {"learned_ranking": "legr_params", "adapted_ranking": "adapted_params"}


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
    if params.is_searched:
        _read_search(params)


def _read_search(params: FilterPruningParams) -> None:
    """Reads the values that a search uses; the rest is refused as having no effect."""
    _ = params.save_ranking_coeffs_path
    if params.load_ranking_coeffs_path is not None:
        return
    section = getattr(params, _SECTIONS.get(params.interlayer_ranking_type, ""), None)
    for name in () if section is None else type(section).model_fields:
        getattr(section, name)


def _problems(config: FilterPruningConfig, may_begin_above: bool) -> list[Problem]:
    params, problems = config.params, []
    kind = params.interlayer_ranking_type
    for name, section in _SECTIONS.items():
        values = getattr(params, section)
        if values is not None and not values.model_fields_set and (kind != name or params.load_ranking_coeffs_path):
            problems.append(
                Problem(f"params.{section}", f"is for the search of '{name}', and there is none; remove it")
            )
    if params.is_searched:
        problems += _problems_of_search(params, kind)
    given = [key for key in _TARGETS if getattr(params, key) is not None]
    if len(given) > 1:
        message = f"is given together with {' and '.join(given[:-1])}; choose one of them"
        problems.append(Problem(f"params.{given[-1]}", message))
    key = params.target_key
    target = getattr(params, key)
    if target is not None and target < config.pruning_init and not may_begin_above:
        problems.append(
            Problem(
                f"params.{key}",
                f"{target} is below pruning_init {config.pruning_init}; raise the target or lower the initial level",
            )
        )
    return problems


def _problems_of_search(params: FilterPruningParams, kind: str) -> list[Problem]:
    problems = []
    if not params.all_weights and "all_weights" in params.model_fields_set:
        problems.append(
            Problem(
                "params.all_weights",
                f"is false, and '{kind}' is one ranking over all groups; remove it, or use 'unweighted_ranking'",
            )
        )
    if isinstance(choice(params.filter_importance, IMPORTANCE), DataImportance):
        problems.append(
            Problem(
                "params.filter_importance",
                f"'{params.filter_importance}' is measured for whole groups, and '{kind}' compares filters of weights; "
                "use L1, L2 or geometric_median, or 'unweighted_ranking'",
            )
        )
    return problems
