"""The method `autoq`: a deterministic search under the constraint of NNCF's AutoQ, without reinforcement learning.

AutoQ (Lou et al., 2020, arXiv:1902.05690) trains an agent whose actions are the bits of each quantizer, which takes
hundreds of evaluations and comes out differently each time. Here the loss of the metric is measured for each group of
quantizers and each number of bits alone, the sum of these losses is made least under the same constraint (weights times
bits, as a share of 32 bits), and the evaluations of `iter_number` are spent on swaps of two groups that keep it.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from compress_core import AutoQPrecisionInitArgs, ConfigError, DataError
from compress_core.data.progress import progress, progress_bar
from compress_core.data.rng import preserved_rng
from compress_core.errors import Problem
from compress_core.transforms import raw_parameter
from compress_quantization.config import PrecisionConfig
from compress_quantization.precision.budgets import Budget
from compress_quantization.precision.dumps import dump
from compress_quantization.precision.method import ChosenBits, PrecisionMethod
from compress_quantization.precision.outputs import IN_WORDS
from compress_quantization.precision.report import FrontierPoint, PrecisionReport
from compress_quantization.precision.search import OutputErrors, PrecisionSearch
from compress_quantization.precision.sensitivity import Decision, Problems, decisions_of
from compress_quantization.profiles import Profile

logger = logging.getLogger(__name__)

_RATIO = 0.15

KEYS = (
    "bits",
    "bitwidth_assignment_mode",
    "num_data_points",
    "iter_number",
    "compression_ratio",
    "output_error",
    "eval_subset_ratio",
    "warmup_iter_number",
    "dump_init_precision_data",
    "dump_path",
)

# Bits of some quantizers, and whether all others are off -> the loss.
_Loss = Callable[[Mapping[str, int], bool], float]


def check(config: PrecisionConfig, profile: Profile) -> Iterable[Problem]:
    """Yields what is wrong with the section."""
    if config.compression_ratio is not None and config.compression_ratio > 0.25:
        yield Problem(
            "compression_ratio",
            f"{config.compression_ratio:g}: for autoq it is the size of the weights as a share of that with 32 bits, "
            "and 8 bits everywhere are 0.25; give less",
        )


def choose(search: PrecisionSearch) -> ChosenBits:
    """Returns the bits with the least loss that keep the ratio."""
    config = search.config
    search.restrict(config.bits)
    decisions = decisions_of(search, strict=config.bitwidth_assignment_mode == "strict", follow=True)
    elements = {w.name: raw_parameter(search.model, w.parameter).numel() for w in search.weights}
    ratio = _RATIO if config.compression_ratio is None else config.compression_ratio
    unit = "size of the weights as a share of 32 bits"
    size = 32.0 * sum(elements.values())
    budget = Budget("compression_ratio", unit, ratio, lambda w, b, a: elements[w.name] * b, size)
    with search.forwards():
        loss, words, samples = _loss(search)
        shown = progress(decisions, "precision search: loss of each group", unit="group")
        measured = [[loss(option, True) for option in decision.options] for decision in shown]
        if samples:  # a metric is coarse, and losses of zero are common
            silent = [str(d.group) for d, found in zip(decisions, measured, strict=True) if not any(found)]
            search.warn_of_no_effect(silent)
        problem = Problems(search, decisions, _comparable(search, decisions, measured), budget)
        bits = problem.solve(ratio)
        if bits is None:
            raise budget.refusal(*problem.reach, search.path)
        first = dict(bits)
        bits, tried, kept = _swapped(search, decisions, problem, bits, loss)
    points = [
        FrontierPoint(ratio, budget.used(problem.cost(found)), _sum(decisions, measured, found), None, found == bits)
        for found in ([first] if first == bits else [first, bits])
    ]
    report = PrecisionReport("autoq", unit, words, samples, tuple(points))
    subset = "" if samples == 0 else "no effect: without autoq_eval_fn, num_data_points says how many samples are used"
    if subset and "eval_subset_ratio" in config.model_fields_set:
        logger.warning("%s.eval_subset_ratio: has %s", search.path, subset)
    effects = {
        "eval_subset_ratio": subset or f"evaluated on {config.eval_subset_ratio:g} of the batches",
        "type": "answered by a deterministic search over measured sensitivities, without an agent",
        "compression_ratio": f"kept: {budget.used(problem.cost(bits)):.6g} {unit}",
        "iter_number": f"{tried} evaluations of swaps, of which {kept} were better",
        "warmup_iter_number": "no effect: there is no random policy to start from",
    }
    values = {"precision": report.to_dict(), "bits": bits}
    return ChosenBits(bits, effects | dump(search, values), report)


def _comparable(
    search: PrecisionSearch, decisions: Sequence[Decision], losses: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Returns losses that are not negative and do not fall with fewer bits; of equal ones, that of more bits is less.

    A metric such as accuracy is coarse: many losses are the same, or below zero by luck, and bits that cost nothing by
    it alone may cost a lot together. Among equal ones the square of the rounding decides, a fourth for each bit more:
    so 4 bits everywhere come before 8 bits here and 2 bits there.
    """
    finite = [abs(loss) for found in losses for loss in found if math.isfinite(loss)]
    tie = 1e-6 * max(finite, default=0.0) or 1e-6
    found = []
    for decision, own in zip(decisions, losses, strict=True):
        highest, rising = 0.0, []
        for option, loss in zip(reversed(decision.options), reversed(own), strict=True):  # ascending by bits
            highest = max(highest, loss)
            rising.append(highest + tie * sum(0.25 ** option[name] for name in decision.group.weights))
        found.append(rising[::-1])
    return found


