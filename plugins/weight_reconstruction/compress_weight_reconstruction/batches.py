"""The batches of a reconstruction: those to solve with, and others to compare the model's outputs on."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compress_core.data.calibration import CalibrationData
from compress_core.data.structures import copied

logger = logging.getLogger(__name__)

# Samples for comparing outputs, as a share of those that are solved with, and at most: all of them run at once.
_HELD_OUT, _MOST_HELD_OUT = 0.25, 64
_GIBIBYTE = 2**30


@dataclass(frozen=True)
class Batches:
    """The batches of a reconstruction.

    Attributes:
        solving: Batches to solve with.
        sizes: Their numbers of samples.
        compared: Batches to compare outputs on: held out, or the last one to solve with if the loader has no others.
        compared_samples: Their number of samples.
        held_out: Number of samples that are held out.
        notes: What the user should know.
    """

    solving: list[Any]
    sizes: list[int]
    compared: list[Any]
    compared_samples: int
    held_out: int
    notes: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples to solve with."""
        return sum(self.sizes)

    @classmethod
    def read(cls, data: CalibrationData, wanted: int) -> Batches:
        """Reads the batches: to solve with, the whole number of batches whose samples are nearest to `wanted`."""
        solving: list[Any] = []
        sizes: list[int] = []
        others: list[Any] = []
        held_out = 0
        for given, size in data.batches(sys.maxsize, "reading data for weight reconstruction"):
            # A copy, because a loader may fill the same tensors again.
            batch = copied(given)
            seen = sum(sizes)
            if not others and seen < wanted and not (seen and 2 * (wanted - seen) < size):
                solving.append(batch)
                sizes.append(size)
                continue
            others.append(batch)
            held_out += size
            if held_out >= min(_HELD_OUT * seen, _MOST_HELD_OUT):
                break
        if others:
            return cls(solving, sizes, others, held_out, held_out)
        note = "the loader has no samples besides those solved with, so outputs were compared on some of these"
        return cls(solving, sizes, solving[-1:], sizes[-1], 0, notes=[note])

    def within(self, gibibytes: float, held: Sequence[float]) -> list[tuple[Any, int]]:
        """Returns the batches to solve with, and the position from which on each can take part.

        Forwards of images hold most at the beginning. A batch for which there is no room then joins later.

        Args:
            gibibytes: Memory for what the forwards hold.
            held: What the two forwards of one sample hold at each position, in bytes.
        """
        room = gibibytes * _GIBIBYTE
        # What is held at most from a position on.
        later = list(itertools.accumulate(reversed(held), max))[::-1] or [0.0]
        joining: list[tuple[Any, int]] = []
        total = 0
        for batch, size in zip(self.solving, self.sizes, strict=True):
            total += size
            # A batch that joins later passes the first layers alone, while the others wait.
            fits = (p for p, most in enumerate(later) if total * most + (size * later[0] if p else 0) <= room)
            position = next(fits, None) if joining else 0
            if position is None:
                break
            joining.append((batch, position))
        self._note(gibibytes, joining, later[0])
        return joining

    def _note(self, gibibytes: float, joining: list[tuple[Any, int]], most: float) -> None:
        used = sum(self.sizes[: len(joining)])
        at_first = sum(size for size, (_, position) in zip(self.sizes, joining, strict=False) if not position)
        if at_first == self.samples:
            return
        late = f", {used - at_first} more in later layers" if used > at_first else ""
        note = (
            f"{at_first} instead of {self.samples} samples are used in the first layers{late}: the forwards of one "
            f"sample hold {most / 2**20:.3g} MiB there, and memory is set to {gibibytes:g} GiB"
        )
        logger.warning("weight reconstruction: %s", note)
        self.notes.append(note)
