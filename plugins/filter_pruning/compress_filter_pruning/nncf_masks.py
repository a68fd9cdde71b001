"""Masks of filters that NNCF has saved, as masked channels of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress_core.contract.nncf_tensors import NncfTensor
from compress_filter_pruning.groups import PruningGroup


def masks_of_nncf(
    groups: Sequence[PruningGroup], gone: Sequence[Sequence[int]], tensors: Sequence[NncfTensor]
) -> tuple[list[list[int]], list[str]]:
    """Returns the masked channels of each group, and the keys of the tensors that say so.

    Those of a group are taken where the masks of all layers that make its channels agree; else it keeps its own.

    Args:
        groups: The groups.
        gone: The channels of each that are masked now.
        tensors: What NNCF has saved.
    """
    given = {f"{t.module}.weight": t for t in tensors if t.name == "_binary_filter_pruning_mask"}
    found, taken = [list(channels) for channels in gone], []
    for number, group in enumerate(groups):
        masks = [(m, given[m.parameter]) for m in group.makers if m.parameter in given]
        fits = all(len(member.channels) == tensor.value.numel() for member, tensor in masks)
        wanted = [masked_channels(member.channels, tensor.value) for member, tensor in masks] if fits else []
        if wanted and len(wanted) == len(group.makers) and all(channels == wanted[0] for channels in wanted):
            found[number] = wanted[0]
            taken += [tensor.key for _, tensor in masks]
            # Those of its normalization layers repeat what its makers say.
            members = {member.parameter for member in group.channels.members}
            taken += [t.key for name, t in given.items() if name in members and t.key not in taken]
    return found, taken


def masked_channels(channels: Any, mask: torch.Tensor) -> list[int]:
    """Returns the channels of which a filter is masked.

    Args:
        channels: Channel of each filter, -1 for none.
        mask: 1 for each filter that is kept, else 0.
    """
    masked = torch.as_tensor(channels)[mask.flatten().cpu() == 0]
    return sorted({int(channel) for channel in masked if channel >= 0})
