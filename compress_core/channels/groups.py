"""Finds the channel groups of a traced model: sets of channels with the slices of all tensors that belong to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compress_core.channels import product_rules, reduction_rules, shape_rules  # noqa: F401 - they fill the table
from compress_core.channels.algebra import Algebra, Dims, Obstacle, Role
from compress_core.channels.rules import Step, propagate
from compress_core.trace.graph import ForwardTrace
from compress_core.trace.tracer import Trace


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer in a group.

    Attributes:
        parameter: Dotted name.
        dim: The dimension.
        channels: For each index of the dimension, the index of its channel in the group, or -1; shape
            (size of the dimension,), int64.
        role: How the parameter uses the channels.
    """

    parameter: str
    dim: int
    channels: np.ndarray
    role: Role = Role.OTHER


@dataclass(frozen=True)
class ChannelGroup:
    """Channels with slices of the same tensors; each channel can be removed separately, with all its slices.

    Attributes:
        size: Number of channels.
        members: Every dimension of a tensor that has slices of the channels.
        obstacle: Why the channels must stay; None when they can be removed.
        whole_heads: Names of the modules that split these channels into heads, which go as a whole by decision.
        attributes: Module and name of each integer attribute that is proportional to the number of channels.
    """

    size: int
    members: tuple[Member, ...]
    obstacle: Obstacle | None = None
    whole_heads: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass
class ChannelGroups:
    """All groups of a model.

    Attributes:
        groups: The groups, in the order of the parameters.
        algebra: The labels from which the groups were made.
        classes: The class of each label.
        numbers: Position of each class in `groups`; -1 for classes that no parameter has.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    algebra: Algebra = field(default_factory=Algebra)
    classes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups whose channels can be removed."""
        return [group for group in self.groups if group.obstacle is None]


def channel_groups(trace: Trace, whole_heads: frozenset[str] = frozenset()) -> ChannelGroups:
    """Finds the channel groups of a model.

    Sizes that are hard-coded in a forward (`x.view(batch, 64, -1)`) cannot be found here. That is why removing channels
    ends with a check that the smaller model computes the same (`prove`).

    Args:
        trace: The trace of the model; with several examples, the constraints of all of them apply.
        whole_heads: Names of modules whose heads of attention go as a whole (see `channel_groups_of_heads`).
    """
    algebra = Algebra(whole_heads=whole_heads)
    for forward in [*trace.forwards, *(forward for forward in trace.training if forward is not None)]:
        carry(forward, algebra)
        algebra.counting = False  # the cost is that of the first forward only
    return _grouped(algebra)


def carry(forward: ForwardTrace, algebra: Algebra) -> None:
    """Carries labels through a forward: fills an algebra with its parameters, joins, obstacles and products."""
    shapes = [value.shape for value in forward.values]
    labels: dict[int, Dims] = {}
    activations = {value.index for value in forward.inputs}
    for value in forward.values:
        if value.parameter:
            labels[value.index] = algebra.parameter(value.parameter, value.shape)
        elif value.operator is None:
            labels[value.index] = [None] * len(value.shape)
    for operator in forward.operators:
        for index in operator.inputs:
            labels.setdefault(index, [None] * len(shapes[index]))
        results = propagate(Step(algebra, operator, labels, shapes, activations))
        if not activations.isdisjoint(operator.inputs):
            activations.update(value for _, value in operator.outputs)
            activations.update(operator.overwritten)
        for (_, index), dims in zip(operator.outputs, results, strict=False):
            labels[index] = dims if len(dims) == len(shapes[index]) else [None] * len(shapes[index])
        for index in operator.overwritten:
            before = forward.values[index].before
            labels[index] = list(labels.get(index if before is None else before, [None] * len(shapes[index])))
    for value in forward.values:
        for dims_of in labels.get(value.index, []) if value.outputs else []:
            algebra.fix(dims_of, Obstacle("", "output", "the model returns it"))


def _grouped(algebra: Algebra) -> ChannelGroups:
    """Groups the classes that have equally many slices of the same dimensions."""
    classes = algebra.classes()
    reasons, roles = algebra.fixed(classes), algebra.roles()
    places = [(name, dim, labels) for name, dims in algebra.parameters.items() for dim, labels in enumerate(dims)]
    positions, channels, firsts = _alike([classes[labels] for _, _, labels in places], reasons >= 0)
    members: list[list[Member]] = [[] for _ in firsts]
    for name, dim, labels in places:
        groups = positions[classes[labels]]
        for group in [] if name.startswith("constant ") else sorted(set(groups.tolist())):
            own = groups == group
            role = Role(int(roles[labels[own]].max()))
            members[group].append(Member(name, dim, np.where(own, channels[classes[labels]], -1), role))
    sizes = np.zeros(len(firsts), np.int64)
    np.maximum.at(sizes, positions[positions >= 0], channels[positions >= 0] + 1)
    obstacles = [None if reasons[first] < 0 else algebra.obstacle(reasons[first]) for first in firsts]
    groups_found = [
        ChannelGroup(int(size), tuple(own_members), obstacle)
        for size, own_members, obstacle in zip(sizes, members, obstacles, strict=True)
    ]
    return ChannelGroups(groups_found, algebra, classes, positions)


def _alike(places: list[np.ndarray], fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Groups the classes that occur in the same places equally often.

    Each place gets 128 random bits, and a class the sum over its places. Networks have hundreds of thousands of
    classes, and comparing lists of places would take longer than everything else.

    Args:
        places: The classes along each dimension of each parameter.
        fixed: Whether each class must stay; a group never mixes fixed and free classes.

    Returns:
        The group of each class (-1 for numbers that are not a class); the index of the class in its group; the first
        class of each group. Groups and classes are in the order of first occurrence. The number of a class is the
        smallest of its labels.
    """
    draw = np.random.default_rng(0)
    lengths = [len(classes) for classes in places]
    occurring = np.concatenate([np.empty(0, np.int64), *places])
    present = np.flatnonzero(np.bincount(occurring, minlength=len(fixed)))
    keys = [fixed[present]]
    for _ in range(2):
        sums = np.zeros(len(fixed), np.int64)
        np.add.at(sums, occurring, np.repeat(draw.integers(-(1 << 63), 1 << 63, len(places)), lengths))
        keys.append(sums[present])
    order = np.lexsort(keys)  # stable: alike classes stay in their order
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    starts = np.flatnonzero(new)
    number = np.cumsum(new) - 1
    first = order[starts]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    positions, channels = np.full(len(fixed), -1), np.full(len(fixed), -1)
    positions[present[order]] = rank[number]
    channels[present[order]] = np.arange(len(order)) - starts[number]
    return positions, channels, present[np.sort(first)].tolist()
