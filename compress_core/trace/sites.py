"""Turns calls of one traced forward into places that are valid for every forward.

A call can be described relative to each module that is running: "the second `relu` of `layer1.0`", "the fifth of
`layer1`". The innermost module that distinguishes the call from all others is the best choice: its forward has the
fewest calls to count, and changes elsewhere in the model do not affect it.

Calls at the same code positions below the model, that is, iterations of a loop, are the same *site*. So are calls of
other forwards that correspond to them (`correspondence`), such as those of training mode.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from compress_core.trace.correspondence import Correspondence, SiteKey, site_key
from compress_core.trace.graph import Call, ModuleCall
from compress_core.trace.tracer import Trace
from compress_core.transforms.activation_functions import activation_called
from compress_core.transforms.call_sites import can_be_transformed
from compress_core.transforms.places import (
    ActivationPlace,
    CallInput,
    CallOutput,
    CallPattern,
    ModuleInput,
    ModuleOutput,
    Path,
)


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
        trained = [forward for forward in trace.training if forward is not None]
        # Calls are looked for in both modes; forwards in training mode are numbered after those of `trace.forwards`.
        self._forwards = [*trace.forwards, *trained]
        self._in_eval = len(trace.forwards)
        found = Correspondence(trace.forwards, trace.training)
        self._first, self._positions = found.first, found.positions
        self._calls_at: dict[SiteKey, list[CallRef]] = {}
        for number, forward in enumerate(self._forwards):
            for call in forward.calls:
                self._calls_at.setdefault(self.site(CallRef(number, call.index)), []).append(
                    CallRef(number, call.index)
                )
        # What holds for all calls of a site, or of a function in a module, is found once: loops have hundreds of calls.
        self._returned: dict[tuple[SiteKey, Path], Path | None] = {}
        self._orders: dict[tuple[str, str], _Order] = {}
        self._runs: list[dict[tuple[str, int], ModuleCall]] = [
            {(run.module, run.invocation): run for run in forward.module_calls} for forward in self._forwards
        ]
        self._consumers = [forward.consumers() for forward in self._forwards]
        self._call_counts = [
            Counter(run for call in forward.calls for run in {(f.module, f.invocation) for f in call.frames})
            for forward in self._forwards
        ]

    def site(self, where: CallRef) -> SiteKey:
        """Returns the site of a call: equal for calls that cannot be told apart in later forwards."""
        return site_key(self._first[where.forward][where.call], 0)

    def is_reached_in_training(self, where: CallRef) -> bool:
        """Returns whether a forward in training mode makes the call; True as well if none could be recorded."""
        return self._in_eval == len(self._forwards) or any(
            other.forward >= self._in_eval for other in self._calls_at[self.site(where)]
        )

    def is_differentiated(self, where: CallRef) -> bool:
        """Returns whether gradients flow through the call in a forward in training mode; True if none makes it.

        They do not inside of a `torch.autograd.Function`, which has a backward of its own.
        """
        calls = [self._call(other) for other in self._calls_at[self.site(where)] if other.forward >= self._in_eval]
        return not calls or not all(call.is_in_autograd_function for call in calls)

    def only_in_training(self) -> list[CallRef]:
        """Returns the calls that forwards in training mode make and forwards in eval mode do not.

        Their number of the forward counts on from those in `Trace.forwards`.
        """
        alone = [calls for calls in self._calls_at.values() if all(c.forward >= self._in_eval for c in calls)]
        return [where for calls in alone for where in calls]

    def output_place(self, where: CallRef, path: Path) -> ActivationPlace | None:
        """Returns the place at which the result of a call can be transformed.

        Args:
            where: The call.
            path: Path of the tensor in the result.

        Returns:
            The output of a module if the module only returns the tensor, otherwise the output of the call. An
            activation function at the end of a larger module gets a place of its own, because a transform can compute
            it too. None if the examples contradict each other about which call it is, or if it is not a call that
            can be transformed (`can_be_transformed`: a property such as `x.T` is not).
        """
        call = self._call(where)
        of_module = self._module_output(where, path)
        # Not hardswish: torch.compile hides its calls, so a place at such a call prevents compiling the module.
        can_take_over = activation_called(call.function) in {"relu", "relu6"}
        if of_module is not None and not (can_take_over and self._is_one_of_many(where)):
            return of_module
        found = self._pattern(where) if can_be_transformed(call.function) else None
        return of_module if found is None else CallOutput(found[0], call.function, found[1], path)

    def call_output(self, where: CallRef) -> CallOutput | None:
        """Returns the place at the result of a call itself, even if a module only returns it; None as `output_place`.

        For transforms that stand in the place of a function.
        """
        call = self._call(where)
        found = self._pattern(where) if can_be_transformed(call.function) else None
        return None if found is None else CallOutput(found[0], call.function, found[1])

    def _module_output(self, where: CallRef, path: Path) -> ActivationPlace | None:
        call = self._call(where)
        if not self._is_unique(where, len(call.frames) - 1):
            return None
        # All iterations of a loop, in both modes, have to return the result from the module; otherwise some would be
        # missed.
        site = self.site(where)
        if (site, path) not in self._returned:
            items = {self._returned_as(other, path) for other in self._calls_at[site]}
            self._returned[site, path] = items.pop() if len(items) == 1 else None
        item = self._returned[site, path]
        return None if item is None else ModuleOutput(call.module, item)

    def _is_one_of_many(self, where: CallRef) -> bool:
        """Returns whether the module that makes a call, or one of its submodules, makes other calls too."""
        frame = self._call(where).frames[-1]
        return self._call_counts[where.forward][frame.module, frame.invocation] > 1

    def input_place(self, where: CallRef, path: Path) -> ActivationPlace | None:
        """Returns the place of an argument of a call, for this call alone; None in the same case as `output_place`."""
        call = self._call(where)
        found = self._pattern(where) if can_be_transformed(call.function) else None
        return None if found is None else CallInput(found[0], call.function, found[1], path)

    @staticmethod
    def model_input(path: Path) -> ActivationPlace:
        """Returns the place of an argument of the model's forward."""
        return ModuleInput("", path)

    def _call(self, where: CallRef) -> Call:
        return self._forwards[where.forward].calls[where.call]

    def _key(self, where: CallRef, module: str) -> SiteKey:
        """Returns the key, relative to a running module, of the first call that is the same as a call."""
        first = self._first[where.forward][where.call]
        level = _level_of(first, module)
        if level is None:  # another module runs it there
            first = self._call(where)
            level = next(n for n, frame in enumerate(first.frames) if frame.module == module)
        return site_key(first, level)

    def _is_unique(self, where: CallRef, level: int) -> bool:
        key = self._key(where, self._call(where).frames[level].module)
        return len(self._positions.get(key, ())) == 1

    def _returned_as(self, where: CallRef, path: Path) -> Path | None:
        """Returns the path at which the module of a call returns its result; None if the module uses the result."""
        call = self._call(where)
        frame, value = call.frames[-1], dict(call.outputs).get(path, -1)
        run = self._runs[where.forward][frame.module, frame.invocation]
        paths = [path for path, returned in run.outputs if returned == value]
        forward = self._forwards[where.forward]
        inside = any(
            (frame.module, frame.invocation) in {(f.module, f.invocation) for f in forward.calls[consumer].frames}
            for consumer, _ in self._consumers[where.forward].get(value, ())
        )
        return paths[0] if len(paths) == 1 and not inside else None

    def _pattern(self, where: CallRef) -> tuple[str, CallPattern] | None:
        frames = self._call(where).frames
        for level in reversed(range(len(frames))):
            if self._is_unique(where, level):
                pattern = self._pattern_at(where, frames[level].module)
                if pattern is not None:
                    return frames[level].module, pattern
        return None

    def _pattern_at(self, where: CallRef, module: str) -> CallPattern | None:
        function = self._call(where).function
        if (module, function) not in self._orders:
            self._orders[module, function] = _Order(
                self._sequences(range(self._in_eval), module, function),
                self._sequences(range(self._in_eval, len(self._forwards)), module, function),
            )
        return self._orders[module, function].pattern(self._key(where, module))

    def _sequences(self, numbers: range, module: str, function: str) -> list[list[SiteKey]]:
        """Returns, for each run of a module in some forwards, the keys of its calls of a function."""
        found = []
        for number in numbers:
            for (name, _), calls in self._forwards[number].sequences.items():
                if name == module:
                    found.append([self._key(CallRef(number, index), module) for index in calls.get(function, [])])
        return found


