"""Finds out which modules work with fewer heads of attention, so that heads can go as a whole.

A head of attention cannot lose single channels: its scores are divided by the square root of its size. It can go as a
whole if the code computes how many heads there are, or reads it from an attribute that can be changed.
`view(batch, time, -1, head_size)` says so itself. Where all sizes are given, `view(batch, time, width // head_size,
head_size)`, `view(batch, time, self.heads, self.head_size)` and `view(batch, time, 12, 64)` look the same in a trace,
and only a trial tells them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from torch import nn

from compress_core.channels.groups import ChannelGroup, ChannelGroups, channel_groups
from compress_core.channels.inputs import InputSpec, example_arguments
from compress_core.channels.shrinking import shrinkage
from compress_core.channels.trials import Removal, attempt, trial_of
from compress_core.trace import Example, ForwardTrace, Trace, TraceError, trace
from compress_core.transforms.python_state import copied

# Name of a module -> its attributes that are proportional to the number of heads.
_Attributes: TypeAlias = "dict[str, tuple[str, ...]]"


def channel_groups_of_heads(model: nn.Module, traced: Trace, specs: Sequence[InputSpec]) -> ChannelGroups:
    """Finds the channel groups of a model, with heads of attention as channels wherever the model works with fewer.

    The modules of a class whose heads have a given size are tried on a copy of the model: as they are, and then with
    their attributes for the number of heads and for the width of all heads changed.

    Args:
        model: The model; it is not changed.
        traced: The trace of the model.
        specs: The inputs of its forward.
    """
    groups_with = functools.cache(lambda names: channel_groups(traced, names))
    found = groups_with(frozenset())
    kinds: dict[type[nn.Module], list[str]] = {}
    for name in dict.fromkeys(split.module for split in found.algebra.splits):
        if not _free(found, name):
            kinds.setdefault(type(model.get_submodule(name)), []).append(name)
    accepted: _Attributes = {}
    for of_class in kinds.values():
        candidate = groups_with(frozenset(of_class))
        names = [name for name in of_class if _free(candidate, name)]
        works = _working(model, traced, groups_with, names, specs)
        if not works and len(names) > 1 and _working(model, traced, groups_with, names[:1], specs):
            # Mostly all modules of a class work alike; here not.
            for name in names:
                works |= _working(model, traced, groups_with, [name], specs)
        accepted |= works
    return _with_heads(groups_with(frozenset(accepted)), accepted) if accepted else found


def _working(
    model: nn.Module,
    traced: Trace,
    groups_with: Callable[[frozenset[str]], ChannelGroups],
    names: Sequence[str],
    specs: Sequence[InputSpec],
) -> _Attributes:
    """Returns the modules with their attributes if a copy of the model works with fewer heads in all of them."""
    if not names:
        return {}
    found = groups_with(frozenset(names))
    for find in (lambda *_: (), _sizes_of_heads):
        attributes = {name: find(model, found, name) for name in names}
        groups = _with_heads(found, attributes)
        numbers = {n for name in names for n in _numbers(found, name) if n >= 0}
        removals = trial_of([groups.groups[number] for number in sorted(numbers)])
        whole = attempt(model, removals, specs) is None
        if whole and _heads_stay_whole(model, traced, found, names, removals, specs):
            return attributes
    return {}


def _heads_stay_whole(
    model: nn.Module,
    traced: Trace,
    found: ChannelGroups,
    modules: Sequence[str],
    removals: Sequence[Removal],
    specs: Sequence[InputSpec],
) -> bool:
    """Returns whether heads have the size that they had when some are gone from a copy.

    Equal outputs do not show it: where attention looks everywhere alike, heads of another size compute nearly the same.
    """
    smaller = copied(model)
    shrinkage(smaller, removals).apply(smaller)
    before = traced.forwards[0].operators
    device = next((parameter.device for parameter in smaller.parameters()), None)
    args, kwargs = example_arguments(specs, device, None, small=False)
    try:
        forward = trace(smaller, Example.of(*args, **kwargs)).forwards[0]
    except TraceError:
        return False
    places = [split.place for split in found.algebra.splits if split.module in modules and split.place is not None]
    return len(forward.operators) == len(before) and all(
        _shape(forward, operator)[dim] == _shape(traced.forwards[0], operator)[dim] for operator, dim in places
    )


def _shape(forward: ForwardTrace, operator: int) -> tuple[int, ...]:
    (_, value), *_ = forward.operators[operator].outputs
    return forward.values[value].shape


def _sizes_of_heads(model: nn.Module, found: ChannelGroups, module: str) -> tuple[str, ...]:
    """Returns the integer attributes of a module that hold the number of its heads, or the width of all of them."""
    counts = {split.heads for split in found.algebra.splits if split.module == module}
    widths = {len(split.labels) for split in found.algebra.splits if split.module == module}
    widths |= {width // 3 for width in widths if width % 3 == 0}  # queries, keys and values made by one layer
    integers = {name: value for name, value in vars(model.get_submodule(module)).items() if type(value) is int}
    return tuple(n for n, value in integers.items() if ("head" in n and value in counts) or value in widths)


def _with_heads(found: ChannelGroups, attributes: Mapping[str, tuple[str, ...]]) -> ChannelGroups:
    """Notes at the groups of heads which modules split them, and what these call the number of heads."""
    groups = list(found.groups)
    for module, names in attributes.items():
        for number in np.unique([n for n in _numbers(found, module) if n >= 0]).tolist():
            group = groups[number]
            pairs = tuple((module, name) for name in names)
            heads = (*group.whole_heads, module)
            groups[number] = replace(group, whole_heads=heads, attributes=(*group.attributes, *pairs))
    return replace(found, groups=groups)


def _free(found: ChannelGroups, module: str) -> list[ChannelGroup]:
    """Returns the groups of the channels that a module splits; none if some of the channels must stay."""
    groups = [found.groups[number] for number in np.unique(list(_numbers(found, module))).tolist() if number >= 0]
    return [] if any(group.obstacle is not None for group in groups) else groups


def _numbers(found: ChannelGroups, module: str) -> Iterator[int]:
    for split in found.algebra.splits:
        if split.module == module:
            yield from found.numbers[found.classes[split.labels]].tolist()
