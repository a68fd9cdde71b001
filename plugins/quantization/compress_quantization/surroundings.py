"""What surrounds the operators that a runtime computes with integers: fused functions, outputs, fused sums.

Runtimes differ in where they need quantizers besides the inputs of an operator. Some compute a convolution in integers
only if its output is quantized as well, directly or behind a fused activation function. Others fuse an addition with
the convolution that makes one of its operands, and a quantizer between the two would break that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import ValueId
from compress_core.transforms.places import Path
from compress_quantization.operators import base_name, is_data_argument, is_transparent, kind_of, reads_values
from compress_quantization.profiles import Operator

# Returns what the device supports for a call.
OperatorOf = Callable[[Call], Operator]


class Surroundings:
    """Follows the values of a forward through what is fused with the operators that make them.

    Args:
        forward: The trace of the forward.
        fused: Numbers of the calls that a runtime fuses with the call before them (`fusing`).
        operator_of: What the device supports.
    """

    def __init__(self, forward: ForwardTrace, fused: Collection[int], operator_of: OperatorOf) -> None:
        self._forward = forward
        self._fused = fused
        self._operator_of = operator_of
        self._readers = {
            value: [
                forward.calls[index]
                for index, path in found
                if forward.calls[index].results and reads_values(forward.calls[index], path)
            ]
            for value, found in forward.consumers().items()
        }
        self._clamped = {value for call in forward.calls if (value := self._behind_function(call)) is not None}
        self.fused_operands = {reader for call in forward.calls for reader in self._fused_operand(call)}

    def output(self, call: Call) -> ValueId | None:
        """Returns the value behind an operator, its batch norm and a fused activation function.

        This is where a quantizer makes the output integer. None if the operator has no single result.
        """
        if len(call.results) != 1:
            return None
        (value,) = call.results
        functions = self._operator_of(call).fused_activations
        while (reader := self._only_reader(value)) is not None and len(reader.results) == 1:
            if self._is_folded(reader):
                (value,) = reader.results
            elif base_name(reader.function) in functions:
                return reader.results[0]
            else:
                break
        return value

    def _behind_function(self, call: Call) -> ValueId | None:
        """Returns the value behind a fused activation function of an operator, if it has one."""
        functions = self._operator_of(call).fused_activations
        value = self.output(call) if functions else None
        index = None if value is None else self._forward.values[value].call
        if index is None or base_name(self._forward.calls[index].function) not in functions:
            return None
        return value

    def mixes_clamped(self, call: Call) -> bool:
        """Returns whether a fused activation function makes some of a concatenation's parts, and none makes others.

        A grid for all of them has values that the function cannot return (negative ones behind a ReLU), and a runtime
        that computes it by the quantizer's clamping then cannot fuse it.
        """
        found = {self._is_clamped(value) for path, value in call.inputs if is_data_argument(call, path)}
        return len(found) > 1

    def _is_clamped(self, value: ValueId) -> bool:
        """Returns whether a value, or all of which it is put together, is the result of a fused activation function."""
        index = self._forward.values[value].call
        if index is None:
            return False
        call = self._forward.calls[index]
        parts = [part for path, part in call.inputs if is_data_argument(call, path)]
        if kind_of(call.function) == "concat" or is_transparent(call):
            return bool(parts) and all(self._is_clamped(part) for part in parts)
        return value in self._clamped

    def _only_reader(self, value: ValueId) -> Call | None:
        readers = self._readers[value]
        return readers[0] if len(readers) == 1 and not self._forward.values[value].outputs else None

    def _is_folded(self, call: Call) -> bool:
        return call.index in self._fused and kind_of(call.function) == "batch_norm"

    def _fused_operand(self, call: Call) -> list[tuple[int, Path]]:
        """Returns the first argument that the runtime can fuse: `out` in `out + shortcut(x)`."""
        kinds = self._operator_of(call).fuses_with
        operands = [(path, value) for path, value in call.inputs if is_data_argument(call, path)] if kinds else []
        made = [path for path, value in operands if self._maker(value, kinds) is not None]
        return [(call.index, made[0])] if made and len(operands) > 1 else []

    def _maker(self, value: ValueId, kinds: Collection[str]) -> Call | None:
        """Returns the operator of one of these kinds that makes a value, directly or behind its batch norm."""
        index = self._forward.values[value].call
        if index is None or self._only_reader(value) is None:
            return None
        call = self._forward.calls[index]
        if self._is_folded(call):
            return self._maker(call.inputs[0][1], kinds)
        return call if kind_of(call.function) in kinds else None
