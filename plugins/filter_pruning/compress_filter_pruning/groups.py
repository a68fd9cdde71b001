"""The channel groups of filter pruning, and their saved form in a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress_core.channels import ChannelGroup, Member, Role, Shrinkage, group_from_dict, group_to_dict, smaller_group


@dataclass(frozen=True)
class PruningGroup:
    """Channels that are produced by the same layers, each of which can be removed separately.

    Attributes:
        number: Number of the group, from 0.
        name: Name of the first weight that produces the channels.
        channels: The present channels, with the slices of all tensors that belong to them.
        full_size: Number of channels before any were removed physically.
        step: The number of channels left is a multiple of this, or all.
    """

    number: int
    name: str
    channels: ChannelGroup
    full_size: int
    step: int = 1

    @property
    def size(self) -> int:
        """Number of present channels."""
        return self.channels.size

    @property
    def makers(self) -> list[Member]:
        """The weights whose filters produce the channels."""
        return [member for member in self.channels.members if member.role == Role.MAKES]

    @property
    def modules(self) -> list[str]:
        """Dotted names of the layers that produce the channels."""
        return list(dict.fromkeys(member.parameter.rpartition(".")[0] for member in self.makers))

    @property
    def full_filters(self) -> dict[str, int]:
        """Number of filters of each weight before any were removed physically."""
        per_channel = {m.parameter: int((m.channels >= 0).sum()) // max(self.size, 1) for m in self.makers}
        return {name: count * self.full_size for name, count in per_channel.items()}

    def masked(self, *, batch_norms: bool) -> list[Member]:
        """Returns the dimensions that masks cover."""
        wanted = {Role.MAKES, Role.ADDS, Role.READS} | ({Role.NORMALIZES} if batch_norms else set())
        return [member for member in self.channels.members if member.role in wanted]

    def left(self, level: float) -> int:
        """Returns the number of channels left at a level: a multiple of `step`, and at least one."""
        exact = math.ceil(self.full_size * (1 - level) - 1e-9)
        return self.rounded(exact)

    def rounded(self, left: int) -> int:
        """Returns the next larger number of channels that is allowed."""
        return min(self.full_size, self.step * math.ceil(max(left, 1) / self.step))

    def shrunk(self, shrinkage: Shrinkage, gone: set[int]) -> PruningGroup:
        """Returns the group after the model has been shrunk.

        Args:
            shrinkage: Which indices of which tensors stay.
            gone: The removed channels of this group.
        """
        return replace(self, channels=smaller_group(self.channels, shrinkage, gone))

    def to_dict(self) -> dict[str, Any]:
        """Returns the group as a JSON-able dict."""
        own = {"name": self.name, "full_size": self.full_size, "step": self.step}
        return own | group_to_dict(self.channels)

    @classmethod
    def from_dict(cls, number: int, saved: Mapping[str, Any]) -> PruningGroup:
        """Restores a group from what `to_dict` returned."""
        channels = group_from_dict(saved)
        return cls(number, str(saved["name"]), channels, int(saved["full_size"]), int(saved["step"]))
