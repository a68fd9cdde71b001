"""Finds out which groups of channels can be removed, by removing some from copies of the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import nn

from compress_core.channels.algebra import Role
from compress_core.channels.errors import ShrinkError
from compress_core.channels.groups import ChannelGroup
from compress_core.channels.proof import InputSpec, prove
from compress_core.channels.shrinking import shrinkage

logger = logging.getLogger(__name__)


def removable_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], specs: Sequence[InputSpec]
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, str]]]:
    """Returns the groups whose channels can be removed, and the other groups with the reason.

    Copies of the model are shrunk by half of each group. This finds sizes that are hard-coded in a forward
    (`x.view(batch, 64, -1)`) before training begins.

    Args:
        model: The model; it is not changed.
        groups: Groups without an obstacle.
        specs: The inputs of its forward.
    """
    good = [group for group in groups if group.size > 1]
    broken = [(group, "has a single channel") for group in groups if group.size < 2]
    while good:
        error = attempt(model, good, specs)
        if error is None:
            break
        if error.reference:
            logger.warning("cannot check before training whether the model works with fewer channels: %s", error)
            break
        culprit, reason = _culprit(model, good, specs, error)
        broken.append((culprit, reason))
        good = [group for group in good if group is not culprit]
    return good, broken


def _culprit(
    model: nn.Module, groups: list[ChannelGroup], specs: Sequence[InputSpec], error: ShrinkError
) -> tuple[ChannelGroup, str]:
    """Bisects a failing list of groups, to find the first group that cannot be pruned together with those before it."""
    passing: list[ChannelGroup] = []
    while len(groups) > 1:
        half = groups[: len(groups) // 2]
        found = attempt(model, [*passing, *half], specs)
        if found is None:
            passing, groups = [*passing, *half], groups[len(groups) // 2 :]
        else:
            groups, error = half, found
    if passing:
        error = attempt(model, [*passing, *groups], specs) or error
    return groups[0], str(error)


def attempt(model: nn.Module, groups: Sequence[ChannelGroup], specs: Sequence[InputSpec]) -> ShrinkError | None:
    """Removes every second channel of groups from a copy of a model; returns why that does not work, or None."""
    pairs = [(group, set(range(0, group.size, 2))) for group in groups]
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for group, channels in pairs:
            for member in group.members:
                if member.role != Role.OTHER and member.parameter in parameters:
                    gone = [index for index, channel in enumerate(member.channels.tolist()) if channel in channels]
                    parameters[member.parameter].index_fill_(
                        member.dim, torch.tensor(gone, device=parameters[member.parameter].device), 0
                    )
    try:
        prove(masked, shrinkage(masked, pairs), specs)
    except ShrinkError as error:
        return error
    return None
