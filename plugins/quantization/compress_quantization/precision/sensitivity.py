"""The method `sensitivity`: the bits with the least error of the output within a budget, without labels.

For each group of weights that share an activation, and each number of bits that these can have, the error of the
output is measured with that group alone quantized. Errors of single groups are small and hardly correlated, so their
sum predicts the error of all together (second-order expansion, as in Dong et al., 2020, arXiv:1911.03852, with measured
terms in place of the Hessian's), and the choice is a knapsack problem, which is solved exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress_core import ConfigError, StateError
from compress_core.data.progress import progress
from compress_core.errors import Problem
from compress_quantization.config import PrecisionConfig
from compress_quantization.plan import BitsChoice
from compress_quantization.precision.budgets import Budget, budget_of
from compress_quantization.precision.dumps import dump
from compress_quantization.precision.knapsack import Unit, cheapest, solve
from compress_quantization.precision.method import ChosenBits, PrecisionMethod
from compress_quantization.precision.outputs import IN_WORDS
from compress_quantization.precision.report import FrontierPoint, PrecisionReport
from compress_quantization.precision.search import Group, OutputErrors, PrecisionSearch
from compress_quantization.profiles import Profile

KEYS = (
    "bits",
    "bitwidth_assignment_mode",
    "num_data_points",
    "budget",
    "output_error",
    "frontier_points",
    "sensitivities_path",
    "dump_init_precision_data",
    "dump_path",
)


@dataclass(frozen=True)
class Decision:
    """Quantizers that get the same number of bits, or each its only one.

    Attributes:
        group: The group.
        options: The bits of each of its quantizers, one entry for each number that can be chosen.
    """

    group: Group
    options: tuple[Mapping[str, int], ...]


def check(config: PrecisionConfig, profile: Profile) -> Iterable[Problem]:
    """Yields what is wrong with the section."""
    if config.budget is None:
        yield Problem(
            "budget",
            'is required for the type \'sensitivity\': {"average_bits": 4}, {"bit_operations": 0.25} or {"file_size": '
            "2.5}",
        )
    if config.sensitivities_path is not None and config.frontier_points == 0:
        for key in ("num_data_points", "output_error"):
            if key in config.model_fields_set:
                yield Problem(key, "has no effect where sensitivities_path gives the errors; remove it")


def choose(search: PrecisionSearch) -> ChosenBits:
    """Returns the bits with the least predicted error within the budget."""
    config = search.config
    search.restrict(config.bits if "bits" in config.model_fields_set else None)
    _ = config.bits
    decisions = decisions_of(search, strict=config.bitwidth_assignment_mode == "strict")
    assert config.budget is not None, "check() refuses this"
    budget = budget_of(config.budget, search.weights, search.model, f"{search.path}.budget")
    saved = None if config.sensitivities_path is None else _read(search, decisions, config.sensitivities_path)
    points: list[FrontierPoint] = []
    if saved is None or config.frontier_points:
        with search.forwards():
            errors = OutputErrors(search, config.num_data_points)
            if saved and saved[0][0] != IN_WORDS[errors.kind]:
                raise ConfigError(
                    f"'{config.sensitivities_path}' holds another error ({saved[0][0]}); set output_error as it was",
                    path=f"{search.path}.sensitivities_path",
                )
            shown = progress(decisions, "precision search: error of each group", unit="group")
            measured = saved[1] if saved else [[errors.measure(o, alone=True) for o in d.options] for d in shown]
            problem, bits = _solved(search, decisions, measured, budget)
            points = problem.frontier(errors, config.frontier_points, bits)
        kind, samples = IN_WORDS[errors.kind], errors.samples
    else:
        (kind, samples), measured = saved
        problem, bits = _solved(search, decisions, measured, budget)
    report = PrecisionReport(
        "sensitivity",
        budget.unit,
        kind,
        samples,
        tuple(points),
        {str(d.group): _by_bits(d, found) for d, found in zip(decisions, measured, strict=True)},
    )
    effects = {
        "num_data_points": f"errors of the output measured on {samples} samples",
        "output_error": kind,
        "sensitivities_path": "errors measured before",
        f"budget.{budget.name}": f"kept: {budget.used(problem.cost(bits)):.6g} {budget.unit}, by dynamic programming",
        "frontier_points": f"{len(points)} points of the frontier, in statistics and controller.precision_report",
    }
    return ChosenBits(bits, effects | dump(search, {"precision": report.to_dict(), "bits": dict(bits)}), report)


def _solved(
    search: PrecisionSearch, decisions: Sequence[Decision], measured: Sequence[Sequence[float]], budget: Budget
) -> tuple[Problems, dict[str, int]]:
    problem = Problems(search, decisions, measured, budget)
    search.warn_of_no_effect([str(d.group) for d, found in zip(decisions, measured, strict=True) if not any(found)])
    bits = problem.solve(budget.value)
    if bits is None:
        raise budget.refusal(*problem.reach, f"{search.path}.budget")
    return problem, bits


def _read(
    search: PrecisionSearch, decisions: Sequence[Decision], path: str
) -> tuple[tuple[str, int], list[list[float]]]:
    """Returns what errors are, the number of samples, and the error of each option, from a file that `dump` wrote."""
    where = f"{search.path}.sensitivities_path"
    try:
        report = PrecisionReport.from_dict(json.loads(Path(path).read_text("utf-8")), path)
    except (OSError, ValueError, StateError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"'{path}' holds no measured errors: {reason}", path=where) from error
    found = []
    for decision in decisions:
        errors = report.sensitivities.get(str(decision.group), {})
        widths = [option[decision.group.weights[0]] for option in decision.options]
        if absent := [bits for bits in widths if bits not in errors]:
            raise ConfigError(
                f"'{path}' has no error of '{decision.group}' with {absent[0]} bits: it is of another model, other "
                "settings, or the output was not finite; measure again",
                path=where,
            )
        found.append([errors[bits] for bits in widths])
    return (report.error, report.samples), found


def _by_bits(decision: Decision, errors: Sequence[float]) -> dict[int, float]:
    weight = decision.group.weights[0]
    found = zip(decision.options, errors, strict=True)
    return {option[weight]: error for option, error in found if math.isfinite(error)}


def decisions_of(search: PrecisionSearch, *, strict: bool, follow: bool = False) -> list[Decision]:
    """Returns what has to be decided: the weights of a group have the same number of bits.

    Args:
        search: The search.
        strict: Whether the activations of the group have this number as well.
        follow: Whether they have it where they can, and else the next larger one that they can have.

    Raises:
        ConfigError: There is no number of bits that all quantizers of a group can have.
    """
    found = []
    for group in search.groups:
        names = [*group.weights, *(group.activations if strict else ())]
        members = [search.choice(name) for name in names]
        free = [member for member in members if len(member.options) > 1] if not strict else members
        common = sorted(set.intersection(*(set(m.options) for m in free or members[:1])))
        if not common:
            offers = ", ".join(f"'{member.name}' {sorted(member.options)}" for member in free)
            raise ConfigError(
                f"quantizers that feed one operator, or read one activation, must have the same number of bits, and "
                f"there is none that all can have: {offers}. Change 'bits' or scope_overrides",
                path=f"{search.path}.bitwidth_assignment_mode",
            )
        fixed = {m.name: next(iter(m.options)) for m in members if m not in free}
        options = [
            fixed | {member.name: bits for member in free} | (_following(search, group, bits) if follow else {})
            for bits in (common if free else [fixed[members[0].name]])
        ]
        found.append(Decision(group, tuple(options)))
    return found


def _following(search: PrecisionSearch, group: Group, bits: int) -> dict[str, int]:
    found = {}
    for name in group.activations:
        options = sorted(search.choice(name).options)
        found[name] = next((number for number in options if number >= bits), options[-1])
    return found


class Problems:
    """The knapsack problems of measured decisions, one for each budget.

    Args:
        search: The search.
        decisions: The decisions.
        errors: The error of each option of each decision.
        budget: What options cost.
    """

    def __init__(
        self, search: PrecisionSearch, decisions: Sequence[Decision], errors: Sequence[Sequence[float]], budget: Budget
    ) -> None:
        self._search, self._decisions, self._budget = search, decisions, budget
        now = search.bits_now
        self._units = [
            Unit([budget.cost(_weights(search, decision), now | dict(option)) for option in decision.options], found)
            for decision, found in zip(decisions, errors, strict=True)
        ]
        for decision, unit in zip(decisions, self._units, strict=True):
            if not any(math.isfinite(error) for error in unit.errors):
                raise ConfigError(
                    f"the output is not finite with any number of bits that '{decision.group}' can have; name it in "
                    "ignored_scopes",
                    path=search.path,
                )

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the largest cost."""
        return cheapest(self._units), sum(max(unit.costs) for unit in self._units)

    def solve(self, value: float) -> dict[str, int] | None:
        """Returns the bits with the least error for a budget in the config's unit; None if it cannot be kept."""
        found = solve(self._units, self._budget.limit(value))
        if found is None:
            return None
        chosen = [decision.options[number] for decision, number in zip(self._decisions, found, strict=True)]
        return {name: bits for option in chosen for name, bits in option.items()}

    def cost(self, bits: Mapping[str, int]) -> int:
        """Returns the cost of all weights."""
        return self._budget.cost(self._search.weights, self._search.bits_now | dict(bits))

    def keeps(self, bits: Mapping[str, int]) -> bool:
        """Returns whether these bits keep the budget of the config."""
        return self.cost(bits) <= self._budget.limit(self._budget.value)

    def predicted(self, bits: Mapping[str, int]) -> float:
        """Returns the sum of the errors of all decisions."""
        total = 0.0
        for decision, unit in zip(self._decisions, self._units, strict=True):
            number = next(n for n, o in enumerate(decision.options) if all(bits[name] == b for name, b in o.items()))
            total += unit.errors[number]
        return total

    def frontier(self, errors: OutputErrors, count: int, chosen: Mapping[str, int]) -> list[FrontierPoint]:
        """Returns the best choices for budgets from the least to the largest, and the choice itself; none if 0."""
        if not count:
            return []
        others = {a.name for a in self._search.activations} - {n for d in self._decisions for n in d.options[0]}
        rest = errors.measure({name: self._search.bits_now[name] for name in others}, alone=True)
        least, most = (self._budget.used(cost) for cost in self.reach)
        values = [float(v) for v in np.linspace(least, most, count)]
        found: dict[tuple[tuple[str, int], ...], FrontierPoint] = {}
        wanted = sorted([*values, self._budget.value])
        for value in progress(wanted, "precision search: frontier", unit="budget"):
            bits = self.solve(value * (1 + 1e-12))
            key = () if bits is None else tuple(sorted(bits.items()))
            if bits is None or key in found:
                continue
            used, predicted = self._budget.used(self.cost(bits)), self.predicted(bits) + rest
            found[key] = FrontierPoint(value, used, predicted, _finite(errors.measure(bits)), bits == dict(chosen))
        return list(found.values())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weights(search: PrecisionSearch, decision: Decision) -> list[BitsChoice]:
    return [search.choice(name) for name in decision.group.weights]


METHOD = PrecisionMethod(choose, KEYS, check)
