"""The statistics of movement sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compress_core import Table
from compress_core.contract.sparsity_statistics import SparsityStatistics
from compress_core.pages import Block


@dataclass(frozen=True)
class ChannelStatistics:
    """What a group of channels loses.

    Attributes:
        weights: Names of the weights that make the channels.
        size: Number of channels, or heads.
        removed: How many of them go at `strip`.
    """

    weights: tuple[str, ...]
    size: int
    removed: int


@dataclass(frozen=True)
class MovementSparsityStatistics(SparsityStatistics):
    """Measured levels.

    Attributes:
        importance_threshold: What scores are compared with; None before the warm-up.
        importance_regularization_factor: The present factor on the loss.
        frozen: Whether the masks are frozen.
        channels: The groups of channels that may be removed.
        whole: Name of a weight whose channels stay -> the reason.
    """

    title: ClassVar[str] = "Movement sparsity"
    figures: ClassVar[Mapping[str, str]] = {
        "importance_threshold": "importance threshold",
        "importance_regularization_factor": "factor on the loss",
        "frozen": "masks frozen",
    }

    importance_threshold: float | None
    importance_regularization_factor: float
    frozen: bool
    channels: tuple[ChannelStatistics, ...]
    whole: Mapping[str, str]

    def tables(self) -> list[Table]:
        """Returns the tables of sparsity, and those of channels."""
        rows = [(", ".join(group.weights), group.size, group.removed) for group in self.channels]
        more = [Table(f"{self.title}: channels and heads", ("made by", "number", "removed"), rows)] if rows else []
        if self.whole:
            more.append(Table(f"{self.title}: channels that stay", ("made by", "because"), list(self.whole.items())))
        return [*super().tables(), *more]

    def blocks(self) -> list[Block]:
        """Returns the tables with bars, without what was left alone."""
        return [
            block for block in super().blocks() if getattr(block, "title", "") != f"{self.title}: channels that stay"
        ]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the weights that are left dense, and those whose channels stay."""
        stay = {name: f"its channels stay: {reason}" for name, reason in self.whole.items()}
        return {**stay, **self.skipped}

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, the layers and the groups as JSON-able values."""
        groups = [{"weights": list(g.weights), "size": g.size, "removed": g.removed} for g in self.channels]
        return {**super().to_dict(), "channels": groups, "whole": dict(self.whole)}