def _level_of(call: Call, module: str) -> int | None:
    return next((level for level, frame in enumerate(call.frames) if frame.module == module), None)


class _Order:
    """The calls of one function by one module, run for run.

    Args:
        evaluation: For each run in eval mode, the sites of its calls.
        training: The same in training mode.
    """

    def __init__(self, evaluation: list[list[SiteKey]], training: list[list[SiteKey]]) -> None:
        self._evaluation, self._training = evaluation, training
        self._numbers: dict[SiteKey, int] = {}
        for key in (key for sequence in [*evaluation, *training] for key in sequence):
            self._numbers.setdefault(key, len(self._numbers))
        self._patterns: dict[SiteKey, CallPattern | None] = {}

    def pattern(self, key: SiteKey) -> CallPattern | None:
        """Returns what tells the calls of a site from the others; None if it cannot."""
        if key not in self._numbers:  # a call on integers alone
            return None
        if key not in self._patterns:
            self._patterns[key] = self._made(self._numbers[key])
        return self._patterns[key]

    @functools.cached_property
    def _common(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
        sites, counts = _longest(self._evaluation, self._numbers), _shorter(self._evaluation)
        if not self._training:
            return sites, counts, None, counts
        trained = _longest(self._training, self._numbers)
        return sites, counts, None if trained == sites else trained, _shorter(self._training)

    def _made(self, site: int) -> CallPattern | None:
        sites, counts, trained, training_counts = self._common
        pattern = CallPattern(site, sites, trained, counts, training_counts)
        agrees = all(
            pattern.includes(position, training=mode) == (self._numbers[key] == site)
            for mode, sequences in ((False, self._evaluation), (True, self._training))
            for sequence in sequences
            for position, key in enumerate(sequence)
        )
        return pattern if agrees else None


def _longest(sequences: list[list[SiteKey]], numbers: dict[SiteKey, int]) -> tuple[int, ...]:
    return tuple(numbers[key] for key in max(sequences, key=len))


def _shorter(sequences: list[list[SiteKey]]) -> tuple[int, ...]:
    lengths = {len(sequence) for sequence in sequences}
    return tuple(sorted(lengths - {max(lengths)}))
