"""Finds which calls of a forward are part of the network, and which only surround it; those demand no quantizers.

Not part of the network are calls that

- compute from constants alone, or from numbers such as time steps and lengths (see `origins`),
- end in integers, booleans or positions: indices, comparisons, the places at which an image is sampled,
- lead only to a loss: to an output without dimensions, or one that depends on labels,
- decode positions: compute with a grid of positions after the last weighted operator,
- prepare the argument of a function that needs it exactly, such as a sine or an exponential.

Weighted operators are part of the network in any case, unless their inputs are constants.
"""

from __future__ import annotations

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import Value, ValueId
from compress_quantization.operators import (
    ARITHMETIC_KINDS,
    LINEAR_KINDS,
    is_data_argument,
    is_periodic,
    is_position_argument,
    is_sensitive,
    kind_of,
    reads_values,
)
from compress_quantization.origins import Origins, is_integer

# Kinds of operators that compute each element from the elements at the same place; others are not listed by profiles.
_ELEMENTWISE_KINDS = ARITHMETIC_KINDS | {"", "pow", "min", "max", "concat"}

_PRODUCTS = LINEAR_KINDS | {"scaled_dot_product_attention"}


class Network:
    """Which calls and values of a forward can have quantizers.

    Args:
        forward: The trace of the forward.

    Attributes:
        origins: What the values are computed from.
        outside: Numbers of the calls that are not part of the network.
        following: Those that only compare, compute a loss, or give the code a number to branch on. They demand nothing,
            but read a tensor as the network does.
    """

    def __init__(self, forward: ForwardTrace) -> None:
        self._forward = forward
        self.origins = Origins(forward)
        self._consumers = forward.consumers()
        self._operators = _consumers_outside_calls(forward)
        self._losses = self._find_losses()
        # Values that lead to a weighted operator, to an output that is no loss, and to a loss.
        self._feeding: set[ValueId] = set()
        self._returned: set[ValueId] = set()
        self._lost: set[ValueId] = set()
        for value in reversed(forward.values):
            self._look_ahead(value)
        self._decoding = self._find_decoding()
        self.outside: set[int] = set()
        self._periodic: set[int] = set()
        for call in reversed(forward.calls):
            if self._is_outside(call):
                self.outside.add(call.index)
        self.following: set[int] = set()
        for call in reversed(forward.calls):
            if call.index in self.outside and self._follows(call):
                self.following.add(call.index)

    def quantizes_output(self, value: ValueId) -> bool:
        """Returns whether `quantize_outputs` applies to an output: not to constants, nor to losses."""
        return value not in self.origins.constants and len(self._forward.values[value].shape) > 0

    def quantizes_argument(self, call: Call, value: ValueId) -> bool:
        """Returns whether a call is part of the network, and can read this argument quantized.

        The range of a constant or a number in an example proves nothing. Only products need both factors on a grid.
        """
        if call.index in self.outside:
            return False
        if not self.origins.is_fixed(value):
            return True
        return kind_of(call.function) in _PRODUCTS and value not in self.origins.loose

    # Losses.

    def _find_losses(self) -> set[ValueId]:
        origins = self.origins
        inputs = self._forward.inputs
        feeding = origins.feeding_weights
        labels = [value for value in inputs if feeding and not origins.reaching[value.index] & feeding]
        integers = sum(origins.input_bits[value.index] for value in labels if is_integer(value))
        others = sum(origins.input_bits[value.index] for value in labels if not is_integer(value))
        found = set()
        for value in self._forward.outputs:
            by_labels = integers if len(value.shape) > 1 else integers | others
            if not value.shape or origins.reaching[value.index] & by_labels:
                found.add(value.index)
        return found

    # What values lead to.

    def _look_ahead(self, value: Value) -> None:
        index = value.index
        if value.outputs:
            (self._lost if index in self._losses else self._returned).add(index)
        for number, path in self._consumers[index]:
            call = self._forward.calls[number]
            if is_position_argument(call, path) or not reads_values(call, path):
                continue
            if number in self.origins.weighted:
                self._feeding.add(index)
            self._inherit(value, call.results)
        for number in self._operators.get(index, ()):
            operator = self._forward.operators[number]
            if any(self._forward.values[source].parameter for source in operator.inputs):
                self._feeding.add(index)  # perhaps a layer
            self._inherit(value, [*(made for _, made in operator.outputs), *operator.overwritten])

    def _inherit(self, value: Value, results: list[ValueId]) -> None:
        for result in results:
            if is_integer(value) or not is_integer(self._forward.values[result]):
                for found in (self._feeding, self._returned, self._lost):
                    if result in found:
                        found.add(value.index)

    # Decoding of positions.

    def _find_decoding(self) -> set[int]:
        found: set[int] = set()
        decoded: set[ValueId] = set()
        for call in self._forward.calls:
            if call.index in self.origins.weighted or not self._feeding.isdisjoint(call.results):
                continue
            given = [value for path, value in call.inputs if is_data_argument(call, path)]
            kind = kind_of(call.function)
            begins = (kind in ARITHMETIC_KINDS or kind == "matmul") and any(map(self._is_grid, given))
            if begins or (kind not in _PRODUCTS and not decoded.isdisjoint(given)):
                found.add(call.index)
                decoded.update(call.results)
        return found

    def _is_grid(self, value: ValueId) -> bool:
        shape = self._forward.values[value].shape
        return value in self.origins.loose and sum(size > 1 for size in shape) > 0

    # The calls.

    def _is_outside(self, call: Call) -> bool:
        origins, values = self.origins, self._forward.values
        given = [value for _, value in call.inputs]
        if origins.constants.issuperset(given):
            return True
        results = [value for value in call.results if not is_integer(values[value])]
        if call.index in origins.weighted:
            return self._embeds_positions(call, results)
        if all(origins.is_fixed(value) or is_integer(values[value]) for value in given) or call.index in self._decoding:
            self._note_periodic(call, results)
            return True
        if call.results and not any(value in self._feeding or value in self._returned for value in results):
            return True  # integers that lead on do not count
        self._note_periodic(call, results)
        return kind_of(call.function) in _ELEMENTWISE_KINDS and bool(results) and all(map(self._is_exact, results))

    def _follows(self, call: Call) -> bool:
        if kind_of(call.function) == "compare":
            return True
        if any(value in self._feeding or value in self._returned for value in call.results):
            return False
        readers = [number for value in call.results for number, _ in self._consumers[value]]
        return not self._lost.isdisjoint(call.results) or self.following.issuperset(readers)

    def _is_exact(self, value: ValueId) -> bool:
        """Returns whether all readers of a value need it exactly, or are not part of the network."""
        if value in self._returned and self._forward.values[value].outputs:
            return False
        readers = [(self._forward.calls[number], path) for number, path in self._consumers[value]]
        readers = [(call, path) for call, path in readers if call.results and reads_values(call, path)]
        if not readers or value in self._operators:
            return False
        return all(
            is_position_argument(call, path) or is_sensitive(call.function) or call.index in self.outside
            for call, path in readers
        )

    def _note_periodic(self, call: Call, results: list[ValueId]) -> None:
        if kind_of(call.function) in _ELEMENTWISE_KINDS and (is_periodic(call.function) or self._are_phases(results)):
            self._periodic.add(call.index)

    def _are_phases(self, results: list[ValueId]) -> bool:
        """Returns whether values are read only as arguments of sine and cosine, or of arithmetic that leads there."""
        readers = [number for value in results for number, _ in self._consumers[value]]
        returned = any(self._forward.values[value].outputs for value in results)
        return bool(readers) and not returned and all(number in self._periodic for number in readers)

    def _embeds_positions(self, call: Call, results: list[ValueId]) -> bool:
        """Returns whether a weighted operator only makes phases of what the model was given, such as coordinates."""
        is_raw = not any(value in self.origins.after_weights for _, value in call.inputs)
        return is_raw and kind_of(call.function) != "embedding" and self._are_phases(results)


def _consumers_outside_calls(forward: ForwardTrace) -> dict[ValueId, list[int]]:
    """Returns the operators that read each value outside of function calls, for example in scripted functions."""
    found: dict[ValueId, list[int]] = {}
    for operator in forward.operators:
        for value in operator.inputs if operator.call is None else ():
            found.setdefault(value, []).append(operator.index)
    return found
