"""Telling what a user's forward hook computes from what the model's forward computes.

`nn.Module.__call__` runs the hooks of a module inside of the forward of the module around it. What they call is
neither counted nor transformed; it is found by the stack: a frame of `nn.Module._call_impl` that stands anywhere but at
its call of the forward is running a hook. So nothing has to be wrapped or watched, hooks may be added at any time, in
any way (with keywords, called always, for all modules), and a model without hooks does nothing for them.

A few hooks of torch compute parameters of the model: those of `torch.nn.utils.weight_norm`, `spectral_norm` and `prune`
in their old style, and hooks whose class inherits their `__call__`. What these compute is part of the forward.
"""

from __future__ import annotations

import dis
import itertools
import sys
from types import CodeType, FrameType
from typing import NamedTuple

from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compress_core.torch_internals import MODULE_CALL, frames_dynamo_traces


class _Forward(NamedTuple):
    """Where a code object of torch calls the forward, or the code that does."""

    offsets: frozenset[int]
    lines: frozenset[int]


def _calls_of_forward(code: CodeType) -> _Forward:
    """Returns where `code` calls the forward, or the function inside of it that does."""
    names = {"forward_call", "inner"}
    offsets: set[int] = set()
    lines: set[int] = set()
    wanted = False
    instructions = list(dis.get_instructions(code))
    for instruction, following in itertools.pairwise(instructions):
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and instruction.argval in names:
            wanted = True
        elif instruction.opname.startswith("STORE"):
            wanted = False  # `inner` is only being made
        elif wanted and instruction.opname.startswith("CALL"):
            wanted = False
            # Within a call a frame stands at the instruction or at one of its caches.
            offsets.update(range(instruction.offset, following.offset))
            lines.add((instruction.positions and instruction.positions.lineno) or 0)
    return _Forward(frozenset(offsets), frozenset(lines))


_CALL = MODULE_CALL
_INNER = next((code for code in _CALL.co_consts if isinstance(code, CodeType) and code.co_name == "inner"), _CALL)
_IN_CALL, _IN_INNER = _calls_of_forward(_CALL), _calls_of_forward(_INNER)
# Not if torch should come to call forwards in another way: then hooks are taken for a part of the forward.
_IS_KNOWN = bool(_IN_CALL.offsets) and bool(_IN_INNER.offsets)
_COMPUTE_PARAMETERS = [cls.__call__.__code__ for cls in (WeightNorm, SpectralNorm, BasePruningMethod)]


class FrameId(NamedTuple):
    """Which frame of the stack, without a reference that would keep its variables alive."""

    code: CodeType
    id: int

    @classmethod
    def of(cls, frame: FrameType) -> FrameId:
        """Returns the identity of a frame, as long as that runs."""
        return cls(frame.f_code, id(frame))


def is_in_hook(frame: FrameType | None, around: FrameId | None = None) -> bool:
    """Tells whether a user's hook runs between two frames of the stack.

    Args:
        frame: The inner one.
        around: The outer one, which is looked at as well; None for the whole stack.
    """
    # Runs for each call that is counted: a microsecond for ten frames. To hash a code object would take longer.
    last, last_id = around or (None, 0)
    called: CodeType | None = None
    while frame is not None:
        code = frame.f_code
        if code is _CALL or code is _INNER:
            offsets = _IN_CALL.offsets if code is _CALL else _IN_INNER.offsets
            if frame.f_lasti not in offsets and called not in _COMPUTE_PARAMETERS:
                return _IS_KNOWN
        if code is last and id(frame) == last_id:
            break
        called, frame = code, frame.f_back
    return False


def hook_is_running() -> bool:
    """Tells whether a user's hook is running, for those who watch what a model computes."""
    return is_in_hook(sys._getframe(1))


def is_in_traced_hook() -> bool:
    """Tells whether dynamo is tracing code that a user's hook calls.

    Called by a method of a call-site mode, within the function that has the mode in a variable named `mode`. Dynamo
    does not trace this but calls it, and takes what it returns for a constant.
    """
    traced = frames_dynamo_traces()
    asked = getattr(traced.symbolic_locals["self"], "value", None)
    called: CodeType | None = None
    while traced is not None:
        code = traced.f_code
        if code is _CALL or code is _INNER:
            lines = _IN_CALL.lines if code is _CALL else _IN_INNER.lines
            if traced.lineno not in lines and called not in _COMPUTE_PARAMETERS:
                return _IS_KNOWN
        if asked is not None and getattr(traced.symbolic_locals.get("mode"), "value", None) is asked:
            return False
        called, traced = code, getattr(traced, "parent", None)
    # The mode is one of eager code around what is compiled.
    return is_in_hook(sys._getframe(), getattr(asked, "around", None))


# What torch.compiler.assume_constant_result does, which would load dynamo.
is_in_traced_hook._dynamo_marked_constant = True  # type: ignore[attr-defined]
