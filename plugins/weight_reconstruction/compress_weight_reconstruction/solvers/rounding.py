"""Rounds a weight to a grid so that the errors of its elements cancel in the layer's outputs.

`round_successively` goes column by column; each error is made up for by the columns that are still to come. This is
GPTQ (Frantar et al. 2023, arXiv:2210.17323), which is Babai's nearest plane (Chen et al. 2025, arXiv:2507.18553): in
the latter's form, from the last column to the first, the Cholesky factor of A itself does, and no inverse is needed.
`descend` then takes column by column again, each to the best level while all others stay, until nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress_weight_reconstruction.solvers.rounders import Rounder
from compress_weight_reconstruction.solvers.system import System

# Columns whose errors are spread together: inside a block by vectors, to the others by one matrix product.
_BLOCK = 128


def round_successively(factor: Tensor, target: Tensor, rounder: Rounder) -> Tensor:
    """Returns a weight on the grid whose error `(w - target) A (w - target)'` is small; all in units.

    Args:
        factor: Lower Cholesky factor of A, shape (groups, columns, columns).
        target: The best weight off the grid, columns first: shape (groups, columns, rows).
        rounder: What a column may be.
    """
    error = torch.zeros_like(target)
    columns = target.shape[1]
    pivots = factor.diagonal(dim1=1, dim2=2)
    wanted, errors = torch.split(target, 1, 1), torch.split(error, 1, 1)
    for stop in range(columns, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        # By how much the best value of a column has moved, given the errors of those behind it.
        ratios = factor[:, start:, start:stop] / pivots[:, None, start:stop]
        moved = ratios[:, stop - start :].mT @ error[:, stop:]
        inner = torch.split(ratios[:, : stop - start].mT.contiguous(), 1, 2)
        moves = torch.split(moved, 1, 1)
        for column in range(stop - 1, start - 1, -1):
            at = column - start
            rounded = rounder.column(column, wanted[column] - moves[at])
            torch.sub(rounded, wanted[column], out=errors[column])
            # Columns behind this one are moved too, which nobody looks at.
            moved.baddbmm_(inner[at], errors[column])
    return error.add_(target)


def descend(system: System, weight: Tensor, residual: Tensor, rounder: Rounder, sweeps: int) -> Tensor:
    """Improves a weight on the grid by coordinate descent, in place; its damped error never rises.

    Args:
        system: A.
        weight: A weight on the grid, in units, columns first: shape (groups, columns, rows).
        residual: `(best - weight) A`, columns first; overwritten.
        rounder: What a column may be.
        sweeps: Largest number of times that every column is visited.
    """
    columns = weight.shape[1]
    pivots, values = torch.split(system.diagonal()[:, :, None], 1, 1), torch.split(weight, 1, 1)
    for _ in range(sweeps):
        changed = False
        for start in range(0, columns, _BLOCK):
            stop = min(columns, start + _BLOCK)
            part = system.columns(slice(start, stop))
            local = residual[:, start:stop].clone()
            steps = torch.zeros_like(local)
            rest, step = torch.split(local, 1, 1), torch.split(steps, 1, 1)
            inner = torch.split(part[:, start:stop], 1, 2)
            for column in range(start, stop):
                at, old = column - start, values[column]
                wanted = torch.addcdiv(old, rest[at], pivots[column])
                torch.sub(rounder.column(column, wanted), old, out=step[at])
                local.baddbmm_(inner[at], step[at], alpha=-1)
                old.add_(step[at])
            if bool(steps.any()):
                changed = True
                residual.baddbmm_(part, steps, alpha=-1)
        if not changed:
            break
    return weight
