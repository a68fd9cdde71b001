"""The cost of a model with fewer channels: operations and parameters as functions of the sizes of its groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch import nn

from compress_core.channels.algebra import Algebra
from compress_core.channels.groups import ChannelGroup, ChannelGroups, carry
from compress_core.channels.inputs import batch_size, input_specs
from compress_core.saved import STRICT, Items, Whole, damaged, parsed, shown
from compress_core.trace.graph import ForwardTrace

# Of the largest networks a few hundred thousand; each takes 8 bytes.
_MOST_SLOPES = 1 << 22


class _SavedCosts(BaseModel):
    model_config = STRICT
    groups: Whole
    terms: Items[tuple[Whole, Items[tuple[Whole, dict[str, Whole]]]]]


@dataclass(frozen=True)
class Costs:
    """A cost as a sum of products of sizes, each of which is linear in the numbers of channels left.

    Term t costs `constants[t]` times the product over its factors f of `fixed[t, f] + slopes[t, f] @ left`; `left` is
    the number of channels left in each group.

    Attributes:
        constants: Shape (terms,).
        fixed: The constant part of each factor; shape (terms, factors).
        slopes: What each channel of a group adds to a factor; shape (terms, factors, groups).
    """

    constants: np.ndarray
    fixed: np.ndarray
    slopes: np.ndarray

    @classmethod
    def nothing(cls) -> Costs:
        """Returns a cost of 0, without terms."""
        return cls(np.empty(0, np.int64), np.empty((0, 0), np.int64), np.empty((0, 0, 0), np.int64))

    def of(self, left: Sequence[int] | np.ndarray) -> int:
        """Returns the cost with `left[g]` channels left in group g, exactly."""
        sizes = self.fixed + self.slopes @ np.asarray(left, np.int64)
        return int(self.constants @ sizes.prod(axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict; terms that depend on the same groups in the same way are added up."""
        terms: dict[str, list[Any]] = {}
        for constant, fixed, slopes in zip(self.constants, self.fixed, self.slopes, strict=True):
            factors = [
                [int(f), {str(g): int(row[g]) for g in np.flatnonzero(row)}]
                for f, row in zip(fixed, slopes, strict=True)
                if f != 1 or row.any()
            ]
            terms.setdefault(str(factors), [0, factors])[0] += int(constant)
        return {"groups": int(self.slopes.shape[2]), "terms": list(terms.values())}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], sizes: Sequence[int], path: str = "costs") -> Costs:
        """Restores an object from what `to_dict` returned.

        Args:
            saved: The dict.
            sizes: Number of channels of each group; with them the cost has to fit in 64 bits.
            path: Where the dict is, for messages.

        Raises:
            StateError: `saved` was not returned by `to_dict` for as many groups.
        """
        found, groups = parsed(_SavedCosts, saved, path), len(sizes)
        if found.groups != groups:
            raise damaged(f"{path}.groups", f"there are {groups} groups, got {found.groups}")
        width = max((len(factors) for _, factors in found.terms), default=0)
        if len(found.terms) * width * groups > _MOST_SLOPES:
            raise damaged(f"{path}.terms", f"has {len(found.terms)} terms of up to {width} factors, too many")
        terms, total = [], 0
        for number, (constant, factors) in enumerate(found.terms):
            rows, cost = [], constant
            for fixed, slopes in factors:
                row = np.zeros(groups, np.int64)
                for group, slope in slopes.items():
                    if group not in map(str, range(groups)):
                        raise damaged(f"{path}.terms.{number}", f"there are {groups} groups, got {shown(group)}")
                    row[int(group)] = slope
                rows.append((fixed, row))
                # In Python's integers, which do not overflow.
                cost *= fixed + sum(slope * sizes[int(group)] for group, slope in slopes.items())
            terms.append((constant, rows))
            total += cost
            if total >= 2**63:
                raise damaged(f"{path}.terms.{number}", "brings the cost beyond 64 bits")
        return _stacked(terms, groups)


