"""`Stage`: the position of an algorithm and its transforms in the pipeline."""

from __future__ import annotations

import enum


class Stage(enum.IntEnum):
    """Position of an algorithm (and of its weight transforms) in the pipeline.

    Structure comes first, then sparsity, then precision, because a quantizer has to see the sparse weights, and
    sparsity the channels that are left after pruning. Within a stage, the order of the config is kept.
    """

    STRUCTURE = 10
    SPARSITY = 20
    PRECISION = 30
