"""Turns calls of one traced forward into places that are valid for every forward.

A call can be described relative to each module that is running: "the second `relu` of `layer1.0`", "the fifth of
`layer1`". The innermost module that distinguishes the call from all others is the best choice: its forward has the
fewest calls to count, and changes elsewhere in the model do not affect it.

Calls at the same code positions below the model, that is, iterations of a loop, are the same *site*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from compress_core.trace.graph import Call, ForwardTrace, ModuleCall
from compress_core.trace.tracer import Trace
from compress_core.transforms.activation_functions import activation_called
from compress_core.transforms.places import (
    ActivationPlace,
    CallInput,
    CallOutput,
    CallPattern,
    ModuleInput,
    ModuleOutput,
    Path,
)

# A call relative to a running module: function, code positions below the module, and modules in between.
SiteKey: TypeAlias = tuple[str, str, tuple[tuple[int, int], ...], tuple[tuple[str, int], ...]]


def site_key(call: Call, level: int) -> SiteKey:
    """Returns the key of a call relative to the module `call.frames[level]`."""
    frame = call.frames[level]
    between = tuple((inner.module, inner.turn) for inner in call.frames[level + 1 :])
    return frame.module, call.function, call.location[frame.depth :], between


@dataclass(frozen=True)
class CallRef:
    """A call of one of the forwards of a trace.

    Attributes:
        forward: Number of the forward in `Trace.forwards`.
        call: Number of the call in it.
    """

    forward: int
    call: int


class Sites:
    """Finds the places of the values of a trace.

    Args:
        trace: The trace; its forwards in training mode, if there are any, show which calls are made in that mode.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._roots: dict[SiteKey, set[SiteKey]] = {}
        for call in self._all_calls():
            for level in range(len(call.frames)):
                self._roots.setdefault(site_key(call, level), set()).add(site_key(call, 0))
        self._calls_at: dict[SiteKey, list[CallRef]] = {}
        for number, forward in enumerate(trace.forwards):
            for call in forward.calls:
                self._calls_at.setdefault(site_key(call, 0), []).append(CallRef(number, call.index))
        self._runs: list[dict[tuple[str, int], ModuleCall]] = [
            {(run.module, run.invocation): run for run in forward.module_calls} for forward in trace.forwards
        ]
        self._consumers = [forward.consumers() for forward in trace.forwards]
        self._call_counts = [
            Counter(run for call in forward.calls for run in {(f.module, f.invocation) for f in call.frames})
            for forward in trace.forwards
        ]

    def site(self, where: CallRef) -> SiteKey:
        """Returns the site of a call: equal for calls that cannot be told apart in later forwards."""
        return site_key(self._call(where), 0)

    def output_place(self, where: CallRef, path: Path) -> ActivationPlace | None:
        """Returns the place at which the result of a call can be transformed.

        Args:
            where: The call.
            path: Path of the tensor in the result.

        Returns:
            The output of a module if the module only returns the tensor, otherwise the output of the call. An
            activation function at the end of a larger module gets a place of its own, because a transform can compute
            it too. None if the examples contradict each other about which call it is.
        """
        call = self._call(where)
        of_module = self._module_output(where, path)
        # Not hardswish: torch.compile hides its calls, so a place at such a call prevents compiling the module.
        can_take_over = activation_called(call.function) in {"relu", "relu6"}
        if of_module is not None and not (can_take_over and self._is_one_of_many(where)):
            return of_module
        found = self._pattern(call)
        return of_module if found is None else CallOutput(found[0], call.function, found[1], path)

    def _module_output(self, where: CallRef, path: Path) -> ActivationPlace | None:
        call = self._call(where)
        if not self._is_unique(call, len(call.frames) - 1):
            return None
        # All iterations of a loop have to return the result from the module; otherwise some would be missed.
        items = {self._returned_as(other, path) for other in self._calls_at[self.site(where)]}
        item = items.pop() if len(items) == 1 else None
        return None if item is None else ModuleOutput(call.module, item)

    def _is_one_of_many(self, where: CallRef) -> bool:
        """Returns whether the module that makes a call, or one of its submodules, makes other calls too."""
        frame = self._call(where).frames[-1]
        return self._call_counts[where.forward][frame.module, frame.invocation] > 1

    def input_place(self, where: CallRef, path: Path) -> ActivationPlace | None:
        """Returns the place of an argument of a call, for this call alone; None in the same case as `output_place`."""
        call = self._call(where)
        found = self._pattern(call)
        return None if found is None else CallInput(found[0], call.function, found[1], path)

    @staticmethod
    def model_input(path: Path) -> ActivationPlace:
        """Returns the place of an argument of the model's forward."""
        return ModuleInput("", path)

    def _call(self, where: CallRef) -> Call:
        return self._trace.forwards[where.forward].calls[where.call]

    def _all_forwards(self) -> list[ForwardTrace]:
        return [*self._trace.forwards, *(forward for forward in self._trace.training if forward is not None)]

    def _all_calls(self) -> Iterator[Call]:
        for forward in self._all_forwards():
            yield from forward.calls

    def _is_unique(self, call: Call, level: int) -> bool:
        return len(self._roots[site_key(call, level)]) == 1

    def _returned_as(self, where: CallRef, path: Path) -> Path | None:
        """Returns the path at which the module of a call returns its result; None if the module uses the result."""
        call = self._call(where)
        frame, value = call.frames[-1], dict(call.outputs).get(path, -1)
        run = self._runs[where.forward][frame.module, frame.invocation]
        paths = [path for path, returned in run.outputs if returned == value]
        forward = self._trace.forwards[where.forward]
        inside = any(
            (frame.module, frame.invocation) in {(f.module, f.invocation) for f in forward.calls[consumer].frames}
            for consumer, _ in self._consumers[where.forward].get(value, ())
        )
        return paths[0] if len(paths) == 1 and not inside else None

    def _pattern(self, call: Call) -> tuple[str, CallPattern] | None:
        for level in reversed(range(len(call.frames))):
            if self._is_unique(call, level):
                pattern = self._pattern_at(call, level)
                if pattern is not None:
                    return call.frames[level].module, pattern
        return None

    def _pattern_at(self, call: Call, level: int) -> CallPattern | None:
        module, function = call.frames[level].module, call.function
        evaluation = self._sequences(self._trace.forwards, module, function)
        training = self._sequences([f for f in self._trace.training if f is not None], module, function)
        numbers: dict[SiteKey, int] = {}
        for key in (key for sequence in [*evaluation, *training] for key in sequence):
            numbers.setdefault(key, len(numbers))
        site = numbers[site_key(call, level)]
        sites, counts = _longest(evaluation, numbers), _shorter(evaluation)
        pattern = CallPattern(site, sites, counts=counts, training_counts=counts)
        if training:
            trained = _longest(training, numbers)
            pattern = CallPattern(site, sites, None if trained == sites else trained, counts, _shorter(training))
        agrees = all(
            pattern.includes(position, training=mode) == (numbers[key] == site)
            for mode, sequences in ((False, evaluation), (True, training))
            for sequence in sequences
            for position, key in enumerate(sequence)
        )
        return pattern if agrees else None

    @staticmethod
    def _sequences(forwards: list[ForwardTrace], module: str, function: str) -> list[list[SiteKey]]:
        """Returns, for each run of a module, the keys of its calls of a function relative to the module."""
        found = []
        for forward in forwards:
            for (name, _), calls in forward.sequences.items():
                if name == module:
                    keys = [forward.calls[index] for index in calls.get(function, [])]
                    found.append([site_key(c, _level_of(c, module)) for c in keys])
        return found


def _level_of(call: Call, module: str) -> int:
    return next(level for level, frame in enumerate(call.frames) if frame.module == module)


def _longest(sequences: list[list[SiteKey]], numbers: dict[SiteKey, int]) -> tuple[int, ...]:
    return tuple(numbers[key] for key in max(sequences, key=len))


def _shorter(sequences: list[list[SiteKey]]) -> tuple[int, ...]:
    lengths = {len(sequence) for sequence in sequences}
    return tuple(sorted(lengths - {max(lengths)}))
