"""Measured latency as a budget: the model of it, its correction where the target is, and the check at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compress_core.channels import InputSpec, Shrinkage
from compress_core.data.forwards import without_traces
from compress_core.data.ranks import exchange, number_of_ranks
from compress_filter_pruning.config import FilterPruningConfig, FilterPruningParams
from compress_filter_pruning.latency import Pairs, clock, device_of, in_turns, quiet, smaller, typical
from compress_filter_pruning.latency_model import LatencyModel
from compress_filter_pruning.latency_samples import fitted_model
from compress_filter_pruning.planning import PruningPlan
from compress_filter_pruning.pruner import Pruner
from compress_filter_pruning.selection import Selector
from compress_filter_pruning.statistics import LatencyCheck

logger = logging.getLogger(__name__)

_SECONDS = 0.5  # for forwards of the full model
_ROUNDS = (7, 50)
_CORRECTIONS = 4
# A prediction this close to what is measured is not corrected any more: measurements vary as much.
_CLOSE = 0.01
# A warning says when the time that is left is off by more than this share of it.
_OFF = 0.1


def with_latency(model: nn.Module, plan: PruningPlan, params: FilterPruningParams) -> PruningPlan:
    """Returns the plan with a model of the latency, measured by the first of several processes.

    What the smallest network takes is measured too, so that it is known what can be reached.

    Args:
        model: The uncompressed model; it is not changed.
        plan: Its groups.
        params: The settings.
    """

    def measure() -> dict[str, Any]:
        found = fitted_model(model, plan)
        least = Selector(plan.groups, found, True, params.is_global).least()
        pairs = [(g.channels, set(range(n, g.size))) for g, n in zip(plan.groups, least, strict=True)]
        return found.corrected(least, _in_turns(model, pairs, plan.inputs)["measured"]).to_dict()

    with without_traces(model, parameters=False):
        saved = _of_the_first("latency", measure)
    return replace(plan, latency=LatencyModel.from_dict(saved, [group.full_size for group in plan.groups]))


def corrected(model: nn.Module, pruner: Pruner, config: FilterPruningConfig) -> LatencyModel:
    """Measures what the target would leave, and corrects the model of the latency until it agrees there.

    Args:
        model: The uncompressed model; it is not changed.
        pruner: A pruner of a copy, with the ranking that will be used.
        config: The section.
    """
    found = pruner.costs
    assert isinstance(found, LatencyModel)
    seen: list[list[int]] = []
    while True:
        pruner.costs = found
        pruner.apply(config.target)
        left = pruner.left()
        check = measured_check(model, pruner, shared=True)
        if left in seen or len(seen) == _CORRECTIONS or abs(check.measured - check.predicted) <= _CLOSE:
            warn_if_off(check, "the pruned model will take")
            return replace(found, check=check)
        seen.append(left)
        found = found.corrected(left, check.measured)


def stripped_and_checked(pruner: Pruner, model: nn.Module) -> LatencyCheck:
    """Removes the masked channels from a model, and measures what has become of the prediction.

    Args:
        pruner: What removes them.
        model: The model, usually a copy of that of the pruner.

    Raises:
        ShrinkError: The smaller model would fail or compute something else; the model is not changed.
    """
    in_place = model is pruner.model  # afterwards there is nothing left to compare with
    check = measured_check(pruner.model, pruner) if in_place else None
    pruner.strip(model, Shrinkage())
    check = check or measured_check(pruner.model, pruner)
    warn_if_off(check, "the stripped model takes")
    return check


def measured_check(model: nn.Module, pruner: Pruner, *, shared: bool = False) -> LatencyCheck:
    """Measures copies with and without channels in turns.

    Args:
        model: The model; it is not changed.
        pruner: What predicts it, with the masked channels.
        shared: Whether all processes take what the first one measures.
    """

    def measure() -> Mapping[str, Any]:
        return _in_turns(model, pruner.pairs(), pruner.inputs)

    with without_traces(model, parameters=False):
        found = _of_the_first("latency of the pruned model", measure) if shared else measure()
    return LatencyCheck(predicted=pruner.level(), **found)


def _in_turns(model: nn.Module, pairs: Pairs, specs: Sequence[InputSpec]) -> dict[str, Any]:
    """Measures copies with and without channels; returns fields of a `LatencyCheck`."""
    whole, small = smaller(model, []), smaller(model, pairs)
    now = clock(device_of(model))
    with quiet(model, specs) as inputs:
        once = in_turns([whole], inputs, 1, now)[0][0]
        rounds = int(min(max(_SECONDS / max(once, 1e-9), _ROUNDS[0]), _ROUNDS[1]))
        full, left = (typical(found) for found in in_turns([whole, small], inputs, rounds, now))
    return {"measured": 1 - left / full, "seconds": full, "threads": torch.get_num_threads()}


def warn_if_off(check: LatencyCheck, what: str) -> None:
    """Warns if a prediction is wrong by more than a tenth of the time that is left."""
    left, wanted = 1 - check.measured, 1 - check.predicted
    if abs(left - wanted) > _OFF * wanted:
        logger.warning(
            "filter_pruning: measured, %s %.1f %% of the time of the full one, and %.1f %% was predicted; was the "
            "machine busy? The full one takes %.3g ms with %d thread(s)",
            what,
            100 * left,
            100 * wanted,
            1000 * check.seconds,
            check.threads,
        )


def _of_the_first(what: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns what the first process measures, so that all choose the same; the others wait."""
    if number_of_ranks() == 1:
        return measure()
    found: list[Mapping[str, Any]] = exchange(what, measure() if dist.get_rank() == 0 else None)
    return found[0]
