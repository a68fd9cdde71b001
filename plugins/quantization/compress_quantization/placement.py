"""Places the quantizers of activations, by propagation over the trace.

Operators that a runtime computes with integers *demand* quantized inputs. From there a quantizer moves up to where the
tensor is produced: through operators that only move values, and across a branching point if all branches need the same
quantizer. So one quantizer serves all readers of the tensor, and it comes after the activation function that a runtime
fuses with the preceding convolution. It does not move above tensors that the model also returns.

Some runtimes need a quantizer at the output of an operator as well, and want none at an operand that they fuse with the
operator that makes it (`surroundings`).

Quantizers that meet at a concatenation are unified, because a runtime concatenates only integers of one scale. Others
are unified because of the operators that they serve (`unifying`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from compress_core.trace import Call, ForwardTrace, Trace
from compress_core.trace.graph import ValueId
from compress_core.trace.hook_results import USER_HOOK
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms.call_sites import can_be_transformed
from compress_core.transforms.places import ActivationPlace, Path
from compress_quantization.fusing import fused_calls, written_silus
from compress_quantization.gating import Gates, sources_of
from compress_quantization.masks import masks_of, reads_mask
from compress_quantization.network import Network
from compress_quantization.normalizing import reads_inside_normalizations
from compress_quantization.operators import (
    is_data_argument,
    is_transparent,
    keeps_leading_dimensions,
    kind_of,
    reads_values,
)
from compress_quantization.placement_types import Placed, Placement, Rules
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.surroundings import Surroundings
from compress_quantization.unifying import DisjointSets, ServedInput, Unified, Unifier


def place_quantizers(trace: Trace, rules: Rules) -> Placement:
    """Returns the quantizers of activations that a model needs.

    Raises:
        ConfigError: Quantizers that have to be unified have different settings.
    """
    sites = Sites(trace)
    wishes: dict[ActivationPlace, _Wish] = {}
    calls: dict[ActivationPlace, Call | None] = {}
    unplaced: dict[str, str] = {}
    groups = DisjointSets()
    served: list[ServedInput] = []
    trained: set[ActivationPlace] = set()
    learned: set[ActivationPlace] = set()
    gates = Gates(rules.quantized_gates, sites)
    for number, forward in enumerate(trace.forwards):
        propagation = _Propagation(forward, rules, groups, number)
        quantized: dict[ValueId, list[ActivationPlace]] = {}
        for wish in propagation.wishes():
            found = _places(wish, number, forward, sites)
            there = [place for place, _ in found if place is not None]
            if wish.readers is None and not wish.is_constant and len(there) == len(found):
                quantized[wish.value] = there
            for place, call in found:
                if place is None:
                    unplaced[_name(call)] = _reason(call)
                    continue
                wishes.setdefault(place, wish)
                calls.setdefault(place, call)
                groups.join(place, wish.group)
                where = None if call is None else CallRef(number, call.index)
                if where is None or sites.is_reached_in_training(where):
                    trained.add(place)
                if where is None or sites.is_differentiated(where):
                    learned.add(place)
        served += propagation.served()
        gates.add(number, forward, quantized)
    unified = _unify(served, trace, rules, Unifier(groups, wishes, sites))
    idle, fixed = wishes.keys() - trained, trained - learned
    merged = tuple(_merged(wishes, groups, calls))
    reads = _reads(served, merged, groups)
    return Placement(merged, unplaced, unified, frozenset(idle), frozenset(fixed), gates.placed(), reads)


def _reads(
    served: list[ServedInput], found: tuple[Placed, ...], groups: DisjointSets
) -> dict[tuple[CallRef, Path], tuple[int, ...]]:
    numbers = {groups.root(placed.places[0]): number for number, placed in enumerate(found)}
    roots = {(one.call, one.path): [groups.root(item) for item in one.quantizers] for one in served}
    return {
        reader: tuple(dict.fromkeys(numbers[root] for root in of_reader if root in numbers))
        for reader, of_reader in roots.items()
    }


def modules_only_in_training(trace: Trace, rules: Rules) -> list[str]:
    """Returns the outermost modules that no forward in eval mode runs and whose calls would read quantized tensors."""
    forwards = [forward for forward in trace.training if forward is not None]
    alone = {(where.forward - len(trace.forwards), where.call) for where in Sites(trace).only_in_training()}
    found: dict[str, None] = {}
    for number, forward in enumerate(forwards) if alone else ():
        for wish in _Propagation(forward, rules, DisjointSets(), number).wishes():
            if (number, forward.values[wish.value].call) in alone:
                found.update(dict.fromkeys(wish.modules))
    ran = {run.module for forward in trace.forwards for run in forward.module_calls}
    return list(dict.fromkeys(_outermost(name, ran) for name in found if name not in ran))


def _outermost(module: str, ran: set[str]) -> str:
    parent = module.rpartition(".")[0]
    return module if not parent or parent in ran else _outermost(parent, ran)


def _unify(served: list[ServedInput], trace: Trace, rules: Rules, unifier: Unifier) -> dict[str, Unified]:
    of_device: dict[CallRef, list[ServedInput]] = {}
    of_config: dict[str, list[ServedInput]] = {}
    for one in served:
        if kind_of(trace.forwards[one.call.forward].calls[one.call.call].function) in rules.unified_kinds:
            of_device.setdefault(one.call, []).append(one)
        if one.call in rules.unified_calls:
            of_config.setdefault(rules.unified_calls[one.call], []).append(one)
    for inputs in of_device.values():
        unifier.unify(inputs)
    return {path: unifier.unify(inputs, path) for path, inputs in of_config.items()}


@dataclass
class _Wish:
    """A demanded quantizer that has no place yet.

    Attributes:
        value: The tensor.
        spec: Settings of the quantizer.
        group: Wishes whose groups are joined become one quantizer.
        readers: The calls that read the quantized tensor; None if all readers do.
        modules: Names of the modules that demand it.
        shape: The tensor's shape.
        is_constant: Whether the tensor does not depend on inputs of the model.
    """

    value: ValueId
    spec: QuantizerSpec
    group: Hashable
    readers: list[tuple[int, Path]] | None
    modules: list[str]
    shape: tuple[int, ...]
    is_constant: bool


@dataclass
class _Ask:
    """The request of one reader of a tensor: no quantizer (None), or one that replaces those further down."""

    spec: QuantizerSpec | None
    reader: tuple[int, Path]
    instead_of: list[ValueId] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    # Whether the reader prefers the quantizers further down to a quantizer for itself alone.
    only_together: bool = False
    # Whether all quantizers that replace those further down have to be unified.
    unified: bool = True
    # Whether those further down stay as well.
    keeps: bool = False


class _Propagation:
    """Moves the quantizers of one forward up as far as possible."""

    def __init__(self, forward: ForwardTrace, rules: Rules, groups: DisjointSets, number: int) -> None:
        self._forward = forward
        self._rules = rules
        self._groups = groups
        self._number = number
        self._consumers = forward.consumers()
        self._network = Network(forward)
        self._constants = self._network.origins.constants
        self._fused = fused_calls(forward, self._constants)
        self._inside = reads_inside_normalizations(forward, self._constants)
        self._masks = masks_of(forward, rules.stored_masks)
        self._surroundings = Surroundings(forward, self._fused, rules.operator_of)
        # Values that an operator demands to be quantized because it makes them.
        self._made = self._demanded_outputs()
        self._open_gates()
        # Values that are quantized for all readers, and values that are quantized for some readers.
        self._whole: dict[ValueId, _Wish] = {}
        self._partial: list[_Wish] = []
        # Quantizers after concatenations that were replaced by quantizers of the inputs.
        self._lifted: dict[int, _Wish] = {}
        # The demands of operators: reader -> settings of the quantizer.
        self._demands: dict[tuple[int, Path], QuantizerSpec] = {}

    def wishes(self) -> list[_Wish]:
        """Returns all wishes in the order of the forward."""
        for value in reversed(self._forward.values):
            if self._is_activation(value.index):
                self._settle(value.index)
        return sorted([*self._whole.values(), *self._partial], key=lambda wish: wish.value)

    def served(self) -> list[ServedInput]:
        """Returns the inputs whose demands were met, in the order of the forward; call it after `wishes`."""
        own = {reader: wish for wish in self._partial for reader in wish.readers or ()}
        found = []
        for (index, path), spec in sorted(self._demands.items(), key=lambda item: item[0][0]):
            wishes = self._serving((index, path), own)
            shapes, groups = tuple(wish.shape for wish in wishes), tuple(wish.group for wish in wishes)
            found.append(ServedInput(CallRef(self._number, index), path, spec, shapes, groups))
        return found

    def _serving(self, reader: tuple[int, Path], own: dict[tuple[int, Path], _Wish]) -> list[_Wish]:
        """Returns the quantizers that an argument of a call has passed: one, or those of its concatenated parts."""
        call = self._forward.calls[reader[0]]
        value = dict(call.inputs)[reader[1]]
        wish = own.get(reader) or self._whole.get(value)
        if wish is not None:
            return [wish]
        made_by = self._forward.values[value].call
        assert made_by is not None, "every demand has a quantizer, here or further up"
        maker = self._forward.calls[made_by]
        is_concat = kind_of(maker.function) == "concat"
        above = [path for path, _ in maker.inputs if is_concat or path[0] in (0, "input", "self")]
        return [wish for path in above for wish in self._serving((made_by, path), own)]

    def _is_activation(self, value: ValueId) -> bool:
        known = self._forward.values[value]
        if not known.dtype.is_floating_point or known.parameter:
            return False
        return known.call is not None or (bool(known.inputs) and self._rules.quantize_inputs)

    def _demanded_outputs(self) -> dict[ValueId, QuantizerSpec]:
        found = {}
        for call in self._forward.calls:
            spec = None if call.index in self._network.outside else self._rules.output_demand(call)
            value = None if spec is None else self._surroundings.output(call)
            if spec is None or value is None:
                continue
            is_exact = self._rules.exact_outputs or not self._network.quantizes_output(value)
            if not (self._forward.values[value].outputs and is_exact):
                found[value] = spec
        return found

    def _open_gates(self) -> None:
        """Takes apart x * sigmoid(x) that the device computes with integers, if x is quantized where it is made."""
        if "silu" not in self._rules.quantized_gates:
            return
        for value, calls in written_silus(self._forward, self._constants):
            if self._is_made(value):
                self._fused -= calls

    def _is_made(self, value: ValueId) -> bool:
        above = sources_of(value, self._forward)
        return value in self._made or (bool(above) and all(map(self._is_made, above)))

    def _settle(self, value: ValueId) -> None:
        calls = self._forward.calls
        found = [(index, path) for index, path in self._consumers[value] if self._reads(index, path)]
        readers = [(index, path) for index, path in found if (index, value) not in self._inside]
        asks = [self._ask(calls[index], path, value) for index, path in readers]
        outputs = self._forward.values[value].outputs
        output_spec = self._rules.output_spec if self._network.quantizes_output(value) else None
        specs: set[QuantizerSpec | None] = {ask.spec for ask in asks} | ({output_spec} if outputs else set())
        if value in self._made:
            # It is quantized for all readers, as they ask for it if they agree; those that ask for more get that.
            asked = specs - {None}
            specs = asked if len(asked) == 1 else {self._made[value]}
        if len(specs) == 1 and None not in specs:
            (wanted,) = (spec for spec in specs if spec is not None)
            served = [ask for ask in asks if ask.spec == wanted]
            self._whole[value] = self._wish(value, wanted, served, ("value", self._number, value))
            asks = [ask for ask in asks if ask.spec != wanted]
        for spec in dict.fromkeys(ask.spec for ask in asks):
            own = [ask for ask in asks if ask.spec == spec and not ask.only_together]
            if spec is not None and own:
                wish = self._wish(value, spec, own, ("readers", self._number, value, spec))
                wish.readers = [ask.reader for ask in own]
                self._partial.append(wish)

    def _reads(self, index: int, path: Path) -> bool:
        # A call that returns its argument unchanged (dropout in eval mode) demands nothing; its readers may.
        call = self._forward.calls[index]
        uses = (bool(call.results) or not call.outputs) and index not in self._network.following
        return uses and reads_values(call, path)

    def _wish(self, value: ValueId, spec: QuantizerSpec, asks: list[_Ask], group: Hashable) -> _Wish:
        modules: list[str] = []
        for ask in asks:
            modules.extend(name for name in ask.modules if name not in modules)
            for replaced in ask.instead_of:
                if not ask.keeps:
                    self._whole.pop(replaced, None)
                if ask.unified:
                    self._groups.join(group, ("value", self._number, replaced))
        shape = self._forward.values[value].shape
        return _Wish(value, spec, group, None, modules, shape, value in self._constants)

    def _ask(self, call: Call, path: Path, value: ValueId) -> _Ask:
        reader = (call.index, path)
        if call.index in self._fused or reads_mask(call, self._masks):
            return _Ask(None, reader)
        if kind_of(call.function) == "concat":
            return self._concat(call, reader)
        if is_transparent(call):
            return self._transparent(call, reader) if path[0] in (0, "input", "self") else _Ask(None, reader)
        is_operand = is_data_argument(call, path) and self._network.quantizes_argument(call, value)
        is_operand = is_operand and reader not in self._surroundings.fused_operands and self._can_be_integer(call)
        spec = self._rules.demand(call, path) if is_operand else None
        if spec is not None:
            self._demands[reader] = spec
        return _Ask(spec, reader, modules=[call.module])

    def _can_be_integer(self, call: Call) -> bool:
        """Returns whether an operator has the quantized output without which its device computes it in floats."""
        if self._rules.operator_of(call).output != "decides":
            return True
        return self._surroundings.output(call) in self._whole

    def _transparent(self, call: Call, reader: tuple[int, Path]) -> _Ask:
        if self._makes_constants(call):
            return _Ask(None, reader)
        read = [r for r in self._float_results(call) if self._consumers[r] or self._forward.values[r].outputs]
        below = [self._whole.get(result) for result in read]
        specs = {None if wish is None else wish.spec for wish in below}
        if len(specs) != 1 or None in specs:
            return _Ask(None, reader)
        spec = specs.pop()
        if spec is not None and spec.per_channel and not all(self._keeps_channels(call, reader, to) for to in read):
            return _Ask(None, reader)
        modules = [name for wish in below if wish is not None for name in wish.modules]
        return _Ask(spec, reader, read, modules, only_together=True)

    def _makes_constants(self, call: Call) -> bool:
        # The model may keep these for later forwards, so only what reads them at last gets quantized ones.
        return all(value in self._constants for value in call.results)

    def _concat(self, call: Call, reader: tuple[int, Path]) -> _Ask:
        if self._makes_constants(call):
            return _Ask(None, reader)
        # All parts or none, because a quantizer left after the concatenation would requantize the other parts.
        results = self._float_results(call)
        wish = self._lifted.get(call.index) or (self._whole.get(results[0]) if len(results) == 1 else None)
        if wish is None or not all(self._is_activation(value) for _, value in call.inputs):
            return _Ask(None, reader)
        unified = "concat" in self._rules.unified_kinds
        if wish.spec.per_channel:
            parts = [self._shape(value) for _, value in call.inputs]
            if any(len(part) != len(self._shape(results[0])) or len(part) < 2 for part in parts):
                return _Ask(None, reader)
            # Where channels are joined, each part has other ones, and the scales of its own.
            unified = unified and all(part[1] == self._shape(results[0])[1] for part in parts)
        self._lifted[call.index] = wish
        # Some runtimes need a quantizer after the concatenation as well. On values of its own grid it changes nothing,
        # and it lets parts keep their own, which they need if only some of them come from a fused activation function.
        keeps = self._rules.operator_of(call).output == "required"
        unified = unified and not (keeps and self._surroundings.mixes_clamped(call))
        return _Ask(wish.spec, reader, results, list(wish.modules), unified=unified, keeps=keeps)

    def _keeps_channels(self, call: Call, reader: tuple[int, Path], result: ValueId) -> bool:
        """Returns whether the channels, dimension 1, are the same before and behind a call that moves values."""
        before, after = self._shape(dict(call.inputs)[reader[1]]), self._shape(result)
        return keeps_leading_dimensions(call) and len(after) > 1 and before[:2] == after[:2]

    def _shape(self, value: ValueId) -> tuple[int, ...]:
        return self._forward.values[value].shape

    def _float_results(self, call: Call) -> list[ValueId]:
        return [value for value in call.results if self._forward.values[value].dtype.is_floating_point]


def _places(
    wish: _Wish, number: int, forward: ForwardTrace, sites: Sites
) -> list[tuple[ActivationPlace | None, Call | None]]:
    """Returns the places of a wish: (place, call of the place)."""
    value = forward.values[wish.value]
    if wish.readers is not None:
        calls = [(forward.calls[index], path) for index, path in wish.readers]
        return [(sites.input_place(CallRef(number, call.index), path), call) for call, path in calls]
    if value.call is None:
        return [(sites.model_input(path), None) for path in value.inputs]
    call = forward.calls[value.call]
    path = next((path for path, made in call.outputs if made == wish.value), None)
    if path is not None and call.function != USER_HOOK and not wish.is_constant:
        place = sites.output_place(CallRef(number, call.index), path)
        if place is not None or can_be_transformed(call.function):
            return [(place, call)]
    # The value was written in place by a statement, such as x[:, 0] = y, or by a hook, or read as a property (x.T):
    # there is no result to replace. Or it is a constant, which the model may keep for later forwards.
    readers = [(forward.calls[index], at) for index, at in _readers(forward, wish.value)]
    return [(sites.input_place(CallRef(number, reader.index), at), reader) for reader, at in readers]


def _readers(forward: ForwardTrace, value: ValueId) -> list[tuple[int, Path]]:
    """Returns the calls that read a value; not properties that only move its elements, but what reads these."""
    found = []
    for index, path in forward.consumers()[value]:
        call = forward.calls[index]
        if is_transparent(call) and not can_be_transformed(call.function):
            found += [reader for result in call.results for reader in _readers(forward, result)]
        else:
            found.append((index, path))
    return found


def _reason(call: Call | None) -> str:
    if call is not None and not can_be_transformed(call.function):
        return "calls of this function cannot be transformed"
    return "the example inputs disagree about which call this is"


def _name(call: Call | None) -> str:
    return "input" if call is None else f"{call.module or 'model'}: {call.function}"


def _merged(
    wishes: dict[ActivationPlace, _Wish], groups: DisjointSets, calls: dict[ActivationPlace, Call | None]
) -> list[Placed]:
    members: dict[Hashable, list[ActivationPlace]] = {}
    for place in wishes:
        members.setdefault(groups.root(place), []).append(place)
    found = []
    for places in members.values():
        first = wishes[places[0]]
        modules = dict.fromkeys(name for place in places for name in (place.module, *wishes[place].modules))
        is_constant = all(wishes[place].is_constant for place in places)
        made_by = tuple(calls[place] for place in places)
        found.append(Placed(first.spec, tuple(places), tuple(modules), first.shape, made_by, is_constant))
    return found
