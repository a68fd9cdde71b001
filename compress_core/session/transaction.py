"""All or nothing: a method of the controller that fails, or is interrupted, leaves model and controller as before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import nn

from compress_core.contract.context import Context
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_core.data.ranks import alone, has_exchanged, is_alone, join, settle, together
from compress_core.data.rng import RngState
from compress_core.session.agreement import agree
from compress_core.session.lifecycle import Lifecycle
from compress_core.transforms.containers import SavedContainer
from compress_core.transforms.object_state import ObjectState
from compress_core.transforms.snapshot import ModelSnapshot

T = TypeVar("T")


class Transaction:
    """Runs functions that change a compressed model, or what its algorithms know about it, all or nothing.

    On any error, Ctrl-C included, everything is put back bit for bit: the model, the attributes of controller,
    scheduler, algorithms and initializers, random generators, and other models, optimizers and the like that are
    named. A Ctrl-C that comes once the function has returned is delayed until its changes are complete. While a
    function runs, there is one copy of the model's tensors. A call within another one belongs to the outer one.

    Implements `compress_core.contract.services.TransactionService`.

    Args:
        model: The model.
        owner: The controller.
        lifecycle: The algorithms and initializers.
        scheduler: The scheduler.
    """

    def __init__(self, model: nn.Module, owner: object, lifecycle: Lifecycle, scheduler: object) -> None:
        self.model, self._owner, self._lifecycle, self._scheduler = model, owner, lifecycle, scheduler
        self._open: _Before | None = None
        # A model that was compressed by one process alone is its own for good.
        self._is_alone = is_alone()

    def run(
        self,
        function: Callable[[], T],
        others: Iterable[object] = (),
        *,
        lazily: bool = False,
        call: str = "",
        local: bool = False,
    ) -> T:
        """Returns what the function returns.

        Args:
            function: Called without arguments.
            others: Whatever else may change: models, optimizers, and what else has a `load_state_dict` is put back too.
            lazily: Whether to save nothing, and not to wait for other processes, until a function is run within this
                one, for calls that nearly always change nothing, such as those before each optimizer step.
            call: What is called, for messages; the same in all processes of a training.
            local: Whether one of several processes may call it without the others.

        Raises:
            RankError: Another process failed, calls something else, or does not come.
        """
        if self._open is not None:
            if not lazily and not local:
                join()
            self._open.include(() if lazily else (self, *others))
            return function()
        with alone() if self._is_alone or local else together(call, lazily=lazily):
            return self._run(function, () if lazily else (self, *others))

    def _run(self, function: Callable[[], T], parts: Iterable[object]) -> T:
        interrupts, before = _Interrupts(), _Before()
        try:
            try:
                interrupts.begin()
                self._open = before
                before.include(parts)
                result = function()
                if has_exchanged():
                    agree(self.model, self._lifecycle)
                interrupts.delay()
                settle()
            except BaseException:
                interrupts.delay()
                before.restore()
                raise
        except BaseException:
            # Where a first Ctrl-C has come between an error and the lines above. A second one cannot come any more.
            interrupts.delay()
            before.restore()
            raise
        finally:
            self._open = None
            interrupts.end()
        return result

    def saved(self) -> Iterator[Callable[[], None]]:
        """Saves model and controller; yields functions that restore them."""
        snapshot = ModelSnapshot(self.model)
        yield snapshot.restore
        context = self._lifecycle.context
        members = [*self._lifecycle.algorithms, *self._lifecycle.initializers.values()]
        packages = {type(member).__module__.partition(".")[0] for member in members} | {"compress_core"}

        def is_followed(value: object) -> bool:
            return not isinstance(value, _NOT_FOLLOWED) and type(value).__module__.partition(".")[0] in packages

        roots = [self._owner, self._scheduler, self._lifecycle, context.ledger, *members]
        yield ObjectState(roots, is_followed, snapshot.tensors()).restore
        yield SavedContainer(context.__dict__).restore
        yield RngState(context.generators()).restore


# The user's config and data, to which algorithms refer, and what leads there.
_NOT_FOLLOWED = (BaseModel, CalibrationData, InitArgs, Context, Transaction)


class _Before:
    """What was saved before a function was run."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self._saved: list[object] = []
        # What the snapshots of models have, to which optimizers and averages refer.
        self._in_models: list[nn.Module | torch.Tensor] = []

    def include(self, parts: Iterable[object]) -> None:
        """Saves those parts that are a transaction, a model or else have a `load_state_dict`, each once."""
        for part in parts:
            if any(part is saved for saved in self._saved):
                continue
            if isinstance(part, Transaction):
                self._restore += part.saved()
                self._note(part.model)
            elif isinstance(part, nn.Module):
                self._restore.append(ModelSnapshot(part).restore)
                self._note(part)
            elif hasattr(part, "load_state_dict"):
                self._restore.append(ObjectState([part], _may_change, self._in_models, modules=True).restore)
            self._saved.append(part)

    def _note(self, model: nn.Module) -> None:
        self._in_models += [*model.modules(), *model.parameters(), *model.buffers()]

    def restore(self) -> None:
        """Restores everything; a second call has nothing to do."""
        while self._restore:
            # Only then forgotten: an interrupted restoration goes on where it was.
            self._restore[-1]()
            self._restore.pop()


def _may_change(value: object) -> bool:
    """Returns whether an optimizer, a scheduler or the like may change an object: one with a state, or a function."""
    return hasattr(value, "load_state_dict") or callable(value)


class _Interrupts:
    """Lets a first Ctrl-C come through, and delays all that come after it, or after `delay`, until `end`.

    In other threads than the main one, and where SIGINT has no handler in Python, there is nothing to delay.
    """

    def __init__(self) -> None:
        self._delays = False
        self._late: list[tuple[int, FrameType | None]] = []
        self._handler: Any = None

    def begin(self) -> None:
        """Begins to handle Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                # First: `end` puts back what is noted here, wherever a Ctrl-C comes.
                self._handler = handler
                signal.signal(signal.SIGINT, self._came)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._delays:
            self._late.append((number, frame))
            return
        # Before the exception: what it leads to must not be interrupted again.
        self._delays = True
        self._handler(number, frame)
        self._delays = False  # a handler of the user's that raises nothing

    def delay(self) -> None:
        """Delays every Ctrl-C from now on."""
        self._delays = True

    def end(self) -> None:
        """Handles the next Ctrl-C as before, and one that was delayed now."""
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._late:
            self._handler(*self._late[0])
