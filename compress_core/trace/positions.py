"""Where in the code a call stands: positions in the stack of Python frames."""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import TypeAlias

# One entry for each stack frame: the code object, and the instruction being executed.
Location: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RunningFrame:
    """The stack frame that runs a module's hooks and calls its forward.

    Attributes:
        frame: The frame.
        above: Positions from the model's forward down to the call of this module; empty for the model itself.
        parent: The frame of the module around this one.
    """

    frame: FrameType
    above: Location
    parent: RunningFrame | None

    @classmethod
    def of(cls, frame: FrameType, parent: RunningFrame | None) -> RunningFrame:
        """Returns the record for a module whose hook is called from `frame`."""
        return cls(frame, () if parent is None else location_below(parent, frame.f_back), parent)

    @property
    def depth(self) -> int:
        """Number of frames between the model's own code and the module's code."""
        return 0 if self.parent is None else len(self.above) + 1


def location_below(running: RunningFrame, caller: FrameType | None) -> Location:
    """Returns the positions from the model's forward down to `caller`, a frame below `running`.

    The positions of frames above `running` do not change while it runs, so they are not determined again.
    """
    positions = []
    frame = caller
    while frame is not None and frame is not running.frame:
        positions.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    if running.parent is None:
        return tuple(reversed(positions))
    positions.append((id(running.frame.f_code), running.frame.f_lasti))
    return running.above + tuple(reversed(positions))
