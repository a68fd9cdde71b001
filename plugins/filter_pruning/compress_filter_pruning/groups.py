"""The channel groups of filter pruning, and their saved form in a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress_core.channels import ChannelGroup, Member, Role, Shrinkage


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
        number = np.full(self.size + 1, -1)
        stay = [channel for channel in range(self.size) if channel not in gone]
        number[stay] = np.arange(len(stay))
        members = tuple(
            replace(m, channels=number[m.channels[shrinkage.kept.get(m.parameter, {}).get(m.dim, slice(None))]])
            for m in self.channels.members
        )
        return replace(self, channels=replace(self.channels, size=len(stay), members=members))

    def to_dict(self) -> dict[str, Any]:
        """Returns the group as a JSON-able dict."""
        return {
            "name": self.name,
            "size": self.size,
            "full_size": self.full_size,
            "step": self.step,
            "members": [
                {"parameter": m.parameter, "dim": m.dim, "role": m.role.name, "channels": _encoded(m.channels)}
                for m in self.channels.members
            ],
            "whole_heads": list(self.channels.whole_heads),
            "attributes": [list(pair) for pair in self.channels.attributes],
        }

    @classmethod
    def from_dict(cls, number: int, saved: Mapping[str, Any]) -> PruningGroup:
        """Restores a group from what `to_dict` returned."""
        members = tuple(
            Member(str(m["parameter"]), int(m["dim"]), _decoded(m["channels"]), Role[m["role"]])
            for m in saved["members"]
        )
        attributes = tuple((str(module), str(name)) for module, name in saved.get("attributes", ()))
        heads = tuple(str(name) for name in saved.get("whole_heads", ()))
        group = ChannelGroup(int(saved["size"]), members, None, heads, attributes)
        return cls(number, str(saved["name"]), group, int(saved["full_size"]), int(saved["step"]))


def _encoded(channels: np.ndarray) -> list[list[int]]:
    """Returns an array as runs [first channel, repetitions of each, number of channels]; most arrays are one run."""
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
