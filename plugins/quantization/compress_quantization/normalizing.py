"""Finds normalizations that are written out, such as an RMS norm, which runtimes compute as one operator."""

from __future__ import annotations

from collections.abc import Container

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import ValueId
from compress_quantization.operators import (
    ARITHMETIC_KINDS,
    base_name,
    is_activation,
    is_data_argument,
    is_transparent,
    kind_of,
    reads_values,
)

# A statistic of a normalization takes at most this many calls.
_LONGEST_STATISTIC = 12

_REDUCTIONS = frozenset(
    ["mean", "sum", "norm", "vector_norm", "var", "std", "var_mean", "std_mean", "max", "amax", "min", "amin"]
)
_CASTS = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as"])
_ELEMENTWISE = frozenset(["pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "exp"]) | _CASTS


def reads_inside_normalizations(forward: ForwardTrace, constants: Container[ValueId]) -> set[tuple[int, ValueId]]:
    """Returns which calls read which values inside of normalizations; none of these reads demands a quantizer.

    A normalization subtracts a statistic of a tensor from that tensor, or multiplies or divides by one: x - mean(x),
    x / norm(x), x * rsqrt(mean(x * x) + eps), and the two after each other. The tensor itself can be quantized, for the
    last call.

    Args:
        forward: The trace of a forward.
        constants: Values that do not depend on inputs of the model.
    """
    found = _Normalizations(forward, constants)
    for call in forward.calls:
        found.visit(call)
    return found.inside


class _Normalizations:
    def __init__(self, forward: ForwardTrace, constants: Container[ValueId]) -> None:
        self._forward = forward
        self._constants = constants
        # Result of a normalization -> the values that it normalizes.
        self._normalized: dict[ValueId, set[ValueId]] = {}
        self.inside: set[tuple[int, ValueId]] = set()

    def visit(self, call: Call) -> None:
        """Records the reads inside of the normalization that ends in a call, if one does."""
        data = self._data(call)
        kind = kind_of(call.function)
        if kind not in ("mul", "div", "sub") or len(data) != 2 or data[0] == data[1]:
            return
        for tensor, statistic in (data, data[::-1]) if kind == "mul" else (data,):
            starts = self._starts(tensor)
            calls = self._statistic(statistic, starts)
            if not calls:
                continue
            reads = {(other.index, value) for other in calls for value in self._data(other)}
            self.inside |= reads | {(call.index, statistic)}
            if tensor in self._normalized or tensor not in {value for _, value in reads}:
                self.inside.add((call.index, tensor))  # it has been scaled or normalized since, as part of this
            self._normalized |= dict.fromkeys(call.results, starts)
            return

    def _data(self, call: Call) -> list[ValueId]:
        return [
            value
            for path, value in call.inputs
            if is_data_argument(call, path) and reads_values(call, path) and value not in self._constants
        ]

    def _producer(self, value: ValueId) -> Call | None:
        made_by = self._forward.values[value].call
        return None if made_by is None else self._forward.calls[made_by]

    def _starts(self, tensor: ValueId) -> set[ValueId]:
        """Returns the tensor, and those that it is a scaled, shifted or normalized version of."""
        found = {tensor}
        while True:
            found |= self._normalized.get(tensor, set())
            call = self._producer(tensor)
            data = [] if call is None else self._data(call)
            if call is None or len(data) != 1 or not self._is_scaled(call):
                return found
            tensor = data[0]
            found.add(tensor)

    @staticmethod
    def _is_scaled(call: Call) -> bool:
        return kind_of(call.function) in ARITHMETIC_KINDS or base_name(call.function) in _CASTS

    def _statistic(self, end: ValueId, starts: set[ValueId]) -> list[Call]:
        """Returns the calls that compute `end` from `starts` alone, at least one of them a reduction; else no calls."""
        found: dict[int, Call] = {}
        pending = [end]
        while pending:
            value = pending.pop()
            if value in starts:
                continue
            call = self._producer(value)
            if call is None or not _is_step(call) or len(found) > _LONGEST_STATISTIC:
                return []
            if call.index not in found:
                found[call.index] = call
                pending += self._data(call)
        calls = list(found.values())
        return calls if any(base_name(call.function) in _REDUCTIONS for call in calls) else []


def _is_step(call: Call) -> bool:
    name = base_name(call.function)
    known = name in _REDUCTIONS or name in _ELEMENTWISE or kind_of(call.function) in ARITHMETIC_KINDS
    return known or is_activation(call.function) or is_transparent(call)
