"""The batches of a reconstruction: those to solve with, and others to compare the model's outputs on."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compress_core.data.calibration import CalibrationData
from compress_core.torch_internals import tree_map

logger = logging.getLogger(__name__)

# Samples for comparing outputs, as a share of those that are solved with.
_HELD_OUT = 0.25
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
        for given, size in data.batches(sys.maxsize):
            # A copy, because a loader may fill the same tensors again.
            batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, given)
            seen = sum(sizes)
            if not others and seen < wanted and not (seen and 2 * (wanted - seen) < size):
                solving.append(batch)
                sizes.append(size)
                continue
            others.append(batch)
            held_out += size
            if held_out >= _HELD_OUT * seen:
                break
        if others:
            return cls(solving, sizes, others, held_out, held_out)
        note = "the loader has no samples besides those solved with, so outputs were compared on some of these"
        return cls(solving, sizes, solving[-1:], sizes[-1], 0, notes=[note])

    def within(self, gibibytes: float, bytes_of_sample: float, notes: list[str]) -> Batches:
        """Returns as many of the batches as can wait in the middle of a forward at once, at least one.

        Args:
            gibibytes: Memory for what the forwards hold.
            bytes_of_sample: What the two forwards of one sample hold at most.
            notes: Gets a note if there are fewer.
        """
        fitting, total = 0, 0
        for size in self.sizes:
            total += size
            if fitting and total * bytes_of_sample > gibibytes * _GIBIBYTE:
                break
            fitting += 1
        if fitting == len(self.sizes):
            return self
        kept = replace(self, solving=self.solving[:fitting], sizes=self.sizes[:fitting])
        note = (
            f"{kept.samples} instead of {self.samples} samples are used: the forwards of one sample hold "
            f"{bytes_of_sample / 2**20:.0f} MiB, and memory is set to {gibibytes:g} GiB"
        )
        logger.warning("weight reconstruction: %s", note)
        notes.append(note)
        return kept
