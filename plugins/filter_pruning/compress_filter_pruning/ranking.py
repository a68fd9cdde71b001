"""How channels of different layers are compared: the choice point, what a search gets, and what it has to return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from compress_core import AlgorithmConfig, ChoicePoint, Context, PluginError
from compress_core.saved import shown
from compress_core.transforms.python_state import copied
from compress_filter_pruning.config import RANKING, FilterPruningParams
from compress_filter_pruning.importance import channel_importance, filter_importance
from compress_filter_pruning.planning import PruningPlan
from compress_filter_pruning.pruner import Pruner
from compress_filter_pruning.selection import Selector
from compress_filter_pruning.statistics import Coefficients, Ranking


class RankingRequest:
    """What a search gets.

    Args:
        model: The uncompressed model; to be left as it is.
        plan: The groups and their costs.
        section: The section of filter pruning.
        context: Data and registered functions.
        path: Path of `interlayer_ranking_type`, for messages.
    """

    def __init__(
        self, model: nn.Module, plan: PruningPlan, section: AlgorithmConfig, context: Context, path: str
    ) -> None:
        self.model, self.section, self.context, self.path = model, section, context, path
        self._plan = plan
        self._params: FilterPruningParams = section.params
        parameters = dict(model.named_parameters(remove_duplicate=False))
        members = {member.parameter: member for group in plan.groups for member in group.makers}
        self.weights = {name: parameters[name].detach() for name in members}
        """Name of each weight that makes channels -> the weight."""
        kind = self._params.filter_importance
        self.importances = {
            name: filter_importance(self.weights[name], m.dim, kind).cpu() for name, m in members.items()
        }
        """Name of each weight that makes channels -> importances of its filters, float64, shape (filters,)."""

    def candidate(self, coefficients: Coefficients, level: float) -> nn.Module:
        """Returns a copy of the model in which the channels with the lowest scores are masked.

        Args:
            coefficients: The ranking, see `Ranking`.
            level: What is pruned: a share of what the target counts.
        """
        trial = copied(self.model)
        scores = self.scores(coefficients)
        Pruner(trial, self._plan, self._params, "filter_pruning", lambda *_: None, measured=scores).apply(level)
        return trial

    def scores(self, coefficients: Coefficients) -> list[torch.Tensor]:
        """Returns the score of each channel of each group; float64, shape (channels,) each."""
        return [
            channel_importance(
                [(m.parameter, self.weights[m.parameter], m.dim, torch.from_numpy(m.channels)) for m in group.makers],
                group.size,
                lambda name, *_: self.importances[name],
                coefficients=coefficients,
            )
            for group in self._plan.groups
        ]

    def uniform(self, coefficients: Coefficients, level: float) -> Coefficients:
        """Returns coefficients with other shifts, with which a level removes the same share from each group.

        The score between the last channel that goes and the first that stays becomes 0 in all groups.

        Args:
            coefficients: Their scales stay.
            level: What is pruned: a share of what the target counts.
        """
        costs = self._plan.costs(self._params.target_key)
        counts_costs = self._params.target_key != "pruning_target"
        left = Selector(self._plan.groups, costs, counts_costs, is_global=False).left(level, list)
        found = dict(coefficients)
        for group, scores, stays in zip(self._plan.groups, self.scores(coefficients), left, strict=True):
            ordered, goes = scores.sort().values, len(scores) - stays
            border = float(ordered[max(goes - 1, 0) : goes + 1].mean()) if goes else float(ordered[0]) - _gap(ordered)
            filters = sum(int((m.channels >= 0).sum()) for m in group.makers) / len(scores)
            for name in {m.parameter for m in group.makers}:
                found[name] = (found[name][0], found[name][1] - border / filters)
        return found


def _gap(ordered: torch.Tensor) -> float:
    return float(ordered[-1] - ordered[0]) / len(ordered)


@runtime_checkable
class RankingSearch(Protocol):
    """A ranking over all groups that is searched for when the model is created, and decides from then on."""

    def search(self, request: RankingRequest) -> Ranking:
        """Returns coefficients for each weight of `request.weights`; leaves the model as it is."""
        ...


class Unweighted:
    """Importances as they are, or divided by the norm of the weight with `all_weights`."""


def _wrong(value: Any) -> str | None:
    good = isinstance(value, (Unweighted, RankingSearch))
    return None if good else f"must have the method search(request), got {type(value).__name__}"


# Larger coefficients could not be multiplied with importances and added up.
_LARGEST = 1e150

POINT = ChoicePoint(
    RANKING,
    "an object with the method `search(request)`, which gets a `RankingRequest` and returns a `Ranking`: two "
    "coefficients for each weight that make its filters comparable with those of others; see "
    "`compress_filter_pruning.ranking`",
    _wrong,
)


def checked(found: object, kind: str, names: Sequence[str]) -> Ranking:
    """Returns what a search has returned, after checking it.

    Raises:
        PluginError: It does not have two finite numbers for each weight.
    """
    if not isinstance(found, Ranking):
        raise PluginError(f"the ranking '{kind}' returned {type(found).__name__}, and has to return a Ranking")
    problem = problem_with(found.coefficients, names)
    if problem is not None:
        raise PluginError(f"the ranking '{kind}' returned coefficients that cannot be used: {problem}")
    return found


def problem_with(coefficients: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns what is wrong with coefficients for the weights of these names; None if nothing is."""
    missing = sorted(set(names) - coefficients.keys())
    if missing:
        return f"there are none for {missing[:3]} ({len(missing)} of {len(names)} weights)"
    unknown = sorted(coefficients.keys() - set(names))
    if unknown:
        some = [name[:80] for name in unknown[:3]]
        return f"{some} make no channels to prune here; the weights that do are {sorted(names)[:3]} and so on"
    for name, pair in coefficients.items():
        numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))
        if not numbers:
            return f"'{name}' needs two finite numbers, got {shown(pair)}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
