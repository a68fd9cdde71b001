"""Labels on the slices of tensors, to find which slices can only be removed together.

Every index of every dimension of a parameter gets a label. Rules (`compress_core.channels.rules`) carry the labels
through the operators of a trace: each dimension of a value has a label for each index, or none if the dimension does
not depend on any parameter. Where an operator combines two indices (an addition, a contraction), their labels are
*joined*. Where a dimension must keep its size, its labels are *fixed*, with a reason. Joined labels are removed
together. This is the dependency of DepGraph (Fang et al., 2023, arXiv:2301.12900), by index instead of by layer.

A removed index need not be zero in the masked network, because every weight that reads it is masked as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np

# The labels along one dimension; None for a dimension whose size does not depend on a parameter.
Labels: TypeAlias = "np.ndarray | None"
# The labels of a value, dimension by dimension.
Dims: TypeAlias = "list[Labels]"


@dataclass(frozen=True)
class Obstacle:
    """Why a dimension must keep its size.

    Attributes:
        module: Dotted name of the module that calls the operator.
        operator: Name of the operator.
        reason: What the operator does with the dimension.
    """

    module: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} in '{self.module or 'model'}': {self.reason}"


class Role(IntEnum):
    """How a parameter uses the channels along one of its dimensions."""

    OTHER = 0
    """Scales or shifts the channels, or any other use."""
    READS = 1
    """Sums over the channels: the input dimension of a weight."""
    NORMALIZES = 2
    """Scales or shifts the channels after the normalization of a batch norm."""
    ADDS = 3
    """A bias."""
    MAKES = 4
    """The output dimension of a weight."""


@dataclass(frozen=True)
class Product:
    """The cost of a matrix product or a convolution.

    Attributes:
        constant: Multiply-accumulate operations for each combination of the indices of `factors`.
        factors: Labels along the dimensions that can shrink; the cost is proportional to the length of each.
    """

    constant: int
    factors: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Split:
    """A dimension of channels that becomes several, such as heads of attention.

    Attributes:
        module: Dotted name of the module that splits.
        labels: The labels of the channels.
        heads: Length of the dimension before the last one that the channels are spread over.
        place: Number of the operator in the first forward, and the last dimension that the channels are spread over,
            which has the size of a head; None for further forwards.
    """

    module: str
    labels: np.ndarray
    heads: int
    place: tuple[int, int] | None = None


@dataclass
class Algebra:
    """The labels of a model, and which of them are joined or fixed.

    Attributes:
        parameters: Name of each parameter or buffer -> the labels of its dimensions.
        products: The products of the first forward.
        counting: Whether products are being recorded.
        whole_heads: Names of the modules that split channels into heads of a fixed size, so that heads go as a whole.
        splits: Every split of channels into several dimensions whose sizes are all given, so that it cannot be seen
            which of them the code computes.
    """

    parameters: dict[str, list[np.ndarray]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    counting: bool = True
    whole_heads: frozenset[str] = frozenset()
    splits: list[Split] = field(default_factory=list)
    _roles: list[tuple[Role, np.ndarray]] = field(default_factory=list)
    _size: int = 0
    _left: list[np.ndarray] = field(default_factory=list)
    _right: list[np.ndarray] = field(default_factory=list)
    _fixed: list[tuple[np.ndarray, Obstacle]] = field(default_factory=list)

    def parameter(self, name: str, shape: Sequence[int]) -> Dims:
        """Returns the labels of a parameter or buffer; the first call creates them."""
        if name not in self.parameters:
            dims = []
            for size in shape:
                dims.append(np.arange(self._size, self._size + size))
                self._size += size
            self.parameters[name] = dims
        return list(self.parameters[name])

    def join(self, left: Labels, right: Labels) -> None:
        """Joins the labels of two dimensions of the same length, index by index."""
        if left is not None and right is not None and left is not right:
            self._left.append(left)
            self._right.append(right)

    def join_all(self, rows: np.ndarray) -> np.ndarray:
        """Joins the labels in each column of `rows`; returns the first row."""
        for row in rows[1:]:
            self.join(rows[0], row)
        first: np.ndarray = rows[0]
        return first

    def fix(self, labels: Labels, obstacle: Obstacle) -> None:
        """Keeps a dimension at its size."""
        if labels is not None:
            self._fixed.append((labels, obstacle))

    def mark(self, role: Role, labels: Labels) -> None:
        """Records how the channels of a dimension are used."""
        if labels is not None:
            self._roles.append((role, labels))

    def roles(self) -> np.ndarray:
        """Returns the role of each label, the highest if several were marked; shape (labels,)."""
        found = np.zeros(self._size, np.int8)
        for role, labels in self._roles:
            found[labels] = np.maximum(found[labels], role)
        return found

    def multiply(self, sizes: Sequence[tuple[int, Labels]]) -> None:
        """Records a product.

        Args:
            sizes: Length and labels of each dimension that the number of operations is proportional to.
        """
        if self.counting:
            constant = math.prod(size for size, labels in sizes if labels is None)
            self.products.append(Product(constant, tuple(labels for _, labels in sizes if labels is not None)))

    def classes(self) -> np.ndarray:
        """Returns the class of each label, shape (labels,). Labels of one class are removed together."""
        left = np.concatenate([np.empty(0, np.int64), *self._left])
        right = np.concatenate([np.empty(0, np.int64), *self._right])
        return _components(self._size, left, right)

    def fixed(self, classes: np.ndarray) -> np.ndarray:
        """Returns for each class the index of the first obstacle to removing it, or -1; shape (labels,)."""
        found = np.full(self._size, -1)
        for number in range(len(self._fixed) - 1, -1, -1):
            found[classes[self._fixed[number][0]]] = number
        return found

    def obstacle(self, number: int) -> Obstacle:
        """Returns the obstacle with an index that `fixed` returned."""
        return self._fixed[number][1]


def _components(size: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns, for every node of a graph, the smallest node of its connected component.

    In each round a node takes the smallest label of its neighbours, and then the label of that label, until nothing
    changes. This takes a few rounds, each linear in the number of edges.
    """
    parent = np.arange(size)
    while True:
        smallest = np.minimum(parent[left], parent[right])
        new = parent.copy()
        np.minimum.at(new, left, smallest)
        np.minimum.at(new, right, smallest)
        np.minimum.at(new, parent[left], smallest)
        np.minimum.at(new, parent[right], smallest)
        while True:
            jumped = new[new]
            if np.array_equal(jumped, new):
                break
            new = jumped
        if np.array_equal(new, parent):
            return parent
        parent = new
