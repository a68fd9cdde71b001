"""Channels and heads that are masked in every layer that makes or reads them, and their removal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from compress_core.channels import (
    ChannelGroup,
    InputSpec,
    Member,
    Role,
    Shrinkage,
    channel_groups_of_heads,
    input_specs,
    lost_channels,
    removable_groups,
    renumbered,
    shrink_model,
    smaller_group,
)
from compress_core.trace import Example, Trace
from compress_learned_sparsity.movement.structure import Linear

logger = logging.getLogger(__name__)

_MASKED = (Role.MAKES, Role.READS, Role.ADDS)


@dataclass(frozen=True)
class Structure:
    """The channels that may be removed at the end.

    Attributes:
        groups: Their groups; all weights that make or read them have scores.
        inputs: The inputs of the forward.
        whole: Name of a weight whose channels stay -> the reason.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    inputs: list[InputSpec] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)


def find_structure(model: nn.Module, trace: Trace, layers: Sequence[Linear], example: Example | None) -> Structure:
    """Finds the groups of channels that have scores in all their weights, and of which the model can do without some.

    Args:
        model: The model; it is not changed.
        trace: Its trace.
        layers: The layers with scores.
        example: Inputs for comparing the model with smaller ones.
    """
    specs = input_specs(trace.forwards[0], model, example)
    by_name = {layer.weight: layer for layer in layers}
    candidates, whole = [], {}
    for group in channel_groups_of_heads(model, trace, specs).groups:
        members = [m for m in group.members if m.role in (Role.MAKES, Role.READS)]
        makers = [m.parameter for m in members if m.role == Role.MAKES and m.parameter in by_name]
        reason = _reason(group, members, by_name)
        if reason is None:
            candidates.append(group)
        else:
            whole.update({name: reason for name in makers if name not in whole})
    chosen, broken = removable_groups(model, candidates, specs)
    for group, reason in broken:
        whole.update({m.parameter: reason for m in group.members if m.role == Role.MAKES})
    made = {m.parameter for group in chosen for m in group.members if m.role == Role.MAKES}
    return Structure(chosen, specs, {name: reason for name, reason in whole.items() if name not in made})


def _reason(group: ChannelGroup, members: Sequence[Member], layers: Mapping[str, Linear]) -> str | None:
    if group.obstacle is not None:
        return str(group.obstacle)
    if group.size < 2 or not any(m.role == Role.MAKES for m in members):
        return "has a single channel, or nothing makes it"
    for member in members:
        layer = layers.get(member.parameter)
        if layer is None:
            return f"'{member.parameter}' makes or reads the channels too, and has no scores"
        if layer.block[member.dim] == len(member.channels) > 1:
            return f"a score of '{member.parameter}' stands for all of these channels (per_dim, or one block)"
    return None


def dead_channels(group: ChannelGroup, kept: Callable[[str], torch.Tensor | None]) -> set[int]:
    """Returns the channels of a group that are masked in all weights and biases, but never all channels.

    Args:
        group: The group.
        kept: Returns the mask of a tensor, or None if it has no scores.
    """
    alive = np.zeros(group.size, bool)
    for member in group.members:
        mask = kept(member.parameter) if member.role in _MASKED else None
        if mask is not None:
            alive[_channels_alive(member, mask)] = True
    if not alive.any():
        alive[0] = True
    return set(np.flatnonzero(~alive).tolist())


def _channels_alive(member: Member, mask: torch.Tensor) -> np.ndarray:
    others = [dim for dim in range(mask.ndim) if dim != member.dim]
    alive = mask.any(dim=others) if others else mask
    channels: np.ndarray = member.channels[alive.cpu().numpy()]
    found: np.ndarray = channels[channels >= 0]
    return found


def structured_masks(
    groups: Sequence[ChannelGroup],
    gone: Sequence[set[int]],
    layers: Sequence[Linear],
    kept: Callable[[str], torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """Returns the masks of the layers of groups that lose channels: these channels are masked, and nothing else.

    What is masked elsewhere in these layers comes back, as in NNCF: it would make the smaller model no smaller. Layers
    of groups that lose nothing keep their masks.

    Args:
        groups: The groups.
        gone: The channels that each of them loses.
        layers: The layers with scores.
        kept: Returns the present mask of a tensor, or None if it has no scores.

    Returns:
        Name of a tensor -> its mask, boolean.
    """
    masks: dict[str, torch.Tensor] = {}
    for group, lost in zip(groups, gone, strict=True):
        for member in group.members if lost else ():
            before = kept(member.parameter) if member.role in _MASKED else None
            if before is not None:
                mask = masks.setdefault(member.parameter, torch.ones_like(before))
                indices = np.flatnonzero(np.isin(member.channels, sorted(lost)))
                mask.index_fill_(member.dim, torch.from_numpy(indices).to(mask.device), False)
    for layer in layers:
        if layer.weight in masks and layer.bias:
            masks[layer.bias] = masks[layer.weight].any(dim=1 - layer.output_dim)
    return masks


def remove_channels(
    model: nn.Module, structure: Structure, gone: Sequence[set[int]], removed: Shrinkage
) -> Shrinkage | None:
    """Removes masked channels from a model; returns what stays of which tensors, or None if nothing is to be removed.

    Args:
        model: The model.
        structure: The groups, as they were before others removed channels.
        gone: The masked channels of each group.
        removed: What others have removed from this model already.

    Raises:
        ShrinkError: The smaller model would fail or compute something else; the model is not changed.
    """
    pairs = []
    for group, lost in zip(structure.groups, gone, strict=True):
        others = lost_channels(group, removed)
        smaller = smaller_group(group, removed, others) if removed else group
        left = renumbered(lost, others)
        pairs.append((smaller, left if len(left) < smaller.size else left - {max(left)}))
    if not any(lost for _, lost in pairs):
        return None
    found, certificate = shrink_model(model, pairs, structure.inputs)
    logger.info("movement_sparsity: channels that are masked everywhere are removed: %s", certificate)
    return found
