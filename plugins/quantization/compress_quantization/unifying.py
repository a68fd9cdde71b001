"""Unifies quantizers of operators whose inputs have to share one scale.

The config names groups of such operators (`activations.unified_scale_ops`), and some devices need one scale for all
inputs of an addition and the like. Quantizers move away from the operators that demand them (`placement`), so the
quantizers of an operator are known only after all have been placed.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from compress_core import ConfigError
from compress_core.config.scopes import ScopedModule
from compress_core.errors import Problem
from compress_core.trace import Trace
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms.places import ActivationPlace, Path
from compress_quantization.config import ActivationsConfig
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.quantizer_names import QuantizerPlace, place_name, scope_matcher

_PATH = "activations.unified_scale_ops"


class DisjointSets:
    """Disjoint sets (union-find) of places and demands; each set becomes one quantizer."""

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable] = {}

    def root(self, item: Hashable) -> Hashable:
        """Returns the representative of the set of `item`."""
        while (parent := self._parents.get(item, item)) != item:
            item = parent
        return item

    def join(self, left: Hashable, right: Hashable) -> None:
        """Joins the sets of two items."""
        self._parents[self.root(right)] = self.root(left)


@dataclass(frozen=True)
class ServedInput:
    """An input of an operator that is quantized, directly or further up.

    Attributes:
        call: The call of the operator.
        path: Path of the argument.
        spec: Settings of the quantizer.
        shapes: Shapes of the tensors that are quantized for it.
        quantizers: Items of its quantizers in the disjoint sets; several after a concatenation.
    """

    call: CallRef
    path: Path
    spec: QuantizerSpec
    shapes: tuple[tuple[int, ...], ...]
    quantizers: tuple[Hashable, ...]


@dataclass(frozen=True)
class Unified:
    """The unified quantizer of a group of operators.

    Attributes:
        count: Number of quantizers that were unified.
        places: Places of the unified quantizer.
        calls: The operators that it serves.
    """

    count: int
    places: tuple[ActivationPlace, ...]
    calls: frozenset[CallRef]


class Unifier:
    """Unifies quantizers by joining their sets.

    Args:
        sets: The disjoint sets of quantizers and places.
        places: All places of quantizers.
        sites: Finds the names of inputs for messages.
    """

    def __init__(self, sets: DisjointSets, places: Iterable[ActivationPlace], sites: Sites) -> None:
        self._sets = sets
        self._places = tuple(places)
        self._sites = sites

    def unify(self, inputs: Sequence[ServedInput], path: str = "") -> Unified:
        """Unifies the quantizers of some inputs.

        Args:
            inputs: The inputs.
            path: Path of the group in the section; empty if the device requires it.

        Raises:
            ConfigError: One quantizer cannot serve all inputs.
        """
        for other in inputs[1:]:
            self._check(inputs[0], other, path)
        standing = {self._sets.root(place) for place in self._places}
        before = {self._sets.root(item) for served in inputs for item in served.quantizers} & standing
        for served in inputs:
            for item in served.quantizers:
                self._sets.join(inputs[0].quantizers[0], item)
        after = {self._sets.root(item) for item in before}
        places = tuple(place for place in self._places if self._sets.root(place) in after)
        calls = frozenset(s.call for s in inputs if any(self._sets.root(item) in after for item in s.quantizers))
        return Unified(len(before), places, calls)

    def _check(self, first: ServedInput, other: ServedInput, path: str) -> None:
        names = f"'{self._name(first)}' and '{self._name(other)}'"
        why = "these operators are to share a quantizer" if path else "the device wants one scale for both"
        if first.spec != other.spec:
            raise ConfigError(
                f"{why}, and {names} differ: {_described(first.spec)}, and {_described(other.spec)}. Give them the "
                "same settings in scope_overrides.activations and bitwidth_per_scope",
                path=path,
            )
        channels = {shape[1:2] + (len(shape),) for shape in (*first.shapes, *other.shapes)}
        if first.spec.per_channel and len(channels) > 1:
            shapes = " and ".join(str(list(shape)) for shape in dict.fromkeys((*first.shapes, *other.shapes)))
            raise ConfigError(
                f"{why}, and {names} have a scale for each channel of different shapes {shapes}; set per_channel to "
                "false for them in scope_overrides.activations",
                path=path,
            )

    def _name(self, served: ServedInput) -> str:
        place = self._sites.input_place(served.call, served.path)
        return f"call {served.call.call}" if place is None else place_name(place)


def _described(spec: QuantizerSpec) -> str:
    sign = {None: "", True: " signed", False: " unsigned"}[spec.signed]
    return f"{spec.bits} bits {spec.mode}{sign} {'per channel' if spec.per_channel else 'per tensor'}"


class UnifiedScales:
    """The groups of operators that the section names.

    Args:
        config: The section `activations`.
        trace: The trace whose calls are the operators.
        names: The names that scopes can use for each call.
        modules: Names of the modules, for hints.

    Raises:
        ConfigError: An entry matches no operator, or an operator is in two groups.
    """

    def __init__(
        self,
        config: ActivationsConfig,
        trace: Trace,
        names: Mapping[tuple[int, int], ScopedModule],
        modules: Iterable[str],
    ) -> None:
        self._strict = config.validate_scopes
        self._groups: dict[str, dict[str, set[CallRef]]] = {}
        self.calls: dict[CallRef, str] = {}
        groups = config.unified_scale_ops
        operators = _operators(trace, names) if groups else {}
        problems = []
        for index, group in enumerate(groups):
            path = f"{_PATH}.{index}"
            self._groups[path] = {entry: _matching(entry, operators) for entry in group}
            problems += self._in_two_groups(path)
            if self._strict:
                problems += [
                    _unknown(path, e, operators, modules) for e, found in self._groups[path].items() if not found
                ]
        if problems:
            raise ConfigError(problems)

    def _in_two_groups(self, path: str) -> list[Problem]:
        problems = []
        for entry, calls in self._groups[path].items():
            others = [other for call in calls if (other := self.calls.setdefault(call, path)) != path]
            if others:
                problems.append(
                    Problem(path, f"'{entry}' means an operator that {others[0]} names too; merge the two groups")
                )
        return problems

    def check(self, unified: Mapping[str, Unified]) -> dict[str, Unified]:
        """Refuses groups and entries that have no effect.

        Args:
            unified: Path of a group -> its unified quantizer; groups without quantized inputs may be missing.

        Returns:
            The same for all groups. If entries need not match, a group may be empty.

        Raises:
            ConfigError: The operators of an entry have no quantized inputs, or there is nothing to unify.
        """
        result, problems = {}, []
        for path, entries in self._groups.items():
            found = unified.get(path, _NOTHING)
            idle = [entry for entry, calls in entries.items() if calls and not calls & found.calls]
            if idle:
                problems.append(
                    Problem(path, f"no quantizer stands at the inputs of '{idle[0]}'; {_REMEDY}, or remove this entry")
                )
            elif found.count < 2 and all(entries.values()):
                problems.append(Problem(path, f"'{place_name(found.places[0])}' {_ALONE}; {_REMEDY}"))
            result[path] = found if found.count > 1 else _NOTHING
        if problems:
            raise ConfigError(problems)
        return result


_NOTHING = Unified(0, (), frozenset())
_ALONE = "serves all inputs of these operators already, so that there is nothing to unify"
_REMEDY = "name operators whose inputs have quantizers of their own (controller.statistics() lists the quantizers)"


def _operators(trace: Trace, names: Mapping[tuple[int, int], ScopedModule]) -> dict[CallRef, ScopedModule]:
    """Returns the names of each call, including its printed name."""
    sites = Sites(trace)
    found = {}
    for (number, index), scoped in names.items():
        where = CallRef(number, index)
        inputs = trace.forwards[number].calls[index].inputs
        place = sites.input_place(where, inputs[0][0]) if inputs else None
        printed = () if place is None else (place_name(place).rpartition(" input ")[0],)
        found[where] = ScopedModule(scoped.name, (*scoped.nncf_names, *printed))
    return found


def _matching(entry: str, operators: Mapping[CallRef, ScopedModule]) -> set[CallRef]:
    matches = scope_matcher(entry)
    return {
        where
        for where, scoped in operators.items()
        if matches(QuantizerPlace((scoped,), "activations", "add", "INPUT0"))
    }


def _unknown(path: str, entry: str, operators: Mapping[CallRef, ScopedModule], modules: Iterable[str]) -> Problem:
    dotted = dict.fromkeys([*(scoped.name for scoped in operators.values()), *modules])
    exact = dict.fromkeys(name for scoped in operators.values() for name in scoped.nncf_names)
    close = difflib.get_close_matches(entry, exact if "/" in entry else dotted, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"The model has, for example, {[n for n in dotted if n][:3]}."
    return Problem(
        path,
        f"the scope '{entry}' matches no operator that this could mean. {hint} Correct it, remove it, or set "
        '"validate_scopes": false in activations.',
    )
