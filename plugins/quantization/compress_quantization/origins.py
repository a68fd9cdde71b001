"""Finds what the values of a forward are computed from: the model's inputs, integers, or constants alone."""

from __future__ import annotations

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import Value, ValueId
from compress_quantization.operators import (
    LINEAR_KINDS,
    base_name,
    is_random,
    is_transparent,
    kind_of,
    reads_values,
)

# Functions that bring data from outside torch, which may have been computed from the inputs.
_IMPORTS = frozenset(["from_numpy", "frombuffer", "from_dlpack"])


class Origins:
    """What the values of a forward are computed from.

    Args:
        forward: The trace of the forward.

    Attributes:
        constants: Values that do not depend on the inputs of the model, parameters and buffers included.
        loose: Constants that are not computed from parameters and buffers alone. Their values may follow from the
            shapes of the inputs, as positions do, so an example does not show their range.
        numbers: Floating-point values computed from integers and constants only, without a weighted operator: time
            steps, lengths, positions, masks. An example does not show their range either.
        weighted: Numbers of the calls of weighted operators: layers, and other products with a parameter.
        after_weights: Values that depend on the inputs through a weighted operator.
        reaching: Value -> the inputs that it depends on, as bits.
        input_bits: Input of the model -> its bit in `reaching`.
        feeding_weights: Bits of the inputs that any weighted operator depends on.
    """

    def __init__(self, forward: ForwardTrace) -> None:
        self._forward = forward
        self.input_bits = {value.index: 1 << number for number, value in enumerate(forward.inputs)}
        self.reaching: dict[ValueId, int] = {}
        self.constants: set[ValueId] = set()
        self.loose: set[ValueId] = set()
        self._find_constants(unseen=1 << len(self.input_bits), hidden=False)
        self.weighted = self._weighted()
        if not self._feeding_weights():
            # The inputs reach the network in a way that the trace does not see, for example as lists of numbers.
            self._find_constants(unseen=1 << len(self.input_bits), hidden=True)
            self.weighted = self._weighted()
        self.feeding_weights = self._feeding_weights()
        self.numbers: set[ValueId] = set()
        self.after_weights: set[ValueId] = set()
        self._follow()

    def sources(self, value: Value) -> list[ValueId]:
        """Returns the values from which a value was computed directly."""
        before = [] if value.before is None else [value.before]
        if value.call is not None:
            call = self._forward.calls[value.call]
            return [source for path, source in call.inputs if reads_values(call, path)] + before
        return before if value.operator is None else [*self._forward.operators[value.operator].inputs, *before]

    def is_fixed(self, value: ValueId) -> bool:
        """Returns whether a value is a constant or a number, so that its range in an example proves nothing."""
        return value in self.constants or value in self.numbers

    def _find_constants(self, unseen: int, *, hidden: bool) -> None:
        self.constants.clear()
        self.loose.clear()
        for value in self._forward.values:
            sources = self.sources(value)
            found = self.input_bits.get(value.index, 0)
            for source in sources:
                found |= self.reaching.get(source, 0)
            function = "" if value.call is None else self._forward.calls[value.call].function
            if is_random(function) or (self._forward.real and base_name(function) in _IMPORTS):
                found |= unseen
            is_loose = not value.parameter and (not sources or not self.loose.isdisjoint(sources))
            if hidden and is_loose:
                found |= unseen
            self.reaching[value.index] = found
            if not found:
                self.constants.add(value.index)
                if is_loose:
                    self.loose.add(value.index)

    def _weighted(self) -> set[int]:
        return {call.index for call in self._forward.calls if self._is_weighted(call)}

    def _is_weighted(self, call: Call) -> bool:
        kind = kind_of(call.function)
        if kind in LINEAR_KINDS - {"matmul"}:
            return True
        # Functions that we do not know may be layers too.
        return (kind == "matmul" or (not kind and not is_transparent(call))) and any(
            self._is_matrix(value) for _, value in call.inputs
        )

    def _is_matrix(self, value: ValueId) -> bool:
        known = self._forward.values[value]
        is_stored = value in self.constants and value not in self.loose
        return is_stored and known.dtype.is_floating_point and len(known.shape) > 1

    def _feeding_weights(self) -> int:
        found = 0
        for index in self.weighted:
            for _, value in self._forward.calls[index].inputs:
                found |= self.reaching[value]
        return found

    def _follow(self) -> None:
        for value in self._forward.values:
            if value.index in self.constants:
                continue
            sources = self.sources(value)
            if value.call in self.weighted or not self.after_weights.isdisjoint(sources):
                self.after_weights.add(value.index)
            elif value.dtype.is_floating_point and not value.inputs and self._is_number(value, sources):
                self.numbers.add(value.index)

    def _is_number(self, value: Value, sources: list[ValueId]) -> bool:
        return (
            bool(sources)
            and not self._is_looked_up(value)
            and all(self.is_fixed(source) or is_integer(self._forward.values[source]) for source in sources)
        )

    def _is_looked_up(self, value: Value) -> bool:
        """Returns whether a value was taken from a table with the help of indices, as by an embedding."""
        call = None if value.call is None else self._forward.calls[value.call]
        return call is not None and is_transparent(call) and any(self._is_matrix(source) for _, source in call.inputs)


def is_integer(value: Value) -> bool:
    """Returns whether a value holds integers or booleans."""
    return not (value.dtype.is_floating_point or value.dtype.is_complex)
