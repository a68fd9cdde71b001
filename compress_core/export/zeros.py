"""`WeightZeros`: how many weights of a file are exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

_WORTH_A_ROW = 0.01  # share of zeros


@dataclass(frozen=True)
class WeightZeros:
    """The zeros of a weight in a file.

    Attributes:
        weight: Name of the constant.
        operator: The operator that reads it.
        size: Number of its elements.
        zeros: Number of those that are exactly zero: for integers, equal to the zero point.
        is_2_4: Whether at least 2 of each 4 consecutive elements are zero along the dimension that is summed over (the
            input channels); elements after the last whole 4 do not count.
    """

    weight: str
    operator: str
    size: int
    zeros: int
    is_2_4: bool


def zeros_to_str(found: Sequence[WeightZeros]) -> str:
    """Returns the share of zeros, and a table of the weights that have some."""
    size, zeros = sum(entry.size for entry in found), sum(entry.zeros for entry in found)
    head = f"zeros: {zeros / max(size, 1):.1%} of {size:,} weights"
    rows = [
        [entry.weight, entry.operator, entry.size, f"{entry.zeros / entry.size:.1%}", "yes" if entry.is_2_4 else "-"]
        for entry in found
        if entry.zeros >= _WORTH_A_ROW * entry.size
    ]
    if not rows:
        return head
    return f"{head}\n{tabulate(rows, headers=['weight', 'operator', 'size', 'zeros', '2:4'])}"
