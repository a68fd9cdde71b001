"""Groups of channels after some of them were removed, by whoever did."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import numpy as np

from compress_core.channels.groups import ChannelGroup
from compress_core.channels.shrinking import Shrinkage


def lost_channels(group: ChannelGroup, removed: Shrinkage) -> set[int]:
    """Returns which channels of a group have gone.

    Args:
        group: The group before.
        removed: Which indices of which tensors have stayed.
    """
    for member in group.members:
        kept = removed.kept.get(member.parameter, {}).get(member.dim)
        if kept is not None and kept[-1] < len(member.channels):
            left = set(member.channels[kept].tolist())
            return {channel for channel in set(member.channels.tolist()) - left if channel >= 0}
    return set()


def smaller_group(group: ChannelGroup, removed: Shrinkage, lost: Set[int]) -> ChannelGroup:
    """Returns a group with its channels numbered anew.

    Args:
        group: The group before.
        removed: Which indices of which tensors have stayed.
        lost: Which of its channels have gone.
    """
    number = np.full(group.size + 1, -1)
    stay = [channel for channel in range(group.size) if channel not in lost]
    number[stay] = np.arange(len(stay))
    members = tuple(
        replace(m, channels=number[m.channels[removed.kept.get(m.parameter, {}).get(m.dim, slice(None))]])
        for m in group.members
    )
    return replace(group, size=len(stay), members=members)


def renumbered(channels: Set[int], lost: Set[int]) -> set[int]:
    """Returns the numbers of channels after others, or some of them, have gone."""
    order = sorted(lost)
    return {channel - int(np.searchsorted(order, channel)) for channel in channels if channel not in lost}
