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
    passing: list[Removal] = []
    rest = trial_of([group for group in groups if group.size > 1])
    broken = [(group, "has a single channel") for group in groups if group.size < 2]
    while passing or rest:
        error = attempt(model, [*passing, *rest], specs)
        if error is None:
            break
        if error.reference:
            logger.warning("cannot check before training whether the model works with fewer channels: %s", error)
            break
        if error.training:
            passing, rest = [], [*passing, *rest]  # these have passed in eval mode only
        number, error = _culprit(model, passing, rest, specs, error)
        culprit, before, rest = rest[number], [*passing, *rest[:number]], rest[number + 1 :]
        sized = with_sizes(model, culprit[0], error.module)
        if sized.attributes != culprit[0].attributes and attempt(model, [*before, (sized, culprit[1])], specs) is None:
            before.append((sized, culprit[1]))
            # Other layers of the same class will need the same.
            rest = [(sized_alike(model, group, sized), channels) for group, channels in rest]
        else:
            broken.append((culprit[0], str(error)))
        passing = before
    return [group for group, _ in [*passing, *rest]], broken


def trial_of(groups: Sequence[ChannelGroup]) -> list[Removal]:
    """Returns which channels of groups a trial removes: every second or every third one.

    Parts that differ tell apart two dimensions that have the same size before.
    """
    return [(group, frozenset(range(0, group.size, 2 + number % 2))) for number, group in enumerate(groups)]


def _culprit(
    model: nn.Module,
    passing: Sequence[Removal],
    removals: Sequence[Removal],
    specs: Sequence[InputSpec],
    error: ShrinkError,
) -> tuple[int, ShrinkError]:
    """Bisects a failing list of groups, to find the first one that cannot be pruned together with those before it.

    Args:
        model: The model.
        passing: Groups that can be pruned together.
        removals: Groups that cannot be pruned together with `passing`.
        specs: The inputs of the forward.
        error: What happens then.

    Returns:
        The index of the first group that fails, and how.
    """
    first, end = 0, len(removals)
    while end - first > 1:
        middle = (first + end) // 2
        found = attempt(model, [*passing, *removals[:middle]], specs, training=error.training)
        if found is None:
            first = middle
        else:
            end, error = middle, found
    return first, error


def attempt(
    model: nn.Module, removals: Sequence[Removal], specs: Sequence[InputSpec], *, training: bool = True
) -> ShrinkError | None:
    """Removes channels of groups from a copy of a model; returns why that does not work, or None.

    Args:
        model: The model; it is not changed.
        removals: The groups, and the channels to remove.
        specs: The inputs of the forward.
        training: Whether to compare in training mode, too.
    """
    try:
        prove(model, shrinkage(model, removals), specs, lambda copied: _mask(copied, removals), training=training)
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
