"""The saved form of channel groups, checked against the model before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn

from compress_core.channels.algebra import Role
from compress_core.channels.groups import ChannelGroup, Member
from compress_core.errors import StateError
from compress_core.saved import STRICT, Items, Positive, Whole, damaged

_Run = tuple[Annotated[int, Field(ge=-1)], Positive, Positive]


class SavedMember(BaseModel):
    """What `group_to_dict` returns of a member."""

    model_config = STRICT
    parameter: str
    dim: Whole
    role: Literal["OTHER", "READS", "NORMALIZES", "ADDS", "MAKES"]
    channels: Items[_Run]


class SavedGroup(BaseModel):
    """What `group_to_dict` returns; a subclass adds what else is saved of a group."""

    model_config = STRICT
    size: Positive
    members: Annotated[Items[SavedMember], Field(min_length=1)]
    whole_heads: Items[str] = []
    attributes: Items[tuple[str, str]] = []

    def check(self, path: str, model: nn.Module) -> None:
        """Checks everything that decides how large the arrays of the group become, before they are made.

        Args:
            path: Where the group is, for messages.
            model: The model, as it was when the group was saved.

        Raises:
            StateError: The group is of another model.
        """
        sizes = {key: tuple(t.shape) for key, t in (*model.named_parameters(), *model.named_buffers())}
        modules = dict(model.named_modules(remove_duplicate=False))
        seen = set()
        for number, member in enumerate(self.members):
            place, shape = f"{path}.members.{number}", sizes.get(member.parameter, ())
            found = shape[member.dim] if member.dim < len(shape) else None
            length = sum(repeats * count for _, repeats, count in member.channels)
            if found != length:
                raise StateError(
                    f"{place}: compression_state does not fit this model: dimension {member.dim} of "
                    f"'{member.parameter}' has to have the size {length}, and "
                    f"{'there is none' if found is None else f'has {found}'}. Build the model as it was before "
                    "compression"
                )
            if any(first + count > self.size or (first < 0 and count > 1) for first, _, count in member.channels):
                raise damaged(f"{place}.channels", f"names channels beyond the {self.size} of the group")
            if (member.parameter, member.dim) in seen:
                raise damaged(place, f"dimension {member.dim} of '{member.parameter}' occurs twice in the group")
            seen.add((member.parameter, member.dim))
        self._check_modules(path, modules)

    def _check_modules(self, path: str, modules: Mapping[str, nn.Module]) -> None:
        for module in (*self.whole_heads, *(module for module, _ in self.attributes)):
            if module not in modules:
                raise damaged(f"{path}.whole_heads", f"the model has no module '{module[:80]}'")
        for module, attribute in self.attributes:
            if type(vars(modules[module]).get(attribute)) is not int:
                raise damaged(f"{path}.attributes", f"the module '{module}' has no integer '{attribute[:80]}'")


def group_to_dict(group: ChannelGroup) -> dict[str, Any]:
    """Returns a group as a JSON-able dict."""
    return {
        "size": group.size,
        "members": [
            {"parameter": m.parameter, "dim": m.dim, "role": m.role.name, "channels": _encoded(m.channels)}
            for m in group.members
        ],
        "whole_heads": list(group.whole_heads),
        "attributes": [list(pair) for pair in group.attributes],
    }


def group_from_dict(saved: Mapping[str, Any]) -> ChannelGroup:
    """Restores a group from what `group_to_dict` returned."""
    members = tuple(
        Member(str(m["parameter"]), int(m["dim"]), _decoded(m["channels"]), Role[m["role"]]) for m in saved["members"]
    )
    attributes = tuple((str(module), str(name)) for module, name in saved.get("attributes", ()))
    heads = tuple(str(name) for name in saved.get("whole_heads", ()))
    return ChannelGroup(int(saved["size"]), members, None, heads, attributes)


def check_channels(group: ChannelGroup, path: str) -> None:
    """Refuses a group of which a member has not all channels.

    Raises:
        StateError: Names the member.
    """
    for number, member in enumerate(group.members):
        occurring = torch.from_numpy(member.channels[member.channels >= 0])
        if int((torch.bincount(occurring, minlength=group.size) == 0).sum()):
            raise damaged(f"{path}.members.{number}.channels", "leaves out channels of the group")


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