def count_operations(forward: ForwardTrace) -> int:
    """Returns the floating point operations of one sample in a traced forward.

    Two for each multiply-accumulate of products of matrices and convolutions, as in `operation_costs`; nothing else
    counts.
    """
    algebra = Algebra()
    carry(forward, algebra)
    total = sum(2 * product.constant * math.prod(map(len, product.factors)) for product in algebra.products)
    samples = max(batch_size(input_specs(forward)), 1)  # an empty batch costs nothing
    return total if total % samples else total // samples


def operation_costs(found: ChannelGroups, chosen: Sequence[ChannelGroup], batch_size: int = 1) -> Costs:
    """Returns the floating point operations (two per multiply-accumulate) of products of matrices and convolutions.

    Args:
        found: The groups of a model.
        chosen: The groups whose channels may be removed, in the order of `Costs.of`.
        batch_size: Number of samples in the traced batch; the result is the cost of one sample.
    """
    # The chosen groups may have attributes that the groups of the model do not have yet; their members are the same.
    position = {id(group.members): number for number, group in enumerate(chosen)}
    numbers = np.array([position.get(id(group.members), -1) for group in found.groups] + [-1])
    terms = []
    for product in found.algebra.products:
        rows = [
            _factor(numbers[found.numbers[found.classes[labels]]], [group.size for group in chosen])
            for labels in product.factors
        ]
        terms.append((2 * product.constant, rows))
    costs = _stacked(terms, len(chosen))
    whole = costs.constants % batch_size == 0
    return costs if not whole.all() else Costs(costs.constants // batch_size, costs.fixed, costs.slopes)


def parameter_costs(model: nn.Module, chosen: Sequence[ChannelGroup]) -> Costs:
    """Returns the number of a model's parameters; arguments as for `operation_costs`."""
    return member_costs(
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        [{(m.parameter, m.dim): m.channels for m in group.members} for group in chosen],
        [group.size for group in chosen],
    )


def member_costs(
    shapes: Mapping[str, tuple[int, ...]],
    members: Sequence[Mapping[tuple[str, int], np.ndarray]],
    sizes: Sequence[int],
) -> Costs:
    """Returns the number of elements of tensors.

    Args:
        shapes: Their shapes by name.
        members: For each group (tensor, dim) -> the channel of each index, or -1.
        sizes: Number of channels of each group.
    """
    slopes: dict[tuple[str, int], dict[int, int]] = {}
    for number, group in enumerate(members):
        for key, channels in group.items():
            slopes.setdefault(key, {})[number] = int((channels >= 0).sum()) // sizes[number]
    terms = []
    for name, shape in shapes.items():
        rows = []
        for dim, size in enumerate(shape):
            row = np.zeros(len(sizes), np.int64)
            for number, slope in slopes.get((name, dim), {}).items():
                row[number] = slope
            rows.append((size - int(row @ np.asarray(sizes, np.int64)), row))
        terms.append((1, rows))
    return _stacked(terms, len(sizes))


def _factor(groups: np.ndarray, sizes: Sequence[int]) -> tuple[int, np.ndarray]:
    row = np.zeros(len(sizes), np.int64)
    numbers, counts = np.unique(groups[groups >= 0], return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        row[number] = count // sizes[number]
    return len(groups) - int(row @ np.asarray(sizes, np.int64)), row


def _stacked(terms: Iterable[tuple[int, list[tuple[int, np.ndarray]]]], groups: int) -> Costs:
    listed = list(terms)
    width = max((len(rows) for _, rows in listed), default=0)
    fixed = np.ones((len(listed), width), np.int64)
    slopes = np.zeros((len(listed), width, groups), np.int64)
    for number, (_, rows) in enumerate(listed):
        for position, (constant, row) in enumerate(rows):
            fixed[number, position], slopes[number, position] = constant, row
    return Costs(np.array([constant for constant, _ in listed], np.int64), fixed, slopes)
