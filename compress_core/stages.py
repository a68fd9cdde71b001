"""Where an algorithm stands in the pipeline, and how far compression has come."""

from __future__ import annotations

import enum
from collections.abc import Iterable


class Stage(enum.IntEnum):
    """Position of an algorithm (and of its weight transforms) in the pipeline.

    Structure is decided first, then sparsity, then precision: a quantizer has to see the weights that sparsity left,
    and sparsity the channels that pruning left. Within one stage the user's order counts.
    """

    STRUCTURE = 10
    SPARSITY = 20
    PRECISION = 30


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
