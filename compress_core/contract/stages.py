"""`Stage`, the position of an algorithm in the pipeline, and `CompressionStage`, the progress of compression."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from compress_core.transforms.stage import Stage

__all__ = ["CompressionStage", "Stage"]


class CompressionStage(enum.IntEnum):
    """The progress of compression, with NNCF's names and values."""

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2

    def __add__(self, other: int) -> CompressionStage:
        """Returns the common stage of two; not the sum of their numbers: UNCOMPRESSED + FULLY is PARTIALLY."""
        if not isinstance(other, CompressionStage):
            return NotImplemented
        return CompressionStage.combine((self, other))

    @staticmethod
    def combine(stages: Iterable[CompressionStage]) -> CompressionStage:
        """Returns the common stage if all are equal, else `PARTIALLY_COMPRESSED`; `UNCOMPRESSED` if there are none."""
        distinct = set(stages)
        if not distinct:
            return CompressionStage.UNCOMPRESSED
        return distinct.pop() if len(distinct) == 1 else CompressionStage.PARTIALLY_COMPRESSED
