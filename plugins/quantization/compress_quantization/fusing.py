"""Finds chains of operators that a runtime fuses into one; nothing is quantized inside of them."""

from __future__ import annotations

from collections.abc import Container

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import ValueId
from compress_quantization.operators import (
    ARITHMETIC_KINDS,
    LINEAR_KINDS,
    base_name,
    is_activation,
    is_data_argument,
    kind_of,
    reads_values,
)

# A self-gated activation (x * sigmoid(x), hard swish) is at most this many calls long.
_LONGEST_GATE = 5

# Functions that add and multiply in one call; profiles do not list them.
_COMBINED_ARITHMETIC = frozenset(["addcmul", "addcdiv", "lerp"])


def fused_calls(forward: ForwardTrace, constants: Container[ValueId]) -> set[int]:
    """Returns the numbers of the calls that a runtime fuses with the call before them.

    These are batch norms after a weighted or arithmetic operator; arithmetic with constants (scale and shift) after one
    of these or at an input of the model; both also after an activation function; and activation functions that are
    written out, such as x * sigmoid(x) or x * relu6(x + 3) / 6.

    Args:
        forward: The trace of a forward.
        constants: Values that do not depend on inputs of the model. How scale and shift are computed does not matter.
    """
    return _Fusing(forward, constants).run()


def written_silus(forward: ForwardTrace, constants: Container[ValueId]) -> list[tuple[ValueId, set[int]]]:
    """Returns x of each written-out x * sigmoid(x), and the numbers of its two calls; arguments as in `fused_calls`."""
    return _Fusing(forward, constants).silus()


class _Fusing:
    def __init__(self, forward: ForwardTrace, constants: Container[ValueId]) -> None:
        self._forward = forward
        self._constants = constants
        self._readers = {
            value: {
                index
                for index, path in found
                if forward.calls[index].results and reads_values(forward.calls[index], path)
            }
            for value, found in forward.consumers().items()
        }
        self._fused: set[int] = set()

    def run(self) -> set[int]:
        for call in self._forward.calls:
            if kind_of(call.function) == "mul":
                self._fused |= self._gate(call)
        for call in self._forward.calls:
            data = self._data(call)
            kind = kind_of(call.function)
            is_shift = _is_arithmetic(call) and len(data) == 1
            if (is_shift or kind == "batch_norm") and len(data) == 1 and self._continues(data[0], is_shift):
                self._fused.add(call.index)
        return self._fused

    def silus(self) -> list[tuple[ValueId, set[int]]]:
        found = []
        for call in self._forward.calls:
            gate = self._gate(call) - {call.index} if kind_of(call.function) == "mul" else set()
            functions = [self._forward.calls[index] for index in gate]
            if [base_name(function.function) for function in functions] == ["sigmoid"]:
                found.append((self._data(functions[0])[0], {*gate, call.index}))
        return found

    def _data(self, call: Call) -> list[ValueId]:
        """Returns the activations among a call's arguments, without parameters and constants."""
        return [value for path, value in call.inputs if is_data_argument(call, path) and value not in self._constants]

    def _continues(self, value: ValueId, is_shift: bool) -> bool:
        known = self._forward.values[value]
        if known.outputs or len(self._readers[value]) != 1:
            return False
        if known.call is None:
            return is_shift and bool(known.inputs)
        producer = self._forward.calls[known.call]
        if producer.index in self._fused:
            return True
        kind = kind_of(producer.function)
        if kind in LINEAR_KINDS or _is_arithmetic(producer) or (is_shift and kind == "batch_norm"):
            return True
        data = self._data(producer)
        return is_activation(producer.function) and len(data) == 1 and self._continues(data[0], is_shift)

    def _gate(self, call: Call) -> set[int]:
        """Returns the calls of a self-gated activation that ends in the product `call`, or an empty set."""
        data = self._data(call)
        if len(data) != 2:
            return set()
        for start, gate in (data, reversed(data)):
            chain = self._chain(gate, start)
            if chain:
                return chain | {call.index}
        return set()

    def _chain(self, end: ValueId, start: ValueId) -> set[int]:
        """Returns the element-wise calls from `start` to `end`; empty if there are other calls in between."""
        chain: set[int] = set()
        while end != start and len(chain) < _LONGEST_GATE:
            made_by = self._forward.values[end].call
            if made_by is None:
                return set()
            call = self._forward.calls[made_by]
            data = self._data(call)
            element_wise = is_activation(call.function) or _is_arithmetic(call)
            if not element_wise or len(data) != 1:
                return set()
            chain.add(made_by)
            end = data[0]
        return chain if end == start else set()


def _is_arithmetic(call: Call) -> bool:
    return kind_of(call.function) in ARITHMETIC_KINDS or base_name(call.function) in _COMBINED_ARITHMETIC
