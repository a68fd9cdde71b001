"""The rankings that are built in, and how one is found: by a search, in a file, or in a saved state."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from compress_core import Choice, ConfigError, Context, StateError, choice
from compress_core.data.ranks import number_of_ranks
from compress_core.saved import damaged
from compress_filter_pruning.adapted import AdaptedRanking
from compress_filter_pruning.attainable import largest_level
from compress_filter_pruning.coefficients import check_folder, read_coefficients, write_coefficients
from compress_filter_pruning.config import IMPORTANCE, RANKING, FilterPruningConfig, FilterPruningParams
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.legr import LearnedRanking
from compress_filter_pruning.measured import DataImportance
from compress_filter_pruning.planning import PruningPlan
from compress_filter_pruning.ranking import RankingRequest, Unweighted, checked, problem_with
from compress_filter_pruning.saved import SavedRanking
from compress_filter_pruning.statistics import Ranking

CHOICES = [
    Choice(RANKING, "unweighted_ranking", Unweighted()),
    Choice(RANKING, "learned_ranking", LearnedRanking()),
    Choice(RANKING, "adapted_ranking", AdaptedRanking()),
]


def found_ranking(
    model: nn.Module, plan: PruningPlan, config: FilterPruningConfig, context: Context, section: str
) -> Ranking | None:
    """Returns the ranking that the section asks for: read from a file, else searched for; None if unweighted.

    Args:
        model: The uncompressed model; it is not changed.
        plan: Its groups and their costs.
        config: The section.
        context: Data and registered functions.
        section: Its path.

    Raises:
        ConfigError, DataError, FileError, PluginError: There is no such ranking. Nothing has been changed.
    """
    params = config.params
    if not params.is_searched:
        return None
    names = list(dict.fromkeys(member.parameter for group in plan.groups for member in group.makers))
    if params.save_ranking_coeffs_path is not None:
        check_folder(params.save_ranking_coeffs_path, f"{section}.params.save_ranking_coeffs_path")
    if params.load_ranking_coeffs_path is not None:
        place = f"{section}.params.load_ranking_coeffs_path"
        found = Ranking(read_coefficients(params.load_ranking_coeffs_path, names, place))
    else:
        _check_level(plan, config, section)
        path = f"{section}.params.interlayer_ranking_type"
        request = RankingRequest(model, plan, config, context, path)
        kind = params.interlayer_ranking_type
        found = checked(choice(kind, RANKING).search(request), kind, names)
    if params.save_ranking_coeffs_path is not None and (number_of_ranks() == 1 or dist.get_rank() == 0):
        write_coefficients(params.save_ranking_coeffs_path, found.coefficients)
    return found


def undecided(config: FilterPruningConfig, section: str) -> str:
    """Returns what data decides about the channels when a model is created; empty if their weights decide.

    Args:
        config: The section; its values do not count as read.
        section: Its path.
    """
    params = config.unread().params
    words = "is decided from data when the model is created"
    if params.is_searched and params.load_ranking_coeffs_path is None:
        key, what = "interlayer_ranking_type", "how channels of different layers compare"
        return f"{what} {words} ({section}.params.{key}: '{params.interlayer_ranking_type}')"
    if isinstance(choice(params.filter_importance, IMPORTANCE), DataImportance):
        return f"which channels go {words} ({section}.params.filter_importance: '{params.filter_importance}')"
    return ""


def resumed_ranking(
    params: FilterPruningParams, saved: SavedRanking | None, groups: Sequence[PruningGroup], path: str
) -> Ranking | None:
    """Returns the ranking in a state, if the section asks for one; nothing is searched for again.

    Raises:
        StateError: There is none, or it is not for these weights.
    """
    kind = params.interlayer_ranking_type
    if not params.is_searched:
        return None
    if saved is None:
        raise StateError(f"{path}.ranking: there is none, and interlayer_ranking_type '{kind}' needs it")
    names = [member.parameter for group in groups for member in group.makers]
    problem = problem_with(saved.coefficients, names)
    if problem is not None:
        raise damaged(f"{path}.ranking.coefficients", problem)
    return Ranking(dict(saved.coefficients), saved.tried, saved.measure, saved.value, saved.unweighted)


def _check_level(plan: PruningPlan, config: FilterPruningConfig, section: str) -> None:
    params = config.params
    for name in ("legr_params", "adapted_params"):
        level = getattr(getattr(params, name), "max_pruning", None)
        if level is None or params.target_key == "pruning_target":
            continue
        most = largest_level(plan, params)
        if level > most:
            raise ConfigError(
                f"{level} cannot be reached: at most {most:.3f} of what the target counts can be removed; lower it",
                path=f"{section}.params.{name}.max_pruning",
            )
    if not config.target and params.interlayer_ranking_type != "unweighted_ranking":
        raise ConfigError(
            "searches for what is best pruned, and the target is 0; give a target, or remove this",
            path=f"{section}.params.interlayer_ranking_type",
        )
