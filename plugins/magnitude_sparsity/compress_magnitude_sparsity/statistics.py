"""The statistics of magnitude sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress_core.contract.sparsity_statistics import LayerSparsity, ScheduledSparsityStatistics

__all__ = ["LayerSparsity", "MagnitudeSparsityStatistics"]


@dataclass(frozen=True)
class MagnitudeSparsityStatistics(ScheduledSparsityStatistics):
    """Measured sparsity levels."""

    title: ClassVar[str] = "Magnitude sparsity"
