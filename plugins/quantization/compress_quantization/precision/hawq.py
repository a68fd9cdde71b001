"""The method `hawq`: numbers of bits from traces of the Hessian (HAWQ-V2, Dong et al., 2020, arXiv:1911.03852).

Layers are ordered by the mean trace of the Hessian of the loss, and only sequences in which the bits do not fall along
this order are compared: the metric of one is the sum of trace times squared change of the weight.

Without a criterion the loss is the divergence of the output from that of the unquantized model; it needs no labels,
and at its minimum the Hessian is the Gauss-Newton (Fisher) matrix, which has no negative part.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress_core import ConfigError, DataError, QuantizationPrecisionInitArgs
from compress_core.data.structures import moved
from compress_core.errors import Problem
from compress_core.transforms import raw_parameter
from compress_quantization.config import PrecisionConfig
from compress_quantization.plan import BitsChoice
from compress_quantization.precision.budgets import budget_of
from compress_quantization.precision.dumps import dump, read_traces
from compress_quantization.precision.hessian import Traces, gauss_newton_traces, hessian_traces
from compress_quantization.precision.method import ChosenBits, PrecisionMethod
from compress_quantization.precision.outputs import IN_WORDS, ErrorKind, check_number, norms
from compress_quantization.precision.report import FrontierPoint, PrecisionReport
from compress_quantization.precision.search import PrecisionSearch
from compress_quantization.precision.targets import target_of
from compress_quantization.profiles import Profile

logger = logging.getLogger(__name__)

_RATIO = 1.5
_ITERATIONS = 200
_MOST_SEQUENCES = 300_000
_MOST_POINTS = 40

KEYS = (
    "bits",
    "bitwidth_assignment_mode",
    "num_data_points",
    "iter_number",
    "tolerance",
    "compression_ratio",
    "budget",
    "output_error",
    "traces_per_layer_path",
    "dump_init_precision_data",
    "dump_path",
)
# Keys of the computation of traces, which is left out where they are read from a file.
_OF_TRACES = ("num_data_points", "iter_number", "tolerance", "output_error")

_Bits = npt.NDArray[np.int64]


def check(config: PrecisionConfig, profile: Profile) -> Iterable[Problem]:
    """Yields what is wrong with the section."""
    if config.budget is not None and config.compression_ratio is not None:
        yield Problem("budget", "stands beside compression_ratio, and both limit the choice; remove one of the two")
    if config.iter_number == 0:
        yield Problem("iter_number", "0 computes no trace; give 1 or more, or leave it out")
    given = [key for key in _OF_TRACES if key in config.model_fields_set] if config.traces_per_layer_path else []
    for key in given:
        yield Problem(key, "has no effect where traces_per_layer_path gives the traces; remove it")


def choose(search: PrecisionSearch) -> ChosenBits:
    """Returns the bits with the least metric that are compressed enough."""
    config = search.config
    search.restrict(_without_excessive(search))
    candidates = [weight for weight in search.weights if len(weight.options) > 1]
    traces, effects = _traces(search, candidates)
    changes = {weight.name: _changes(search, weight) for weight in candidates}
    order = sorted(range(len(candidates)), key=lambda number: (traces[number], number))
    sequences = _sequences([candidates[number] for number in order], search)
    metric = sum(
        traces[number] * np.array([changes[candidates[number].name][b] for b in range(9)])[sequences[:, place]]
        for place, number in enumerate(order)
    )
    columns = {candidates[number].name: sequences[:, place] for place, number in enumerate(order)}
    bits, allowed = _all_bits(search, columns, strict=config.bitwidth_assignment_mode == "strict")
    limit = _Limit(search)
    costs = limit.costs({name: column[allowed] for name, column in bits.items()})
    fits = np.flatnonzero(limit.fits(costs))
    if not len(fits):
        raise limit.refusal(costs)
    metrics = np.asarray(metric)[allowed]
    best = fits[np.lexsort((fits, metrics[fits]))[0]]
    chosen = {name: int(column[allowed][best]) for name, column in bits.items()}
    report = _report(search, limit, costs, metrics, int(best))
    effects |= limit.effect(float(costs[best]), len(costs))
    traced = {weight.name: trace for weight, trace in zip(candidates, traces, strict=True)}
    files = {"traces": traced, "changes": {n: v[2:] for n, v in changes.items()}, "precision": report.to_dict()}
    return ChosenBits(chosen, effects | dump(search, files | {"bits": chosen}), report)


def _without_excessive(search: PrecisionSearch) -> list[int]:
    """Returns the bits to choose from, without those of weights that no activation can have.

    That is where the device offers a choice for activations; where these have one number of bits, weights are free.
    """
    wanted = list(search.config.bits)
    offers = [set(choice.options) & set(wanted) for choice in search.activations if len(choice.options) > 1]
    offered = set().union(*offers)
    return [bits for bits in wanted if bits in offered] or wanted if offered else wanted


# Traces.


def _traces(search: PrecisionSearch, candidates: Sequence[BitsChoice]) -> tuple[list[float], dict[str, str]]:
    """Returns the mean trace of each weight, per element, and what the keys did."""
    config = search.config
    if config.traces_per_layer_path is not None:
        names = [weight.name for weight in candidates]
        found = read_traces(config.traces_per_layer_path, names, f"{search.path}.traces_per_layer_path")
        return found, {"traces_per_layer_path": f"traces of {len(found)} weights"}
    weights = [raw_parameter(search.model, weight.parameter) for weight in candidates]
    iterations = _ITERATIONS if config.iter_number is None else config.iter_number
    with search.forwards(), search.quantized(alone=True):
        batches = search.batches(config.num_data_points)
        total = sum(size for _, size in batches)
        given = _given_criterion(search)
        if given is not None:
            words, loss = "the criterion", functools.partial(_criterion, search, given)
            losses = [(functools.partial(loss, batch), size / total) for batch, size in batches]
            traces = hessian_traces(weights, losses, iterations=iterations, tolerance=config.tolerance)
        else:
            kind, share, scales = _measured(search, [batch for batch, _ in batches])
            words = IN_WORDS[kind]
            outputs = [(functools.partial(_scaled, search, batch, scales), share) for batch, _ in batches]
            traces = gauss_newton_traces(weights, outputs, kind, iterations=iterations, tolerance=config.tolerance)
    search.warn_of_no_effect([w.name for w, trace in zip(candidates, traces.values, strict=True) if trace == 0])
    negative = [w.name for w, trace in zip(candidates, traces.values, strict=True) if trace < 0]
    if negative:
        logger.warning(
            "%s: the estimated traces of %d weights are negative, such as that of '%s', and count as zero: they get "
            "few bits. That is noise of few random vectors, or a loss far from its minimum; raise iter_number, or "
            "register no criterion, with which no estimate is negative",
            search.path,
            len(negative),
            negative[0],
        )
    effects = {
        "num_data_points": f"traces on {total} samples, of {words}",
        "iter_number": f"{traces.iterations} random vectors",
        "tolerance": _reached(traces, config.tolerance),
        "output_error": words,
    }
    # A negative trace, which a criterion can have far from its minimum, is no reason to change a weight.
    means = [max(t, 0.0) / weight.numel() for t, weight in zip(traces.values, weights, strict=True)]
    return means, effects


def _reached(traces: Traces, tolerance: float) -> str:
    reached = "reached" if traces.error < tolerance else "not reached"
    return f"{reached}: the standard error of the sum of traces is {traces.error:.2g} of it"


def _given_criterion(search: PrecisionSearch) -> QuantizationPrecisionInitArgs | None:
    given: QuantizationPrecisionInitArgs | None = search.given(QuantizationPrecisionInitArgs)
    if given is None or (given.criterion is None and given.criterion_fn is None):
        return None
    if "output_error" in search.config.model_fields_set:
        raise ConfigError(
            "has no effect with a criterion, whose Hessian is used; remove one of the two",
            path=f"{search.path}.output_error",
        )
    return given


@torch.no_grad()
def _measured(search: PrecisionSearch, batches: Sequence[Any]) -> tuple[ErrorKind, float, list[float]]:
    """Returns the error's kind, 1 / the number of its samples or positions, and what each output is divided by."""
    kind: ErrorKind | None = None
    rows = 0.0
    sizes: list[int] = []
    found: list[list[float]] = []
    for batch in batches:
        outputs = search.outputs(batch)
        kind = kind or search.error_kind(outputs, auto="kl")
        rows += sum(t.numel() / t.shape[1] if kind == "kl" else t.shape[0] if t.ndim else 1 for t in outputs)
        sizes = sizes or [0] * len(outputs)
        check_number(len(sizes), len(outputs))
        sizes = [size + tensor.numel() for size, tensor in zip(sizes, outputs, strict=True)]
        found.append(norms(outputs))
    assert kind is not None, "there is a batch at least"
    if kind == "kl":
        return kind, 1.0 / rows, [1.0] * len(sizes)
    roots = [math.hypot(*norm) / size**0.5 for norm, size in zip(zip(*found, strict=True), sizes, strict=True)]
    return kind, 1.0 / rows, [root or 1.0 for root in roots]  # one of zeros counts by its change


