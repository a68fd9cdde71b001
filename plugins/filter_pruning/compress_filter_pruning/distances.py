"""Sums of distances between filters, through products of matrices, without losing those that are small."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# Number of float64 values (32 MB) that a block of products, or the differences of some pairs, may take.
_VALUES = 1 << 22
# Most rows of a block: enough for fast products.
_ROWS = 256
# A squared distance below this share of the squared norms is computed from the difference instead: the error of a
# product is about 1e-15 of the squared norms, so that every distance keeps 9 digits, and nearly all of them 14.
_NEAR = 1e-6
# If this share of the pairs of a block is that near, all of its distances are computed from differences at once.
_MANY = 1 / 8
# Squares of values from 2**-400 to 2**400 can be added up in float64.
_PLAIN = 400


def sums_of_distances(filters: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each filter's Euclidean distances to all others.

    |a - b|^2 = |a|^2 + |b|^2 - 2 ab, in float64 and relative to the mean filter. This cancels where filters are nearly
    the same, so the distances of such pairs are those of their differences. Filters that are equal in every value get
    equal sums. Besides a few copies of the filters in float64, memory is bounded.

    Args:
        filters: Shape (filters, elements), any floating dtype.

    Returns:
        Shape (filters,), float64, within 1e-9 of the exact sums, relatively; NaN if a filter is not finite.
    """
    wide = filters.detach().double()
    if not wide.numel():
        return wide.new_zeros(len(wide))
    largest = float(wide.abs().max())
    if not math.isfinite(largest):
        return wide.new_full((len(wide),), math.nan)
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _PLAIN:
        return _sums(wide)
    return _scaled(_sums(_scaled(wide, -exponent)), exponent)


def _scaled(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """Returns the values times a power of two, which itself may be too large for a float."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _sums(wide: torch.Tensor) -> torch.Tensor:
    centred = wide - wide.mean(0)
    norms = centred.square().sum(1)
    sums, first = torch.zeros_like(norms), torch.arange(len(wide), device=wide.device)
    for start, stop in _blocks(len(wide)):
        # Each pair of blocks once; on the diagonal, a block holds each of its pairs in both orders.
        scale = norms[start:stop, None] + norms[start:]
        squares = torch.addmm(scale, centred[start:stop], centred[start:].T, alpha=-2)
        _mend(squares, squares <= _NEAR * scale, wide[start:stop], wide[start:])
        sums[start:stop] += squares.sqrt_().sum(1)
        sums[stop:] += squares[:, stop - start :].sum(0)
        rows, columns = (squares == 0).nonzero(as_tuple=True)
        # The first of several equal filters; those before it have been compared with it in an earlier block.
        first.scatter_reduce_(0, columns + start, first[rows + start], "amin")
    return sums[first]


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        stop = min(count, start + max(1, min(_ROWS, _VALUES // (count - start))))
        yield start, stop
        start = stop


def _mend(squares: torch.Tensor, near: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Replaces the squared distances of near pairs by those of the differences."""
    rows, columns = near.nonzero(as_tuple=True)
    if len(rows) - len(left) > _MANY * squares.numel():
        squares.copy_(torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square_())
        return
    at_once = max(1, _VALUES // left.shape[1])
    for some, others in zip(torch.split(rows, at_once), torch.split(columns, at_once), strict=True):
        squares[some, others] = (left[some] - right[others]).square_().sum(1)
