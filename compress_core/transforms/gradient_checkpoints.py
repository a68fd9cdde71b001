"""Applies transforms of call sites again when a checkpointed part of a forward is recomputed.

`torch.utils.checkpoint` runs a function in the forward without keeping its activations, and once more in the backward
pass. By then the modes around the forward are gone, so the calls would have no transforms, and gradients would be those
of another function. Each mode therefore notes, at its first call inside a checkpointed function, how many calls it has
counted so far; the recomputation runs under modes that go on from there.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch

from compress_core.torch_internals import checkpoint_of, saved_tensors_hook
from compress_core.transforms.user_hooks import FrameId

_numbers = itertools.count()


class _Mode(Protocol):
    """What this module needs of a `CallSiteMode`."""

    surroundings: Surroundings | None

    def again(self) -> Any:
        """Returns a mode that goes on from the present counts."""


class Surroundings:
    """What surrounds a forward that runs under a mode.

    Args:
        frame: The frame that runs the forward.

    Attributes:
        frame: Its identity.
        number: Forwards that begin later have greater numbers.
    """

    def __init__(self, frame: FrameType) -> None:
        self.frame = FrameId.of(frame)
        self.number = next(_numbers)
        self._grad = torch.is_grad_enabled()
        self._hook = saved_tensors_hook()

    def may_be_checkpointed(self) -> bool:
        """Returns whether what runs now may be run again in the backward pass; asked often, and nearly always no."""
        return saved_tensors_hook() is not self._hook or (self._grad and not torch.is_grad_enabled())


def note_checkpoints(mode: _Mode, surroundings: Surroundings) -> None:
    """Lets the checkpointed functions that are running inside of a forward recompute under its mode."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and surroundings.frame != (frame.f_code, id(frame)):
        found = checkpoint_of(frame)
        if found is not None:
            owner, name = found
            function = getattr(owner, name)
            if not isinstance(function, _Recomputation):
                function = _Recomputation(function)
                setattr(owner, name, function)
            function.add(surroundings.number, mode)
        frame = frame.f_back


class _Recomputation:
    """Runs a checkpointed function again, under the modes that surrounded it at first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._modes: dict[int, _Mode] = {}

    def add(self, number: int, mode: _Mode) -> None:
        """Adds a mode as it is now, unless it has been added before."""
        if number not in self._modes:
            self._modes[number] = mode.again()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for _, mode in sorted(self._modes.items()):  # the outermost first
                again = mode.again()
                again.surroundings = Surroundings(sys._getframe())
                stack.enter_context(again)
            return self._function(*args, **kwargs)
