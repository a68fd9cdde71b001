"""Where an algorithm, and what it does to a tensor, stands in the pipeline."""

from __future__ import annotations

import enum


class Stage(enum.IntEnum):
    """Position of an algorithm (and of its weight transforms) in the pipeline.

    Structure is decided first, then sparsity, then precision: a quantizer has to see the weights that sparsity left,
    and sparsity the channels that pruning left. Within one stage the user's order counts.
    """

    STRUCTURE = 10
    SPARSITY = 20
    PRECISION = 30
