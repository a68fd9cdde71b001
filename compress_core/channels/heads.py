"""Finds out which modules compute the number of their heads of attention, so that heads can go as a whole.

A head of attention cannot lose single channels: its scores are divided by the square root of its size. It can go as a
whole if the code computes how many heads there are. `view(batch, time, -1, head_size)` says so itself. Where all sizes
are given, `view(batch, time, width // head_size, head_size)` and `view(batch, time, 12, 64)` look the same in a trace,
and only a trial tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from compress_core.channels.groups import ChannelGroup, ChannelGroups, channel_groups
from compress_core.channels.proof import InputSpec
from compress_core.channels.trials import attempt, trial_of
from compress_core.trace.tracer import Trace


def channel_groups_of_heads(model: nn.Module, trace: Trace, specs: Sequence[InputSpec]) -> ChannelGroups:
    """Finds the channel groups of a model, with heads of attention as channels wherever the model works with fewer.

    For each class of modules whose heads have a given size, one module of a copy of the model is tried.

    Args:
        model: The model; it is not changed.
        trace: The trace of the model.
        specs: The inputs of its forward.
    """
    found = channel_groups(trace)
    kinds: dict[type[nn.Module], list[str]] = {}
    for name in dict.fromkeys(name for name, _ in found.algebra.splits):
        if not _free(found, name):
            kinds.setdefault(type(model.get_submodule(name)), []).append(name)
    accepted: list[str] = []
    for names in kinds.values():
        candidate = channel_groups(trace, frozenset(names[:1]))
        groups = _free(candidate, names[0])
        if groups and attempt(model, trial_of(groups), specs) is None:
            accepted += names
    return channel_groups(trace, frozenset(accepted)) if accepted else found


def _free(found: ChannelGroups, module: str) -> list[ChannelGroup]:
    """Returns the groups of the channels that a module splits; none if some of the channels must stay."""
    numbers = np.unique(list(_numbers(found, module)))
    groups = [found.groups[number] for number in numbers if number >= 0]
    return [] if any(group.obstacle is not None for group in groups) else groups


def _numbers(found: ChannelGroups, module: str) -> Iterator[int]:
    for name, labels in found.algebra.splits:
        if name == module:
            yield from found.numbers[found.classes[labels]].tolist()
