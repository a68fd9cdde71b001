"""Quantiles of a stream of values that is too long to keep."""

from __future__ import annotations

from typing import Self

import torch

_BUDGET = 2**20


class QuantileSketch:
    """Quantiles of a stream of values, exact up to a number of values and with a known error beyond it.

    Values are kept in levels; a value at level h represents 2^h values. When more than `budget` values are kept, a
    level is sorted and every other value of it moves up one level (compactors as in Manku, Rajagopalan and Lindsay 1998
    and in Karnin, Lang and Liberty 2016, with alternating instead of random choice). One such step changes the rank of
    any value by at most 2^h, and `rank_error` is the sum of this over all steps: the quantile returned for q is exact
    for some q' with |q' - q| <= rank_error. With the budget of 2^20 values the bound is below 2e-4 for 2 * 10^8 values;
    in practice the error is about 1e-6. Memory: `budget` values and the batch.

    Args:
        rows: Number of independent distributions, such as channels, each with the same number of values.
        budget: Maximum number of values to keep, over all rows; None to keep all.
    """

    def __init__(self, rows: int = 1, budget: int | None = _BUDGET) -> None:
        self._rows = rows
        self._budget = budget
        self._levels: list[list[torch.Tensor]] = [[]]
        self._take_odd: list[bool] = [False]
        self._count = 0
        self._moved = 0

    @property
    def count(self) -> int:
        """Values seen in each row."""
        return self._count

    @property
    def kept(self) -> int:
        """Values kept, over all rows together."""
        return self._rows * sum(self._size(level) for level in range(len(self._levels)))

    @property
    def rank_error(self) -> float:
        """Bound on the error of a rank, as a share of the values; 0 as long as the quantiles are exact."""
        return self._moved / self._count if self._count else 0.0

    def update(self, values: torch.Tensor) -> None:
        """Adds values: float32 or float64, shape (rows, n). They are copied."""
        self._levels[0].append(values.detach().clone())
        self._count += values.shape[1]
        self._shrink()

    def merge(self, other: Self) -> None:
        """Adds the values of another sketch over the same rows."""
        while len(self._levels) < len(other._levels):
            self._grow()
        for level, chunks in enumerate(other._levels):
            self._levels[level].extend(chunks)
        self._count += other._count
        self._moved += other._moved
        self._shrink()

    def weighted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the kept values, sorted in each row, and how many values each represents (int64); (rows, kept)."""
        chunks = [(chunk, 2**level) for level, chunks in enumerate(self._levels) for chunk in chunks]
        values = torch.cat([chunk for chunk, _ in chunks], dim=1)
        weights = torch.cat([torch.full_like(chunk, weight, dtype=torch.int64) for chunk, weight in chunks], dim=1)
        values, order = values.sort(dim=1)
        return values, weights.gather(1, order)

    def quantiles(self, shares: tuple[float, ...]) -> torch.Tensor:
        """Returns the quantiles for shares in [0, 1], interpolated linearly between values; float64, (shares, rows)."""
        values, weights = self.weighted()
        return torch.stack([weighted_quantile(values, weights, share) for share in shares])

    def _size(self, level: int) -> int:
        return sum(chunk.shape[1] for chunk in self._levels[level])

    def _grow(self) -> None:
        self._levels.append([])
        self._take_odd.append(False)

    def _shrink(self) -> None:
        while self._budget is not None and self.kept > self._budget:
            # The lowest level that exceeds its share of the budget; there is one, otherwise all values would fit.
            share = self._budget / (len(self._levels) * self._rows)
            sizes = [self._size(level) for level in range(len(self._levels))]
            level = next(level for level, size in enumerate(sizes) if size >= share)
            if sizes[level] < 2:
                return  # The budget is smaller than the number of rows, but each row needs one or two values.
            self._compact(level)

    def _compact(self, level: int) -> None:
        if level + 1 == len(self._levels):
            self._grow()
        ordered = torch.cat(self._levels[level], dim=1).sort(dim=1).values
        even = ordered.shape[1] // 2 * 2
        self._levels[level] = [ordered[:, even:].clone()] if even < ordered.shape[1] else []
        self._levels[level + 1].append(ordered[:, int(self._take_odd[level]) : even : 2].clone())
        self._take_odd[level] = not self._take_odd[level]
        self._moved += 2**level


def weighted_quantile(values: torch.Tensor, weights: torch.Tensor, share: float) -> torch.Tensor:
    """Returns a quantile of each row, where each value counts `weights` times; linear interpolation as in NumPy.

    Args:
        values: Shape (rows, n), sorted in each row.
        weights: int64, shape (rows, n); a row of zeros gives 0.
        share: 0 to 1.

    Returns:
        float64, shape (rows,).
    """
    ends = weights.cumsum(dim=1)
    last = ends[:, -1:] - 1
    position = last.clamp(min=0).double() * share
    below = position.floor().long()
    # The value with index i in the repeated row is the first one whose cumulative weight exceeds i.
    lower, upper = (
        values.gather(1, torch.searchsorted(ends, index, right=True).clamp(max=values.shape[1] - 1)).double()
        for index in (below, torch.minimum(below + 1, last.clamp(min=0)))
    )
    quantile = lower + (upper - lower) * (position - below)
    return torch.where(last >= 0, quantile, 0.0).squeeze(1)
