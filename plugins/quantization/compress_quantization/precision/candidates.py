"""Finds, from trace and placement, which numbers of bits each quantizer can have and which ones belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compress_core.trace import Call, Trace
from compress_core.trace.sites import CallRef
from compress_core.transforms.places import Path
from compress_quantization.calls import multiplications, weight_values
from compress_quantization.operators import is_weight_argument, kind_of
from compress_quantization.plan import BitsChoice, PlannedQuantizer
from compress_quantization.quantizer_config import QuantizerSpec, Resolver
from compress_quantization.quantizer_names import QuantizerPlace


@dataclass(frozen=True)
class PlacedQuantizers:
    """The quantizers of a plan with their positions.

    Attributes:
        weights: Name of the parameter -> its quantizer.
        weight_places: Name of the parameter -> the position of its quantizer.
        activations: Number in the placement -> position and quantizer.
        reads: Argument of a call -> numbers of the quantizers that it has passed.
    """

    weights: Mapping[str, PlannedQuantizer]
    weight_places: Mapping[str, QuantizerPlace]
    activations: Mapping[int, tuple[QuantizerPlace, PlannedQuantizer]]
    reads: Mapping[tuple[CallRef, Path], tuple[int, ...]]


@dataclass
class _Use:
    order: int
    multiplications: int
    inputs: dict[str, None]


def choices_of(
    trace: Trace, placed: PlacedQuantizers, resolver: Resolver, place_of: Callable[[Call, Path], QuantizerPlace]
) -> list[BitsChoice]:
    """Returns what each quantizer can be, weights first.

    Args:
        trace: The trace.
        placed: The quantizers.
        resolver: Knows what section and device allow.
        place_of: Returns the position of a quantizer at an argument of a call.
    """
    uses = _uses(trace, placed)
    found = []
    for name, quantizer in placed.weights.items():
        use = uses.get(name, _Use(len(uses), 0, {}))
        options = resolver.options(quantizer.spec, placed.weight_places[name])
        inputs = tuple(use.inputs)
        found.append(BitsChoice(quantizer.name, "weights", options, name, use.order, use.multiplications, inputs))
    readers: dict[int, list[QuantizerPlace]] = {}
    for (where, path), numbers in placed.reads.items():
        for number in numbers:
            readers.setdefault(number, []).append(place_of(trace.forwards[where.forward].calls[where.call], path))
    for number, (own, quantizer) in placed.activations.items():
        options = {quantizer.spec.bits: quantizer.spec}
        if readers.get(number) and not resolver.has_own_bits(own):
            options = _common([resolver.options(quantizer.spec, place) for place in readers[number]])
        found.append(BitsChoice(quantizer.name, "activations", options))
    return found


def _common(offers: list[dict[int, QuantizerSpec]]) -> dict[int, QuantizerSpec]:
    return {bits: spec for bits, spec in offers[0].items() if all(bits in other for other in offers)}


def _uses(trace: Trace, placed: PlacedQuantizers) -> dict[str, _Use]:
    """Returns how weights are used: by all forwards, multiplications counted in the first that uses the weight."""
    found: dict[str, _Use] = {}
    counted: dict[str, int] = {}
    for number, forward in enumerate(trace.forwards):
        weights = weight_values(forward)
        for call in forward.calls:
            for path, value in call.inputs:
                name = weights.get(value, "")
                if name not in placed.weights or not _multiplies(call, path):
                    continue
                use = found.setdefault(name, _Use(len(found), 0, {}))
                if counted.setdefault(name, number) == number:
                    use.multiplications += multiplications(call, forward, value)
                use.inputs.update(dict.fromkeys(_inputs(number, call, placed)))
    return found


def _multiplies(call: Call, path: Path) -> bool:
    """Returns whether a weight at an argument of a call is multiplied with its activations, or looked up."""
    return is_weight_argument(call, path) or kind_of(call.function) in ("matmul", "rnn")


def _inputs(forward: int, call: Call, placed: PlacedQuantizers) -> list[str]:
    numbers = [
        number for path, _ in call.inputs for number in placed.reads.get((CallRef(forward, call.index), path), ())
    ]
    return [placed.activations[number][1].name for number in numbers if number in placed.activations]
