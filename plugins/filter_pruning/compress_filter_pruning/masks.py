"""Masks of whole channels: one for each parameter, computed from the pruned channels of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from compress_core import Stage, mask_weight
from compress_core.channels import Member
from compress_core.transforms import WeightMask, get_weight_transform, raw_parameter
from compress_core.transforms.checkpoints import mark_filled
from compress_filter_pruning.groups import PruningGroup

_Entries = Mapping[str, Sequence[tuple[int, Member]]]


def masked_parameters(model: nn.Module, groups: Sequence[PruningGroup], *, batch_norms: bool) -> _Entries:
    """Returns the dimensions of parameters that are masked: name -> (number of the group, dimension).

    A weight is masked along its output channels by one group, and along its input channels by another.

    Args:
        model: The model.
        groups: The groups.
        batch_norms: Whether weights and biases of batch norm are masked as well.
    """
    parameters = {name for name, _ in model.named_parameters()}
    found: dict[str, list[tuple[int, Member]]] = {}
    for group in groups:
        for member in group.masked(batch_norms=batch_norms):
            if member.parameter in parameters:
                found.setdefault(member.parameter, []).append((group.number, member))
    return found


def add_masks(model: nn.Module, entries: _Entries, key: str) -> None:
    """Adds masks of ones; they have the dimensions of the parameter, with size 1 in those that are not masked."""
    for name, members in entries.items():
        parameter = raw_parameter(model, name)
        dims = {member.dim for _, member in members}
        shape = [size if dim in dims else 1 for dim, size in enumerate(parameter.shape)]
        mask_weight(model, name, parameter.new_ones(shape), key=key, stage=Stage.STRUCTURE)


def write_masks(model: nn.Module, entries: _Entries, gone: Sequence[Iterable[int]], key: str) -> None:
    """Sets the masks so that exactly these channels are masked.

    Args:
        model: The model, with masks.
        entries: What `masked_parameters` returned.
        gone: The channels to mask in each group.
        key: Name of the transforms.
    """
    numbers = [np.fromiter(channels, np.int64) for channels in gone]
    for name, members in entries.items():
        transform = cast("WeightMask | None", get_weight_transform(model, name, key))
        if transform is None:  # a layer that reads the channels has been replaced since; what it reads is zero
            continue
        mask = torch.ones_like(transform.mask)
        for number, member in members:
            lost = np.flatnonzero(np.isin(member.channels, numbers[number]))
            if len(lost):
                mask.index_fill_(member.dim, torch.from_numpy(lost).to(mask.device), 0)
        transform.mask.copy_(mask)
        transform.is_outdated = False
        mark_filled([transform])


def are_outdated(model: nn.Module, entries: _Entries, key: str) -> bool:
    """Returns whether weights without masks were loaded since `write_masks`; for the arguments see there."""
    found = (cast("WeightMask | None", get_weight_transform(model, name, key)) for name in entries)
    return any(mask is not None and mask.is_outdated for mask in found)
