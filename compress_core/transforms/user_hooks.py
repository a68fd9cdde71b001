"""Distinguishes calls made by a user's forward hook from calls made by the model's forward.

`nn.Module.__call__` runs the hooks of a module inside the forward of the surrounding module. Calls made by hooks are
neither counted nor transformed. They are recognized by the stack: a frame of `nn.Module._call_impl` that is not at its
call of the forward is running a hook. So nothing has to be wrapped, hooks may be added at any time and in any way (with
keywords, called always, for all modules), and a model without hooks has no overhead.

A few hooks of torch compute parameters of the model: those of `torch.nn.utils.weight_norm`, `spectral_norm` and `prune`
in their old style, and hooks whose class inherits their `__call__`. Their calls are part of the forward.
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
    """The positions at which a code object of torch calls the forward, or calls the function that does."""

    offsets: frozenset[int]
    lines: frozenset[int]


def _calls_of_forward(code: CodeType) -> _Forward:
    """Returns the positions at which `code` calls the forward, or calls the inner function that does."""
    names = {"forward_call", "inner"}
    offsets: set[int] = set()
    lines: set[int] = set()
    wanted = False
    instructions = list(dis.get_instructions(code))
    for instruction, following in itertools.pairwise(instructions):
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and instruction.argval in names:
            wanted = True
        elif instruction.opname.startswith("STORE"):
            wanted = False  # `inner` is only being defined here
        elif wanted and instruction.opname.startswith("CALL"):
            wanted = False
            # During a call, the position of a frame is the instruction or one of its cache entries.
            offsets.update(range(instruction.offset, following.offset))
            lines.add((instruction.positions and instruction.positions.lineno) or 0)
    return _Forward(frozenset(offsets), frozenset(lines))


_CALL = MODULE_CALL
_INNER = next((code for code in _CALL.co_consts if isinstance(code, CodeType) and code.co_name == "inner"), _CALL)
_IN_CALL, _IN_INNER = _calls_of_forward(_CALL), _calls_of_forward(_INNER)
# False if a future torch calls forwards in another way; then hooks are treated as part of the forward.
_IS_KNOWN = bool(_IN_CALL.offsets) and bool(_IN_INNER.offsets)
_COMPUTE_PARAMETERS = [cls.__call__.__code__ for cls in (WeightNorm, SpectralNorm, BasePruningMethod)]


class FrameId(NamedTuple):
    """Identifies a frame of the stack, without a reference that would keep its variables alive."""

    code: CodeType
    id: int

    @classmethod
    def of(cls, frame: FrameType) -> FrameId:
        """Returns the identity of a frame, which is unique while the frame runs."""
        return cls(frame.f_code, id(frame))


def is_in_hook(frame: FrameType | None, around: FrameId | None = None) -> bool:
    """Returns whether a user's hook runs between two frames of the stack.

    Args:
        frame: The inner frame.
        around: The outer frame, which is checked as well; None for the whole stack.
    """
    # Runs for each counted call and takes a microsecond for ten frames. Hashing code objects would take longer.
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
    """Returns whether a user's hook is running; for code that observes the calls of a model."""
    return is_in_hook(sys._getframe(1))


def is_in_traced_hook() -> bool:
    """Returns whether dynamo is tracing code that a user's hook calls.

    A method of a call-site mode calls this, inside a function that has the mode in a variable named `mode`. Dynamo does
    not trace this function but calls it, and treats the result as a constant.
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
    # The mode belongs to eager code around the compiled code.
    return is_in_hook(sys._getframe(), getattr(getattr(asked, "surroundings", None), "frame", None))


def count_traced(index: int, step: int) -> int:
    """Returns how many calls a call-site mode has counted while dynamo traces its forward, and counts further ones.

    A method of the mode calls this. Dynamo allows no change of the mode inside a checkpointed function, so it does not
    trace this function either: the numbers are kept here, in the object by which dynamo represents the mode.

    Args:
        index: Index of the function whose calls are counted.
        step: How many to add.
    """
    counts: dict[int, int] = frames_dynamo_traces().symbolic_locals["self"].value.__dict__.setdefault("traced", {})
    found = counts.get(index, 0)
    counts[index] = found + step
    return found


# The same as torch.compiler.assume_constant_result, which would import dynamo.
is_in_traced_hook._dynamo_marked_constant = True  # type: ignore[attr-defined]
count_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