def _scaled(search: PrecisionSearch, batch: Any, scales: Sequence[float]) -> list[torch.Tensor]:
    """Returns the outputs for a batch, each in units of its root mean square: so none hides the others."""
    outputs = search.outputs(batch)
    return [tensor / scale for tensor, scale in zip(outputs, scales, strict=True)]


def _criterion(search: PrecisionSearch, given: QuantizationPrecisionInitArgs, batch: Any) -> torch.Tensor:
    target = target_of(search.data.loader, batch, search.path)
    device = next((parameter.device for parameter in search.model.parameters()), torch.device("cpu"))
    target = moved(target, given.device or device, copied=True)
    output = search.raw_output(batch)
    loss = given.criterion(output, target) if given.criterion_fn is None else None
    if given.criterion_fn is not None:
        loss = given.criterion_fn(output, target, given.criterion)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise DataError(f"{search.path}: the criterion must return a scalar that depends on the output, got {what}")
    return loss.reshape(())


@torch.no_grad()
def _changes(search: PrecisionSearch, weight: BitsChoice) -> list[float]:
    """Returns the squared change of a weight by quantization to 0 to 8 bits; infinite where it cannot have them."""
    with search.quantized(alone=True):
        plain = search.weight(weight.name).double()
    found = [math.inf] * 9
    for bits in weight.options:
        with search.quantized({weight.name: bits}, alone=True):
            found[bits] = float((search.weight(weight.name).double() - plain).square().sum())
    return found


