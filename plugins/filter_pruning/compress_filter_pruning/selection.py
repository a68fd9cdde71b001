"""Chooses how many and which channels of each group are pruned at a level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compress_core.channels import Costs
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.latency_model import LatencyModel

# In rankings over all groups, at least this share of each group stays, so that no layer becomes a bottleneck.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Selector:
    """Turns a level into the number of channels left in each group.

    Attributes:
        groups: The groups.
        costs: Cost in floating point operations, in parameters, or in seconds.
        counts_costs: Whether a level is a share of the cost, instead of the channels.
        is_global: Whether channels are ranked over all groups together.
    """

    groups: Sequence[PruningGroup]
    costs: Costs | LatencyModel
    counts_costs: bool
    is_global: bool

    def left(self, level: float, ranking: Callable[[], Sequence[torch.Tensor]]) -> list[int]:
        """Returns the number of channels left in each group.

        At level 0 all channels stay. A level in channels is never exceeded, because rounding to a multiple keeps more
        channels. A level in operations, parameters or time is reached, or everything is pruned that can be.

        Args:
            level: The level, 0 <= level < 1.
            ranking: Returns the importance of the channels of each group; called only for rankings over all groups.
        """
        if level <= 0:
            return [group.full_size for group in self.groups]
        if self.is_global:
            return self._global(level, ranking())
        if self.counts_costs:
            return self._uniform_costs(level)
        return [group.left(level) for group in self.groups]

    def most(self) -> float:
        """Returns the largest share of the cost that can be pruned."""
        return 1 - self.costs.of(self.least()) / self._full

    def least(self) -> list[int]:
        """Returns the number of channels that each group has to keep."""
        return [group.rounded(self._floor(group)) for group in self.groups]

    def most_level(self) -> float:
        """Returns the highest level, of operations, parameters, time or channels as levels count.

        Below 1 with all but channels, because at least one channel of each group stays. Levels in channels are
        rounded for each group, so all below 1 can be asked for.
        """
        return self.most() if self.counts_costs else 1.0

    @property
    def _full(self) -> float:
        return self.costs.of([group.full_size for group in self.groups])

    def _floor(self, group: PruningGroup) -> int:
        return max(1, -int(-group.full_size * _LEAST_SHARE // 1)) if self.is_global else 1

    def _uniform_costs(self, level: float) -> list[int]:
        """Returns the channels left at the smallest uniform level in channels that prunes enough of the cost."""
        sizes = [(group.full_size, left) for group in self.groups for left in range(1, group.full_size + 1)]
        levels = sorted({1 - left / size for size, left in sizes})
        wanted = (1 - level) * self._full
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            enough = self.costs.of([group.left(levels[middle]) for group in self.groups]) <= wanted
            low, high = (low, middle) if enough else (middle + 1, high)
        return [group.left(levels[low]) for group in self.groups]

    def _global(self, level: float, importances: Sequence[torch.Tensor]) -> list[int]:
        """Prunes the least important channels of all groups, one after another, until the level is reached."""
        owners = torch.cat([torch.full((len(values),), number) for number, values in enumerate(importances)])
        # Channels that were removed physically count as the first ones pruned.
        gone = [group.full_size - group.size for group in self.groups]
        order = owners[torch.sort(torch.cat(list(importances)), stable=True).indices]

        def left(count: int) -> list[int]:
            removed = torch.bincount(order[:count], minlength=len(self.groups)).tolist()
            return [
                max(group.rounded(group.full_size - g - r), group.rounded(self._floor(group)))
                for group, g, r in zip(self.groups, gone, removed, strict=True)
            ]

        total = sum(group.full_size for group in self.groups)
        if self.counts_costs:
            wanted = (1 - level) * self._full
            count = _first(len(order), lambda n: self.costs.of(left(n)) <= wanted)
        else:
            most = round(level * total)
            count = _first(len(order), lambda n: total - sum(left(n)) > most)
            count -= total - sum(left(count)) > most
        return left(count)


def _first(end: int, holds: Callable[[int], bool]) -> int:
    """Returns the first number in [0, end] for which a condition holds, or `end`; the condition must be monotonic."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def least_important(importance: torch.Tensor, count: int) -> list[int]:
    """Returns the `count` least important channels; among equal ones the first."""
    return sorted(torch.sort(importance, stable=True).indices[: max(count, 0)].tolist())
