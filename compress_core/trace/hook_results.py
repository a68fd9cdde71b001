"""Keeps track of tensors that users' forward hooks computed, until the model's forward uses them.

The calls inside hooks are not recorded, because most hooks only observe a model. If a hook changes a tensor or returns
another one, the trace records that tensor, on its first use, as the result of one unknown function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from compress_core.trace.graph import Call, ForwardTrace, Frame, Operator, Ref, ValueId, tensors_with_paths
from compress_core.trace.values import ValueTable, Write

USER_HOOK = "user.forward_hook"
"""Name of the call and the operator that represent the computation inside a hook."""


class HookResults:
    """The tensors that hooks computed or wrote to and that the forward has not used yet.

    Args:
        trace: The trace, which gets the results on their first use.
        values: The values of the tensors.
    """

    def __init__(self, trace: ForwardTrace, values: ValueTable) -> None:
        self._trace = trace
        self._values = values
        # Tensor -> the values that it was computed from (keys of a dict, for their order).
        self._waiting: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Forgets all tensors, because they come from outside of the forward."""
        self._waiting.clear()

    def note(self, given: Iterable[torch.Tensor], made: Iterable[torch.Tensor], written: list[torch.Tensor]) -> None:
        """Records that a hook ran an operator.

        Args:
            given: The tensors that it read.
            made: The tensors that it returned.
            written: The tensors that it wrote to.
        """
        given = list(given)
        sources: dict[ValueId, None] = {}
        for tensor in given:
            sources.update(self._sources(tensor))
        arguments = {id(tensor) for tensor in given}
        targets = [tensor for tensor in made if id(tensor) not in arguments]
        for tensor in written:
            targets += [tensor, *self._values.sharing(tensor)]
        for tensor in targets:
            self._waiting[tensor] = {**self._sources(tensor), **sources}

    def _sources(self, tensor: torch.Tensor) -> dict[ValueId, None]:
        waiting = self._waiting.get(tensor)
        if waiting is not None:
            found: dict[ValueId, None] = waiting
            return found
        known = self._values.known(tensor)
        return {} if known is None else {known: None}

    def take(self, structure: Any, frames: tuple[Frame, ...]) -> None:
        """Adds to the trace those tensors of a structure that come from a hook."""
        for _, tensor in tensors_with_paths(structure) if self._waiting else ():
            sources = self._waiting.pop(tensor, None)
            # A tensor that does not depend on the model is a constant.
            if sources:
                self._record(tensor, list(sources), frames)

    def _record(self, tensor: torch.Tensor, sources: list[ValueId], frames: tuple[Frame, ...]) -> None:
        trace, before = self._trace, self._values.known(tensor)
        call = Call(len(trace.calls), USER_HOOK, frames, ())
        operator = Operator(len(trace.operators), USER_HOOK, (), {}, sources, [], call.index, call.module)
        made = self._values.made(tensor, Write(call.index, operator.index))
        call.arguments = operator.arguments = tuple(Ref(value) for value in sources)
        call.inputs = [((position,), value) for position, value in enumerate(sources)]
        call.outputs = [((), made)]
        operator.outputs = [((), made)]
        call.operators = [operator.index]
        call.writes = [] if before is None else [before]
        trace.calls.append(call)
        trace.operators.append(operator)