# Assignments.


def _sequences(candidates: Sequence[BitsChoice], search: PrecisionSearch) -> _Bits:
    """Returns all assignments whose bits do not fall along the order, one in each row; weights in columns.

    A weight that cannot have a number of bits has the nearest one that it can have, of two the larger one.

    Raises:
        ConfigError: There are too many.
    """
    widths = sorted({bits for weight in candidates for bits in weight.options})
    number = math.comb(len(candidates) + len(widths) - 1, len(widths) - 1)
    if number > _MOST_SEQUENCES:
        raise ConfigError(
            f"{len(widths)} numbers of bits for {len(candidates)} weights make {number} assignments to compare; give "
            "fewer numbers, or use the type 'sensitivity'",
            path=f"{search.path}.bits",
        )
    steps = itertools.combinations_with_replacement(range(len(candidates) + 1), len(widths) - 1)
    ends = np.array(list(steps), np.int64).reshape(number, len(widths) - 1)
    level = (np.arange(len(candidates))[None, :, None] >= ends[:, None, :]).sum(2)
    nearest = [
        [min(weight.options, key=lambda own: (abs(own - bits), -own)) for bits in widths] for weight in candidates
    ]
    columns = [np.array(own)[level[:, place]] for place, own in enumerate(nearest)]
    return np.unique(np.stack(columns, 1), axis=0)


def _all_bits(
    search: PrecisionSearch, columns: Mapping[str, _Bits], *, strict: bool
) -> tuple[dict[str, _Bits], npt.NDArray[np.bool_]]:
    """Returns the bits of all weights and of the activations in front of them, and which assignments are allowed.

    Raises:
        ConfigError: The mode is strict, and no assignment has the same bits in each group.
    """
    count = len(next(iter(columns.values())))
    now = search.bits_now
    bits = {w.name: columns.get(w.name, np.full(count, now[w.name])) for w in search.weights}
    allowed = np.ones(count, bool)
    for group in search.groups:
        own = np.stack([bits[name] for name in group.weights], 1)
        for name in group.activations:
            bits[name] = _activation_bits(own, sorted(search.choice(name).options))
        if strict:
            everything = np.stack([bits[name] for name in (*group.weights, *group.activations)], 1)
            allowed &= (everything == everything[:, :1]).all(1)
    if not allowed.any():
        raise ConfigError(
            "the mode is strict, and no assignment gives all quantizers that feed one operator, or share an "
            "activation, the same number of bits; set \"liberal\", or more numbers in 'bits'",
            path=f"{search.path}.bitwidth_assignment_mode",
        )
    return bits, allowed


def _activation_bits(weights: _Bits, options: Sequence[int]) -> _Bits:
    """Returns the bits of an activation: the least that a weight of its group has and it can have, else its least."""
    found = np.full(len(weights), options[0])
    for option in reversed(options):
        found = np.where((weights == option).any(1), option, found)
    return found


