"""The multiple-choice knapsack problem: one option for each unit, least error, within a budget; solved exactly.

Dynamic programming over the units: a state is what some of them cost and their error. Of two states one is dropped if
the other is no worse in both (Nemhauser and Ullmann, 1969). States that cannot lead to the optimum are dropped as
well: their error plus the least that the other units can add, a linear program over the lower convex hulls of their
options (Sinha and Zoltners, 1979), is above the error of a known solution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

# Sums of the same errors in another order differ by roundings.
_SLACK = 1e-9


@dataclass(frozen=True)
class Unit:
    """What has to be decided together.

    Attributes:
        costs: The cost of each option.
        errors: The error of each option, not negative; infinite for options that must not be taken.
    """

    costs: Sequence[int]
    errors: Sequence[float]


@dataclass(frozen=True)
class _Options:
    """The options of a unit that can be best: cheaper ones have larger errors."""

    costs: _Ints
    errors: _Floats
    numbers: _Ints


def solve(units: Sequence[Unit], budget: int) -> list[int] | None:
    """Returns the option of each unit with the least sum of errors whose costs do not exceed the budget.

    Args:
        units: The units, each with an option at least.
        budget: The largest sum of costs.

    Returns:
        The number of the option of each unit, or None if no choice is within the budget. Of choices with the same
        error the cheaper one is returned.
    """
    options = [_undominated(unit) for unit in units]
    if any(not len(option.costs) for option in options) or sum(int(o.costs[0]) for o in options) > budget:
        return None
    suffixes = _suffixes(options)
    best = _greedy(options, budget)
    costs, errors = np.zeros(1, np.int64), np.zeros(1)
    origins: list[tuple[_Ints, _Ints]] = []
    for option, (bound_costs, bound_errors) in zip(options, suffixes[1:], strict=True):
        all_costs = (costs[:, None] + option.costs[None, :]).reshape(-1)
        all_errors = (errors[:, None] + option.errors[None, :]).reshape(-1)
        left = budget - all_costs
        bound = all_errors + np.interp(left, bound_costs, bound_errors)
        is_hopeful = (left >= bound_costs[0]) & (bound <= best * (1 + _SLACK) + 1e-300)
        chosen = np.flatnonzero(is_hopeful)
        order = chosen[np.lexsort((all_errors[chosen], all_costs[chosen]))]
        order = order[_improves(all_errors[order])]
        costs, errors = all_costs[order], all_errors[order]
        origins.append((order // len(option.costs), option.numbers[order % len(option.costs)]))
    state = len(costs) - 1  # errors fall as costs rise
    found: list[int] = []
    for parents, numbers in reversed(origins):
        found.append(int(numbers[state]))
        state = int(parents[state])
    return found[::-1]


def cheapest(units: Sequence[Unit]) -> int:
    """Returns the least sum of costs of options with a finite error.

    Raises:
        ValueError: A unit has no such option.
    """
    return sum(min(cost for cost, error in zip(u.costs, u.errors, strict=True) if np.isfinite(error)) for u in units)


def _undominated(unit: Unit) -> _Options:
    costs, errors = np.asarray(unit.costs, np.int64), np.asarray(unit.errors, np.float64)
    order = np.lexsort((errors, costs))
    order = order[np.isfinite(errors[order])]
    order = order[_improves(errors[order])]
    return _Options(costs[order], errors[order], order.astype(np.int64))


def _improves(errors: _Floats) -> npt.NDArray[np.bool_]:
    """Returns which errors are below all that come before them."""
    if not len(errors):
        return np.zeros(0, bool)
    before = np.concatenate(([np.inf], np.minimum.accumulate(errors)[:-1]))
    return errors < before


def _hull(option: _Options) -> list[tuple[int, float]]:
    """Returns the steps along the lower convex hull of the options: (added cost, removed error), steepest first."""
    points = list(zip(option.costs.tolist(), option.errors.tolist(), strict=True))
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(after[0] - before[0], before[1] - after[1]) for before, after in itertools.pairwise(hull)]


def _is_above(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    return (first[1] - middle[1]) * (last[0] - first[0]) <= (first[1] - last[1]) * (middle[0] - first[0])


def _suffixes(options: Sequence[_Options]) -> list[tuple[_Floats, _Floats]]:
    """Returns, for the units from each one on, the least error of the linear program as a function of the cost.

    The function is given by its corners: costs, ascending, and errors.
    """
    found = [(np.zeros(1), np.zeros(1))]
    steps: list[tuple[int, float]] = []
    start_cost, start_error = 0, 0.0
    for option in reversed(options):
        steps += _hull(option)
        steps.sort(key=lambda step: step[1] / step[0], reverse=True)
        start_cost, start_error = start_cost + int(option.costs[0]), start_error + float(option.errors[0])
        costs = np.concatenate(([start_cost], start_cost + np.cumsum([c for c, _ in steps])))
        errors = np.concatenate(([start_error], start_error - np.cumsum([e for _, e in steps])))
        found.append((costs.astype(np.float64), np.maximum(errors, 0.0)))
    return found[::-1]


def _greedy(options: Sequence[_Options], budget: int) -> float:
    """Returns the error of a choice within the budget: the steepest steps first, and whatever else fits."""
    chosen = [0] * len(options)
    left = budget - sum(int(option.costs[0]) for option in options)
    while True:
        steps = [
            ((o.errors[c] - o.errors[n]) / (o.costs[n] - o.costs[c]), number, n)
            for number, (o, c) in enumerate(zip(options, chosen, strict=True))
            for n in range(c + 1, len(o.costs))
            if o.costs[n] - o.costs[c] <= left
        ]
        if not steps:
            return float(sum(o.errors[c] for o, c in zip(options, chosen, strict=True)))
        _, number, new = max(steps, key=lambda step: (step[0], -step[1], -step[2]))
        left -= int(options[number].costs[new] - options[number].costs[chosen[number]])
        chosen[number] = new
