"""Finds the activation functions whose gate a device computes with integers (`gates`).

It does so only where the function reads and makes integers anyway: with a quantizer in front of it, and one behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import ValueId
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms.places import ActivationPlace, CallOutput
from compress_quantization.operators import base_name, is_transparent, kind_of

# The places of the quantizers of a forward that serve all readers of a value.
QuantizedValues = Mapping[ValueId, Sequence[ActivationPlace]]


@dataclass(frozen=True)
class PlacedGate:
    """A call of an activation function whose gate is quantized.

    Attributes:
        place: Its place.
        needs: The places of the quantizers in front of it and behind it, without which its gate is not quantized.
        call: The call, in one of the forwards.
    """

    place: CallOutput
    needs: frozenset[ActivationPlace]
    call: Call


class Gates:
    """Collects the gates of all forwards: a place counts if all of its calls read and make quantized values.

    Args:
        functions: Names of the activation functions, as profiles list them.
        sites: The places of the trace.
    """

    def __init__(self, functions: Collection[str], sites: Sites) -> None:
        self._functions = functions
        self._sites = sites
        self._found: dict[CallOutput, PlacedGate] = {}
        self._refused: set[CallOutput] = set()

    def add(self, number: int, forward: ForwardTrace, quantized: QuantizedValues) -> None:
        """Adds the gates of a forward.

        Args:
            number: Number of the forward in the trace.
            forward: The forward.
            quantized: The values that all of their readers get quantized.
        """
        for call in forward.calls if self._functions else ():
            if not (call.function.startswith("torch.nn.functional.") and base_name(call.function) in self._functions):
                continue
            place = self._sites.call_output(CallRef(number, call.index))
            if place is None:
                continue
            needs = _around(call, forward, quantized)
            if needs is None:
                self._refused.add(place)
                continue
            known = self._found.get(place)
            self._found[place] = PlacedGate(place, needs | (known.needs if known else frozenset()), call)

    def placed(self) -> tuple[PlacedGate, ...]:
        """Returns the gates, in the order of the forwards."""
        return tuple(gate for place, gate in self._found.items() if place not in self._refused)


def sources_of(value: ValueId, forward: ForwardTrace) -> list[ValueId]:
    """Returns the values that the maker of a value only moves or joins; none if it computes or there is no maker."""
    made_by = forward.values[value].call
    maker = None if made_by is None else forward.calls[made_by]
    if maker is None or not (is_transparent(maker) or kind_of(maker.function) == "concat"):
        return []
    is_concat = kind_of(maker.function) == "concat"
    return [source for path, source in maker.inputs if is_concat or path[0] in (0, "input", "self")]


def _around(call: Call, forward: ForwardTrace, quantized: QuantizedValues) -> frozenset[ActivationPlace] | None:
    """Returns the places of the quantizers in front of and behind a call; None if there are not both."""
    if len(call.results) != 1 or not call.inputs:
        return None
    before, behind = _in_front(call.inputs[0][1], forward, quantized), quantized.get(call.results[0])
    return None if before is None or behind is None else frozenset([*before, *behind])


def _in_front(value: ValueId, forward: ForwardTrace, quantized: QuantizedValues) -> Sequence[ActivationPlace] | None:
    """Returns the places of the quantizers of a value, or of those from which it is moved; None if one is missing."""
    if value in quantized:
        return quantized[value]
    above = sources_of(value, forward)
    found = [_in_front(source, forward, quantized) for source in above]
    places = [place for one in found if one is not None for place in one]
    return places if above and None not in found else None