def _sum(decisions: Sequence[Decision], errors: Sequence[Sequence[float]], bits: Mapping[str, int]) -> float:
    total = 0.0
    for decision, found in zip(decisions, errors, strict=True):
        total += found[_number(decision, bits)]
    return total


def _number(decision: Decision, bits: Mapping[str, int]) -> int:
    return next(n for n, option in enumerate(decision.options) if all(bits[k] == b for k, b in option.items()))


# The loss.


def _loss(search: PrecisionSearch) -> tuple[_Loss, str, int]:
    """Returns the loss, what it is in words, and the number of samples of the data (0 for a metric of the user's)."""
    given = search.given(AutoQPrecisionInitArgs)
    if given is None or given.eval_fn is None:
        errors = OutputErrors(search, search.config.num_data_points)
        return lambda bits, alone: errors.measure(bits, alone=alone), IN_WORDS[errors.kind], errors.samples
    for key in ("num_data_points", "output_error"):
        if key in search.config.model_fields_set:
            raise ConfigError(
                "has no effect with autoq_eval_fn, which measures on its own loader; remove it",
                path=f"{search.path}.{key}",
            )
    metric = _Metric(search, given)
    with search.quantized(alone=True):
        best = metric.value()
    if not math.isfinite(best):
        raise DataError(f"{search.path}: autoq_eval_fn must return a finite number for the unquantized model")

    def lost(bits: Mapping[str, int], alone: bool) -> float:
        with search.quantized(bits, alone=alone):
            return best - metric.value()

    return lost, "loss of the metric", 0


class _Metric:
    def __init__(self, search: PrecisionSearch, given: AutoQPrecisionInitArgs) -> None:
        assert given.eval_fn is not None
        self._search, self._eval = search, given.eval_fn
        self._loader = _part(given.data_loader, search.config.eval_subset_ratio, search.path)

    def value(self) -> float:
        with preserved_rng(self._loader):
            found = self._eval(self._search.model, self._loader)
        try:
            value = float(found)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self._search.path}: autoq_eval_fn must return a number, got {type(found).__name__}"
            ) from error
        finally:
            self._search.model.eval()
        return -math.inf if math.isnan(value) or value == math.inf else value


def _part(loader: Any, ratio: float, path: str) -> Any:
    """Returns a loader with the first batches of another one.

    Raises:
        DataError: It can be read only once, or has no length.
    """
    if isinstance(loader, Iterator):
        raise DataError(f"{path}: autoq evaluates many times, and the loader can be read only once; give a DataLoader")
    if ratio == 1.0:
        return loader
    try:
        number = len(loader)
    except TypeError as error:
        raise DataError(
            f"{path}.eval_subset_ratio: the loader has no length, so that its part is not defined; remove the key"
        ) from error
    return Part(loader, max(1, math.ceil(ratio * number - 1e-9)))


class Part:
    """The first batches of a loader; attributes are those of the loader.

    Args:
        loader: The loader.
        batches: Number of batches.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self._loader, self._batches = loader, batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._batches)

    def __len__(self) -> int:
        return self._batches

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


# Swaps.


def _swapped(
    search: PrecisionSearch, decisions: Sequence[Decision], problem: Problems, bits: dict[str, int], loss: _Loss
) -> tuple[dict[str, int], int, int]:
    """Returns the bits after swaps that lower the measured loss, the number of evaluations, and that of better ones.

    A swap gives one group its next larger number and another one its next smaller number. Those with the least
    predicted loss come first, and none is tried twice.
    """
    budget = search.config.iter_number or 0
    if not budget:
        return bits, 0, 0
    best, tried, kept, seen = loss(bits, False), 1, 0, {_key(bits)}
    with progress_bar("precision search: swaps", budget, unit="evaluation", done=tried) as bar:
        while tried < budget:
            found = next((s for s in _swaps(decisions, problem, bits) if _key(s) not in seen), None)
            if found is None:
                break
            seen.add(_key(found))
            value, tried = loss(found, False), tried + 1
            bar.update()
            if value < best:
                best, bits, kept = value, found, kept + 1
    return bits, tried, kept


def _key(bits: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(bits.items()))


def _swaps(decisions: Sequence[Decision], problem: Problems, bits: Mapping[str, int]) -> list[dict[str, int]]:
    """Returns the swaps that keep the budget, those with the least predicted loss first."""
    found = []
    numbers = [_number(decision, bits) for decision in decisions]
    for up, down in itertools.permutations(range(len(decisions)), 2):
        if numbers[up] + 1 < len(decisions[up].options) and numbers[down] > 0:
            changed = dict(bits)
            changed |= decisions[up].options[numbers[up] + 1]
            changed |= decisions[down].options[numbers[down] - 1]
            if problem.keeps(changed) and math.isfinite(problem.predicted(changed)):
                found.append(changed)
    return sorted(found, key=problem.predicted)


# Documents of NNCF name the method for devices with 8 bits alone, where NNCF leaves everything as it is.
METHOD = PrecisionMethod(choose, KEYS, check, needs_choice=False)
