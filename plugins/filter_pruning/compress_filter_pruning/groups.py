"""Groups of channels as pruning sees them, and their form in a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress_core.channels import ChannelGroup, Member, Role, Shrinkage


@dataclass(frozen=True)
class PruningGroup:
    """Channels that are made by the same layers, and go one by one.

    Attributes:
        number: Its number, from 0.
        name: Name of the first weight that makes them.
        channels: The channels that there are now, with all slices of tensors that go with each.
        full_size: How many there were before any was removed physically.
        step: The number of channels that is left is a multiple of this, or all.
    """

    number: int
    name: str
    channels: ChannelGroup
    full_size: int
    step: int = 1

    @property
    def size(self) -> int:
        """How many channels there are."""
        return self.channels.size

    @property
    def makers(self) -> list[Member]:
        """The weights whose filters make the channels."""
        return [member for member in self.channels.members if member.role == Role.MAKES]

    @property
    def modules(self) -> list[str]:
        """Dotted names of the layers that make the channels."""
        return list(dict.fromkeys(member.parameter.rpartition(".")[0] for member in self.makers))

    @property
    def full_filters(self) -> dict[str, int]:
        """Number of filters that each weight had before any was removed physically."""
        per_channel = {m.parameter: int((m.channels >= 0).sum()) // max(self.size, 1) for m in self.makers}
        return {name: count * self.full_size for name, count in per_channel.items()}

    def masked(self, *, batch_norms: bool) -> list[Member]:
        """Returns the dimensions that masks cover."""
        wanted = {Role.MAKES, Role.ADDS, Role.READS} | ({Role.NORMALIZES} if batch_norms else set())
        return [member for member in self.channels.members if member.role in wanted]

    def left(self, level: float) -> int:
        """Returns how many channels a level leaves: a multiple of `step`, never none."""
        exact = math.ceil(self.full_size * (1 - level) - 1e-9)
        return self.rounded(exact)

    def rounded(self, left: int) -> int:
        """Returns the next larger number of channels that is allowed."""
        return min(self.full_size, self.step * math.ceil(max(left, 1) / self.step))

    def shrunk(self, shrinkage: Shrinkage, gone: set[int]) -> PruningGroup:
        """Returns the group as it is when a model has been shrunk.

        Args:
            shrinkage: What happened to the tensors.
            gone: Channels of this group that are gone.
        """
        number = np.full(self.size + 1, -1)
        stay = [channel for channel in range(self.size) if channel not in gone]
        number[stay] = np.arange(len(stay))
        members = tuple(
            replace(m, channels=number[m.channels[shrinkage.kept.get(m.parameter, {}).get(m.dim, slice(None))]])
            for m in self.channels.members
        )
        return replace(self, channels=replace(self.channels, size=len(stay), members=members))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {
            "name": self.name,
            "size": self.size,
            "full_size": self.full_size,
            "step": self.step,
            "members": [
                {"parameter": m.parameter, "dim": m.dim, "role": m.role.name, "channels": _encoded(m.channels)}
                for m in self.channels.members
            ],
        }

    @classmethod
    def from_dict(cls, number: int, saved: Mapping[str, Any]) -> PruningGroup:
        """Takes back what `to_dict` returned."""
        members = tuple(
            Member(str(m["parameter"]), int(m["dim"]), _decoded(m["channels"]), Role[m["role"]])
            for m in saved["members"]
        )
        group = ChannelGroup(int(saved["size"]), members)
        return cls(number, str(saved["name"]), group, int(saved["full_size"]), int(saved["step"]))


def _encoded(channels: np.ndarray) -> list[list[int]]:
    """Returns runs [first channel, how often each is repeated, how many channels]: most arrays are one of them."""
    values = channels.tolist()
    starts = np.flatnonzero(np.diff(channels, prepend=channels[:1] - 1))
    lengths = np.diff(np.append(starts, len(channels))).tolist()
    runs: list[list[int]] = []
    for start, length in zip(starts.tolist(), lengths, strict=True):
        value = values[start]
        if runs and runs[-1][1] == length and value == runs[-1][0] + runs[-1][2] and value >= 0 and runs[-1][0] >= 0:
            runs[-1][2] += 1
        else:
            runs.append([value, length, 1])
    return runs


def _decoded(runs: Sequence[Sequence[int]]) -> np.ndarray:
    parts = [np.repeat(np.arange(first, first + count), repeats) for first, repeats, count in runs]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
