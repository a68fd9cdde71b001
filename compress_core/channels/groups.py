"""From a trace to groups: sets of channels that are alike, with every slice of every tensor that goes with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compress_core.channels import shape_rules  # noqa: F401 - fills the table of rules
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
        channels: For each index of the dimension the number of the channel in the group that it belongs to, or -1;
            shape (size of the dimension,), int64.
        role: What it does with the channels.
    """

    parameter: str
    dim: int
    channels: np.ndarray
    role: Role = Role.OTHER


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that touch the same tensors; each can be removed by itself, with all its slices.

    Attributes:
        size: Number of channels.
        members: Every dimension that has slices of them.
        obstacle: Why the channels must stay; None when they can be removed.
    """

    size: int
    members: tuple[Member, ...]
    obstacle: Obstacle | None = None


@dataclass
class ChannelGroups:
    """All groups of a model.

    Attributes:
        groups: In the order of the parameters.
        algebra: The labels that they come from.
        classes: The class of each label.
        numbers: Position in `groups` of each class; -1 for classes that no parameter has.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    algebra: Algebra = field(default_factory=Algebra)
    classes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups whose channels can be removed."""
        return [group for group in self.groups if group.obstacle is None]


def channel_groups(trace: Trace) -> ChannelGroups:
    """Finds the channel groups of a model.

    Args:
        trace: Its trace; several examples give the union of their constraints.
    """
    algebra = Algebra()
    for forward in [*trace.forwards, *(forward for forward in trace.training if forward is not None)]:
        _carry(forward, algebra)
        algebra.counting = False  # one forward is what a forward costs
    return _grouped(algebra)


def _carry(forward: ForwardTrace, algebra: Algebra) -> None:
    shapes = [value.shape for value in forward.values]
    labels: dict[int, Dims] = {}
    for value in forward.values:
        if value.parameter:
            labels[value.index] = algebra.parameter(value.parameter, value.shape)
        elif value.operator is None:
            labels[value.index] = [None] * len(value.shape)
    for operator in forward.operators:
        for index in operator.inputs:
            labels.setdefault(index, [None] * len(shapes[index]))
        results = propagate(Step(algebra, operator, labels, shapes))
        for (_, index), dims in zip(operator.outputs, results, strict=False):
            labels[index] = dims if len(dims) == len(shapes[index]) else [None] * len(shapes[index])
        for index in operator.overwritten:
            before = forward.values[index].before
            labels[index] = list(labels.get(index if before is None else before, [None] * len(shapes[index])))
    for value in forward.values:
        for dims_of in labels.get(value.index, []) if value.outputs else []:
            algebra.fix(dims_of, Obstacle("", "output", "the model returns it"))


def _grouped(algebra: Algebra) -> ChannelGroups:
    classes = algebra.classes()
    fixed, roles = algebra.fixed(classes), algebra.roles()
    footprint: dict[int, list[tuple[str, int, int]]] = {}
    order: dict[int, int] = {}
    for name, dims in algebra.parameters.items():
        for dim, labels in enumerate(dims):
            numbers, counts = np.unique(classes[labels], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                footprint.setdefault(number, []).append((name, dim, count))
                order.setdefault(number, len(order))
    alike: dict[tuple[tuple[tuple[str, int, int], ...], bool], list[int]] = {}
    for number in sorted(footprint, key=order.__getitem__):
        alike.setdefault((tuple(footprint[number]), number in fixed), []).append(number)
    positions = np.full(len(classes), -1)
    for position, members in enumerate(alike.values()):
        positions[members] = position
    groups = [_group(algebra, classes, roles, key[0], numbers, fixed) for key, numbers in alike.items()]
    return ChannelGroups(groups, algebra, classes, positions)


def _group(
    algebra: Algebra,
    classes: np.ndarray,
    roles: np.ndarray,
    footprint: tuple[tuple[str, int, int], ...],
    numbers: list[int],
    fixed: dict[int, Obstacle],
) -> ChannelGroup:
    position = np.full(len(classes), -1)
    first, dim, _ = footprint[0]
    wanted = set(numbers)
    in_order = [n for n in dict.fromkeys(classes[algebra.parameters[first][dim]].tolist()) if n in wanted]
    position[in_order] = np.arange(len(in_order))
    members = tuple(
        Member(
            name,
            dim,
            position[classes[algebra.parameters[name][dim]]],
            Role(int(roles[algebra.parameters[name][dim]].max(initial=0))),
        )
        for name, dim in dict.fromkeys((name, dim) for name, dim, _ in footprint)
        if not name.startswith("constant ")
    )
    return ChannelGroup(len(numbers), members, fixed.get(numbers[0]))
