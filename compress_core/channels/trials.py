"""Finds out which groups of channels can be removed, by removing some from copies of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import TypeAlias

import torch
from torch import nn

from compress_core.channels.algebra import Role
from compress_core.channels.errors import ShrinkError
from compress_core.channels.groups import ChannelGroup
from compress_core.channels.inputs import InputSpec
from compress_core.channels.proof import prove
from compress_core.channels.shrinking import shrinkage
from compress_core.channels.sizes import sized_alike, with_sizes

# A group, and the channels of it that are removed.
Removal: TypeAlias = tuple[ChannelGroup, Set[int]]

logger = logging.getLogger(__name__)


def removable_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], specs: Sequence[InputSpec]
) -> tuple[list[ChannelGroup], list[tuple[ChannelGroup, str]]]:
    """Returns the groups whose channels can be removed, and the other groups with the reason.

    Copies of the model are shrunk by a part of each group. This finds sizes that are hard-coded in a forward
    (`x.view(batch, 64, -1)`) before training begins.

    Args:
        model: The model; it is not changed.
        groups: Groups without an obstacle.
        specs: The inputs of its forward.
    """
    good = trial_of([group for group in groups if group.size > 1])
    broken = [(group, "has a single channel") for group in groups if group.size < 2]
    while good:
        error = attempt(model, good, specs)
        if error is None:
            break
        if error.reference:
            logger.warning("cannot check before training whether the model works with fewer channels: %s", error)
            break
        culprit, before, error = _culprit(model, good, specs, error)
        sized = (with_sizes(model, culprit[0], error.module), culprit[1])
        if sized[0].attributes != culprit[0].attributes and attempt(model, [*before, sized], specs) is None:
            # Other layers of the same class will need the same.
            good = [sized if pair is culprit else (sized_alike(model, pair[0], sized[0]), pair[1]) for pair in good]
        else:
            broken.append((culprit[0], str(error)))
            good = [pair for pair in good if pair is not culprit]
    return [group for group, _ in good], broken


def trial_of(groups: Sequence[ChannelGroup]) -> list[Removal]:
    """Returns which channels of groups a trial removes: every second or every third one.

    Parts that differ tell apart two dimensions that have the same size before.
    """
    return [(group, frozenset(range(0, group.size, 2 + number % 2))) for number, group in enumerate(groups)]


def _culprit(
    model: nn.Module, removals: list[Removal], specs: Sequence[InputSpec], error: ShrinkError
) -> tuple[Removal, list[Removal], ShrinkError]:
    """Bisects a failing list of groups.

    Returns:
        The first group that cannot be pruned together with those before it, those before it, and the error.
    """
    passing: list[Removal] = []
    while len(removals) > 1:
        half = removals[: len(removals) // 2]
        found = attempt(model, [*passing, *half], specs)
        if found is None:
            passing, removals = [*passing, *half], removals[len(removals) // 2 :]
        else:
            removals, error = half, found
    if passing:
        error = attempt(model, [*passing, *removals], specs) or error
    return removals[0], passing, error


def attempt(model: nn.Module, removals: Sequence[Removal], specs: Sequence[InputSpec]) -> ShrinkError | None:
    """Removes channels of groups from a copy of a model; returns why that does not work, or None."""
    try:
        prove(model, shrinkage(model, removals), specs, lambda copied: _mask(copied, removals))
    except ShrinkError as error:
        return error
    return None


def _mask(model: nn.Module, removals: Sequence[Removal]) -> None:
    parameters = dict(model.named_parameters())
    for group, channels in removals:
        for member in group.members:
            if member.role != Role.OTHER and member.parameter in parameters:
                gone = [index for index, channel in enumerate(member.channels.tolist()) if channel in channels]
                parameter = parameters[member.parameter]
                parameter.index_fill_(member.dim, torch.tensor(gone, device=parameter.device), 0)
