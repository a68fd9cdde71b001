"""Where an algorithm stands in the pipeline, and how far compression has come."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from compress_core.transforms.stage import Stage

__all__ = ["CompressionStage", "Stage"]


class CompressionStage(enum.IntEnum):
    """How far compression has come, with the names and values that NNCF users know."""

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2

    @staticmethod
    def combine(stages: Iterable[CompressionStage]) -> CompressionStage:
        """Returns the common stage when all agree, else `PARTIALLY_COMPRESSED`; without any, `UNCOMPRESSED`."""
        distinct = set(stages)
        if not distinct:
            return CompressionStage.UNCOMPRESSED
        return distinct.pop() if len(distinct) == 1 else CompressionStage.PARTIALLY_COMPRESSED
