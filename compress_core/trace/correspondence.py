"""Finds the calls of several forwards of a model that are the same call of the module that makes them.

Training and eval mode, or two examples, may reach one module from different lines: `if self.training:` with a second
copy of the calls, an auxiliary head in between, a comprehension instead of a loop. A place of an activation belongs to
the module that makes the call, so the line alone must not decide. Two calls of two forwards are the same if

1. they have the same code positions from the model down, or
2. they have the same code positions within a module that is called from one position in each of the forwards, or
3. the same module calls the same function with tensors that correspond, or for readers that do, or
4. one is made in training mode only, by code of a module that eval mode runs from one position.

Within one forward, calls at different positions stay different, even if they run the same layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from compress_core.trace.graph import Call, ForwardTrace, ValueId

# A call relative to a running module: module, function, code positions below the module, and modules in between.
SiteKey: TypeAlias = tuple[str, str, tuple[tuple[int, int], ...], tuple[tuple[str, int], ...]]


def site_key(call: Call, level: int) -> SiteKey:
    """Returns the key of a call relative to the module `call.frames[level]`."""
    frame = call.frames[level]
    between = tuple((inner.module, inner.turn) for inner in call.frames[level + 1 :])
    return frame.module, call.function, call.location[frame.depth :], between


class Correspondence:
    """The calls of all forwards, each with the first call that is the same.

    Args:
        evaluation: Forwards in eval mode.
        training: Forwards in training mode.

    Attributes:
        first: For each forward, eval mode before training mode: for each call the first one that is the same.
        positions: Key of a call relative to a module -> the keys, relative to the model, of the calls that have it.
    """

    def __init__(self, evaluation: Sequence[ForwardTrace], training: Sequence[ForwardTrace | None]) -> None:
        self.first: list[list[Call]] = []
        self.positions: dict[SiteKey, set[SiteKey]] = {}
        self._known: dict[SiteKey, Call] = {}
        self._forwards: list[ForwardTrace] = []
        for forward in evaluation:
            self._add(forward, self._forwards)
        for number, trained in enumerate(training):
            if trained is not None:
                self._add(trained, [evaluation[number], *self._forwards])

    def _add(self, forward: ForwardTrace, earlier: list[ForwardTrace]) -> None:
        keys = [site_key(call, 0) for call in forward.calls]
        found = [self._known.get(key) for key in keys]
        if self._forwards and None in found:
            self._find_by_module(forward, keys, found)
            for other in earlier:
                if None in found:
                    self._find_by_tensors(forward, other, found)
            _complete_loops(keys, found)
            if forward.training:
                for index, call in enumerate(forward.calls):
                    found[index] = found[index] or self._at_one_position(call, {})
        for index, (call, key) in enumerate(zip(forward.calls, keys, strict=True)):
            if found[index] is None:
                found[index] = self._known.setdefault(key, call)
                if found[index] is call:
                    for level in range(len(call.frames)):
                        self.positions.setdefault(site_key(call, level), set()).add(key)
        self._remember(keys, [call for call in found if call is not None])
        self._forwards.append(forward)

    def _remember(self, keys: list[SiteKey], found: list[Call]) -> None:
        """Notes which call a key means from now on; a loop that replaces several calls means none of them."""
        means: dict[SiteKey, dict[int, Call]] = {}
        for key, call in zip(keys, found, strict=True):
            means.setdefault(key, {})[id(call)] = call
        for key, calls in means.items():
            if len(calls) == 1:
                self._known.setdefault(key, *calls.values())
        self.first.append(found)

    def _find_by_module(self, forward: ForwardTrace, keys: list[SiteKey], found: list[Call | None]) -> None:
        own: dict[SiteKey, set[SiteKey]] = {}
        for call, key in zip(forward.calls, keys, strict=True):
            for level in range(1, len(call.frames)):
                own.setdefault(site_key(call, level), set()).add(key)
        for index, call in enumerate(forward.calls):
            if found[index] is None:
                found[index] = self._at_one_position(call, own)

    def _at_one_position(self, call: Call, own: dict[SiteKey, set[SiteKey]]) -> Call | None:
        for level in reversed(range(1, len(call.frames))):
            key = site_key(call, level)
            positions = self.positions.get(key, set())
            if len(positions) == 1 and len(own.get(key, positions)) == 1:
                return self._known[next(iter(positions))]
        return None

    def _find_by_tensors(self, forward: ForwardTrace, other: ForwardTrace, found: list[Call | None]) -> None:
        others = self.first[next(n for n, known in enumerate(self._forwards) if known is other)]
        turns: dict[int, list[int]] = {}
        for index, call in enumerate(others):
            turns.setdefault(id(call), []).append(index)
        pairs = {}
        for index, known in enumerate(found):
            if known is not None and turns.get(id(known)):
                pairs[index] = turns[id(known)].pop(0)
        if len(pairs) < len(other.calls):
            for index, same in _Pairing(forward, other, pairs).find().items():
                found[index] = found[index] or others[same]


def _complete_loops(keys: list[SiteKey], found: list[Call | None]) -> None:
    """Lets further turns of a loop be the same call as its other turns, if these are all the same."""
    means: dict[SiteKey, dict[int, Call]] = {}
    for key, call in zip(keys, found, strict=True):
        if call is not None:
            means.setdefault(key, {})[id(call)] = call
    for index, key in enumerate(keys):
        calls = list(means.get(key, {}).values())
        if found[index] is None and len(calls) == 1:
            found[index] = calls[0]


# The module that makes a call, and the function.
_Kind: TypeAlias = tuple[str, str]


def _kind(call: Call) -> _Kind:
    return call.module, call.function


class _Side:
    """One of the two forwards that are compared."""

    def __init__(self, forward: ForwardTrace, kinds_of_other: set[_Kind]) -> None:
        self.forward = forward
        self.readers = forward.consumers()
        self._origins: dict[ValueId, ValueId] = {}
        for call in forward.calls:
            # What the other forward does not have at all (noise that is added in training) is passed over.
            given = [value for _, value in call.inputs if not forward.values[value].parameter]
            if given and len(given) == len(call.inputs) and _kind(call) not in kinds_of_other:
                self._origins.update({value: self.origin(given[0]) for value in call.results})

    def origin(self, value: ValueId) -> ValueId:
        """Returns the value before the calls that only this forward makes."""
        return self._origins.get(value, value)

    def uses(self, call: Call) -> set[tuple[str, ...]]:
        """Returns what happens to the results of a call: which modules pass them to which functions, or return them."""
        found: set[tuple[str, ...]] = set()
        for value in call.results:
            found.update(_kind(self.forward.calls[reader]) for reader, _ in self.readers[value])
            found.update(("",) for _ in self.forward.values[value].outputs[:1])
        return found


class _Pairing:
    """Pairs the calls of two forwards along the tensors that pass between them, starting from calls that are paired."""

    def __init__(self, mine: ForwardTrace, other: ForwardTrace, pairs: dict[int, int]) -> None:
        self._mine = _Side(mine, {_kind(call) for call in other.calls})
        self._other = _Side(other, {_kind(call) for call in mine.calls})
        self._pairs = pairs
        taken = set(pairs.values())
        self._free: dict[_Kind, list[Call]] = {}
        for call in other.calls:
            if call.index not in taken:
                self._free.setdefault(_kind(call), []).append(call)
        inputs = {path: value.index for value in other.inputs for path in value.inputs}
        self._values = {v.index: inputs[path] for v in mine.inputs for path in v.inputs if path in inputs}
        for index, same in pairs.items():
            self._join_values(mine.calls[index], other.calls[same])

    def find(self) -> dict[int, int]:
        """Returns all pairs: number of a call -> number of the call of the other forward."""
        calls = self._mine.forward.calls
        while True:
            waiting = [c for c in calls if c.index not in self._pairs and self._free.get(_kind(c))]
            for call in waiting:
                self._pair(call, next((same for same in self._free[_kind(call)] if self._is_same(call, same)), None))
            # One that is only similar is taken if nothing else fits; its readers may then be the same.
            if not any(
                self._pair(call, next((s for s in self._free[_kind(call)] if self._is_similar(call, s)), None))
                for call in waiting
                if call.index not in self._pairs
            ):
                return self._pairs

    def _pair(self, call: Call, same: Call | None) -> bool:
        if same is None:
            return False
        self._pairs[call.index] = same.index
        self._free[_kind(call)].remove(same)
        self._join_values(call, same)
        return True

    def _join_values(self, call: Call, same: Call) -> None:
        results = dict(same.outputs)
        self._values.update({value: results[path] for path, value in call.outputs if path in results})
        self._values.update(zip(call.overwritten, same.overwritten, strict=False))

    def _corresponds(self, value: ValueId, other: ValueId) -> bool:
        return self._values.get(self._mine.origin(value)) == self._other.origin(other)

    def _is_same(self, call: Call, other: Call) -> bool:
        """Returns whether two calls get the same tensors and, as far as both have readers, serve the same ones."""
        inputs = dict(other.inputs)
        if inputs.keys() != dict(call.inputs).keys():
            return False
        for path, value in call.inputs:
            ours, theirs = self._mine.forward.values[value], self._other.forward.values[inputs[path]]
            is_activation = ours.call is not None or bool(ours.inputs)
            if ours.parameter != theirs.parameter or (is_activation and not self._corresponds(value, inputs[path])):
                return False
        uses, others = self._mine.uses(call), self._other.uses(other)
        return uses <= others or others <= uses

    def _is_similar(self, call: Call, other: Call) -> bool:
        """Returns whether one tensor of two calls corresponds, or one reader of their results."""
        inputs, outputs = dict(other.inputs), dict(other.outputs)
        if any(path in inputs and self._corresponds(value, inputs[path]) for path, value in call.inputs):
            return True
        return any(
            (self._pairs.get(reader), at) in self._other.readers[outputs[path]]
            for path, value in call.outputs
            if path in outputs
            for reader, at in self._mine.readers[value]
        )
