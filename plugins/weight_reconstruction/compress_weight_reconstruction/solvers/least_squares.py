"""Least squares on the elements that may be non-zero: all, the same for many rows, or each row's own.

All rows: one Cholesky factorization. Rows with the same support (whole input channels gone, block masks) share one of
their submatrix. Unstructured masks have as many submatrices as rows; they are factorized in batches of similar size,
or all rows are solved together by conjugate gradients where that is cheaper or the submatrices would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_weight_reconstruction.solvers.conjugate import MOST_SWEEPS, conjugate_gradients
from compress_weight_reconstruction.solvers.system import System, cholesky, solve_factored

# Measured on a CPU: a submatrix of k columns costs as much as 0.6 k^3 (factorizing) + 260 k^2 (cutting out)
# multiplications of a large matrix product.
_FACTORIZING = 0.6
_CUTTING = 260.0
# Products with A that conjugate gradients take, for features of convolutions with a damping of 0.1.
_SWEEPS = 30
# What takes some hundredths of a second is factorized in any case, which is exact.
_QUICK = 5e8
# Submatrices factorized at a time; few, so that little is lost by filling up to the largest.
_BATCH = 64


def least_squares(
    system: System, rows: Tensor, support: Tensor | None, workspace: int, *, sweeps: int = MOST_SWEEPS
) -> Tensor:
    """Returns x with x A = rows on the support and 0 elsewhere, in units of the system.

    Args:
        system: The equations.
        rows: Right-hand sides in units, shape (groups, rows, columns).
        support: Elements that may be non-zero, shape of `rows`; None for all.
        workspace: Bytes that a copy of A may take, and half of it again for submatrices.
        sweeps: Largest number of products of conjugate gradients, where these are cheaper than factorizations.
    """
    if support is None or bool(support.all()):
        if system.fits(1, workspace):
            return system.solve(rows)
        return conjugate_gradients(system.apply, rows, system.diagonal(), None, sweeps)
    patterns = Patterns.of(support)
    cheaper = patterns.cost() <= max(_QUICK, min(_SWEEPS, sweeps) * rows.numel() * rows.shape[2])
    if cheaper and system.fits(1, workspace) and patterns.bytes(system.dtype) <= workspace // 2:
        return _direct(system, rows, patterns, workspace // 2)
    if system.fits(1, workspace):
        # Products are faster with a copy of A in its units.
        system.matrix()
    return conjugate_gradients(system.apply, rows, system.diagonal(), support, sweeps)


@dataclass(frozen=True)
class Patterns:
    """The different supports of a weight, by size, and which rows have them.

    Attributes:
        support: The supports, bool, shape (patterns, columns), smallest first, none empty.
        size: Number of elements of each.
        group: Group of each.
        members: Rows (over all groups) in the order of their patterns.
        counts: Number of rows of each pattern.
    """

    support: Tensor
    size: Tensor
    group: Tensor
    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, support: Tensor) -> Patterns:
        """Finds the rows of a support, shape (groups, rows, columns), that are equal."""
        groups, rows, columns = support.shape
        flat = support.reshape(-1, columns)
        group = torch.arange(groups, device=support.device).repeat_interleave(rows)
        inverse = _equal_rows(flat, group)
        # One row of each pattern, and the number of rows.
        number = int(inverse.max()) + 1
        first = torch.full((number,), len(flat), device=flat.device)
        first.scatter_reduce_(0, inverse, torch.arange(len(flat), device=flat.device), "amin")
        size = flat[first].sum(1)
        order = torch.argsort(size, stable=True)
        order = order[size[order] > 0]
        place = torch.full((number,), number, device=flat.device)
        place[order] = torch.arange(len(order), device=flat.device)
        place = place[inverse]
        counts = torch.bincount(place, minlength=number)[: len(order)]
        members = torch.argsort(place, stable=True)[: int(counts.sum())]
        return cls(flat[first[order]], size[order], group[first[order]], members, counts)

    def cost(self) -> float:
        """Returns the cost of factorizing all, in multiplications of a large matrix product."""
        k = self.size.double()
        return float((_FACTORIZING * k**3 + (_CUTTING + self.counts) * k**2).sum())

    def bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes that the largest pattern alone takes: submatrix, factor and right-hand sides."""
        if not len(self.size):
            return 0
        return int((2 * self.size * (self.size + self.counts)).max()) * dtype.itemsize

    def batches(self, limit: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of patterns whose `2 * size * (size + counts)` numbers are within a limit, and their rows.

        The rows are of shape (patterns, most rows of one), filled up with -1.
        """
        sizes, counts = self.size.tolist(), self.counts.tolist()
        start, row = 0, 0
        while start < len(sizes):
            stop, most = start, 0
            while stop < min(len(sizes), start + _BATCH):
                most = max(most, counts[stop])
                if stop > start and 2 * (stop + 1 - start) * sizes[stop] * (sizes[stop] + most) > limit:
                    break
                stop += 1
            members = [torch.arange(n) for n in counts[start:stop]]
            index = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
            offset = torch.tensor([row, *counts[start : stop - 1]]).cumsum(0)
            index = torch.where(index < 0, -1, index + offset[:, None]).to(self.members.device)
            yield slice(start, stop), torch.where(index < 0, -1, self.members[index.clamp_min(0)])
            row += sum(counts[start:stop])
            start = stop


def _equal_rows(flat: Tensor, group: Tensor) -> Tensor:
    """Returns a number for each row that is the same for equal rows of one group."""
    columns = flat.shape[1]
    bits = torch.nn.functional.pad(flat, (0, -columns % 8)).view(len(flat), -1, 8).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(2, dtype=torch.int64)
    inverse: Tensor = torch.unique(torch.cat([group[:, None], packed], 1), dim=0, return_inverse=True)[1]
    return inverse


def _direct(system: System, rows: Tensor, patterns: Patterns, workspace: int) -> Tensor:
    columns = rows.shape[2]
    flat, result = rows.reshape(-1, columns), torch.zeros_like(rows).view(-1, columns)
    for part, members in patterns.batches(workspace // system.dtype.itemsize):
        # Filled up with equations x = 0 for the last column, which are not written back.
        width = int(patterns.size[part][-1])
        chosen = torch.argsort(patterns.support[part], dim=1, descending=True, stable=True)[:, :width]
        valid = torch.arange(width, device=rows.device) < patterns.size[part][:, None]
        matrix = system.matrix()[patterns.group[part][:, None, None], chosen[:, :, None], chosen[:, None]]
        matrix.mul_(valid[:, :, None]).mul_(valid[:, None])
        matrix.diagonal(dim1=1, dim2=2).add_(~valid)
        right = flat[members.clamp_min(0)[:, :, None], chosen[:, None]] * valid[:, None]
        solved = solve_factored(cholesky(matrix), right)
        wanted = ((members >= 0)[:, :, None] & valid[:, None]).expand_as(solved)
        target = (members[:, :, None] * columns + chosen[:, None]).expand_as(solved)
        result.view(-1)[target[wanted]] = solved[wanted]
    return result.view_as(rows)