class _Limit:
    """What an assignment may cost: `compression_ratio`, or a budget in its place."""

    def __init__(self, search: PrecisionSearch) -> None:
        config, self._search = search.config, search
        self._path = search.path
        self._budget = (
            None
            if config.budget is None
            else budget_of(config.budget, search.weights, search.model, f"{search.path}.budget")
        )
        self._ratio = _RATIO if config.compression_ratio is None else config.compression_ratio
        self.unit = "compression ratio of the bit complexity" if self._budget is None else self._budget.unit

    def costs(self, bits: Mapping[str, _Bits]) -> npt.NDArray[np.float64]:
        """Returns, for each assignment, its ratio, or its cost in the unit of the budget."""
        weights = self._search.weights
        if self._budget is not None:
            count = len(next(iter(bits.values())))
            kinds = [np.stack([bits[n] for n in (w.name, *w.inputs)], 1) for w in weights]
            total = np.zeros(count)
            for weight, columns in zip(weights, kinds, strict=True):
                rows, inverse = np.unique(columns, axis=0, return_inverse=True)
                names = (weight.name, *weight.inputs)
                costs = [self._budget.cost([weight], dict(zip(names, map(int, row), strict=True))) for row in rows]
                total += np.array(costs, np.float64)[inverse.reshape(-1)]
            return np.array([self._budget.used(int(cost)) for cost in total])
        work = sum(8 * weight.multiplications for weight in weights)
        if not work:
            raise ConfigError("the model multiplies no activation with a quantized weight", path=self._path)
        spent = sum(
            np.max(np.stack([bits[n] for n in (w.name, *w.inputs)], 1), 1) * float(w.multiplications) for w in weights
        )
        return np.asarray(work / spent)

    def fits(self, costs: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Returns which assignments are compressed enough."""
        if self._budget is not None:
            return np.asarray(costs <= self._budget.value * (1 + 1e-12), bool)
        reachable = costs.min() - 1e-9 <= self._ratio
        return np.asarray(reachable & (costs >= self._ratio * (1 - 1e-12)), bool)

    def refusal(self, costs: npt.NDArray[np.float64]) -> ConfigError:
        """Returns the error for a limit that no assignment keeps, or that all more than keep."""
        if self._budget is not None:
            return ConfigError(
                f"{self._budget.value:g} cannot be kept: the assignments that are compared have {self.unit} from "
                f"{costs.min():.4g} to {costs.max():.4g}",
                path=f"{self._path}.budget.{self._budget.name}",
            )
        hint = (
            '. Activations with one number of bits limit it: set "budget" in its place, such as {"average_bits": 4}'
            if costs.max() - costs.min() < 1e-9
            else ""
        )
        return ConfigError(
            f"{self._ratio:g} cannot be reached: the assignments that are compared have ratios from {costs.min():.4g} "
            f"to {costs.max():.4g}{hint}",
            path=f"{self._path}.compression_ratio",
        )

    def effect(self, cost: float, number: int) -> dict[str, str]:
        """Returns what the limit did."""
        key = "compression_ratio" if self._budget is None else f"budget.{self._budget.name}"
        return {key: f"kept: {cost:.6g}, the least metric of {number} assignments"}


def _report(
    search: PrecisionSearch,
    limit: _Limit,
    costs: npt.NDArray[np.float64],
    metrics: npt.NDArray[np.float64],
    best: int,
) -> PrecisionReport:
    """Returns the choices that no other one beats in both cost and metric, and the choice itself."""
    is_ratio = search.config.budget is None
    order = np.lexsort((metrics, -costs if is_ratio else costs))
    lowest = np.concatenate(([np.inf], np.minimum.accumulate(metrics[order])[:-1]))
    front = order[metrics[order] < lowest]
    spread = {int(front[i]) for i in np.linspace(0, len(front) - 1, min(len(front), _MOST_POINTS)).astype(int)}
    numbers = sorted(spread | {best}, key=lambda number: (float(costs[number]), number))
    points = tuple(FrontierPoint(float(costs[n]), float(costs[n]), float(metrics[n]), None, n == best) for n in numbers)
    return PrecisionReport("hawq", limit.unit, "trace times squared change of the weights", 0, points)


# Documents of NNCF name the method for devices with 8 bits alone, where NNCF leaves everything as it is.
METHOD = PrecisionMethod(choose, KEYS, check, needs_choice=False)
