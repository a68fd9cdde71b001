"""Solves for the weight of a layer: chooses the method by what the weight may be, and never hands back a worse one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress_core import UsageError
from compress_weight_reconstruction.solvers.freedom import Freedom, Grid, Solution
from compress_weight_reconstruction.solvers.least_squares import least_squares
from compress_weight_reconstruction.solvers.moments import Normal
from compress_weight_reconstruction.solvers.numerics import full_precision, is_finite, unit_of
from compress_weight_reconstruction.solvers.rounders import rounder_of
from compress_weight_reconstruction.solvers.rounding import descend, round_successively
from compress_weight_reconstruction.solvers.steps import choose_step
from compress_weight_reconstruction.solvers.system import System

WORKSPACE = 1 << 31
_SWEEPS = 3
# Copies of a block of rows, in float64, that are alive at a time.
_COPIES = 10


def solve(
    weight: Tensor,
    normal: Normal,
    freedom: Freedom | None = None,
    *,
    damping: float,
    sweeps: int = _SWEEPS,
    workspace: int = WORKSPACE,
) -> Solution:
    """Returns the allowed weight whose outputs are nearest to the targets.

    Minimized is the mean squared error plus a damping towards the weight given. As the error of the nearest allowed
    weight is kept where solving does not lower it, row by row, no row's error ever rises.

    Args:
        weight: The weight before compression, floating, shape (groups, rows, columns).
        normal: Moments of the inputs and targets.
        freedom: What the weight may be; None for anything.
        damping: Relative to the power of each input column; 0.1 is a good value.
        sweeps: Largest number of coordinate descent sweeps over a weight on a grid.
        workspace: Bytes that may be taken beside arguments and results, and some 2000 float64 columns of the Gram
            matrix. Rows are solved in blocks that fit; a layer whose Gram matrix takes more than half of it is solved
            by conjugate gradients and coordinate descent, which are slower. A projection, and a step that is chosen
            for the whole layer, need all rows at once: ten float64 copies of the weight, whatever they take.

    Raises:
        UsageError: Shapes do not fit, numbers are not finite, or the freedom contradicts itself.
    """
    freedom = Freedom() if freedom is None else freedom
    weight = weight.detach()
    _check(weight, normal, freedom, damping)
    with full_precision(weight.device):
        system = System(normal, damping)
        solutions = []
        for rows in row_blocks(weight, freedom, workspace // 4):
            problem = _Problem(weight[:, rows], normal.rows(rows), system, workspace // 2)
            solutions.append(problem.solved(freedom.rows(rows), sweeps))
        return solutions[0] if len(solutions) == 1 else _joined(solutions)


def row_blocks(weight: Tensor, freedom: Freedom, limit: int) -> list[slice]:
    """Returns the rows that are solved together, so that ten float64 copies of them are within a number of bytes."""
    groups, rows, columns = weight.shape
    grid = freedom.grid
    together = freedom.project is not None or (grid is not None and grid.adjustable and not grid.by_row(weight))
    size = rows if together else max(1, limit // (_COPIES * groups * columns * 8))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def _joined(solutions: list[Solution]) -> Solution:
    steps = [solution.step for solution in solutions if solution.step is not None]
    return Solution(
        torch.cat([solution.weight for solution in solutions], 1),
        torch.cat([solution.bias for solution in solutions], 1),
        torch.cat([solution.error_before for solution in solutions], 1),
        torch.cat([solution.error_after for solution in solutions], 1),
        torch.cat(steps, 1) if steps else None,
    )


@dataclass(frozen=True)
class _Measured:
    """A weight, and the error of each row before it is cut off at zero."""

    weight: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Problem:
    """Some rows of a layer, and the system that they share with the others."""

    weight: Tensor
    normal: Normal
    system: System
    workspace: int

    def solved(self, freedom: Freedom, sweeps: int) -> Solution:
        start = freedom.nearest(self.weight)
        residual = self.system.residual(start, self.normal.cross)
        before = self.measured(start, residual)
        if freedom.rounds:
            del residual
            candidate, grid = self.rounded(freedom, start, sweeps)
        else:
            candidate, grid = self.supported(start, residual, freedom.support).to(start.dtype), None
            del residual
        after = self.measured(candidate, self.system.residual(candidate, self.normal.cross))
        return self.better(before, after, freedom.grid, grid)

    def measured(self, weight: Tensor, residual: Tensor) -> _Measured:
        # power - 2 w . cross + w gram w', where the residual is cross - w gram.
        both = (residual + self.normal.cross).mul_(weight)
        return _Measured(weight, self.normal.target_power - both.sum(2))

    def supported(self, start: Tensor, residual: Tensor, support: Tensor | None) -> Tensor:
        """Returns the least-squares weight on a support, in float64, from an allowed one and its residual."""
        rows, size = self.system.in_units(residual)
        update = self.system.from_units(least_squares(self.system, rows, support, self.workspace), size)
        return update.add_(start)

    def rounded(self, freedom: Freedom, start: Tensor, sweeps: int) -> tuple[Tensor, Grid | None]:
        """Returns a weight on the grid, and the grid with the step that was chosen."""
        masked = replace(freedom, grid=None, project=None, round_columns=None).nearest(self.weight)
        best = self.supported(masked, self.system.residual(masked, self.normal.cross), freedom.support)
        if freedom.grid is not None and freedom.grid.adjustable:
            freedom = replace(freedom, grid=choose_step(freedom.grid, best, self.system.power()[:, None]))
        unit = self._units(best)
        target = (best * unit).to(self.system.dtype).mT.contiguous()
        rounder = rounder_of(freedom, start, unit, self.system.dtype)
        if self.system.fits(1, self.workspace):
            levels = round_successively(self.system.factor(), target, rounder)
        else:
            levels = (freedom.nearest(best.to(start.dtype)) * unit).to(self.system.dtype).mT.contiguous()
        levels = descend(self.system, levels, self._descent(levels.mT / unit, unit), rounder, sweeps)
        allowed = freedom.nearest((levels.mT / unit).to(start.dtype))
        if not torch.equal(freedom.nearest(allowed), allowed):
            raise UsageError(
                "A projection moves weights that it has returned itself, so no weight is allowed for certain; "
                "projecting twice must be projecting once."
            )
        return allowed, freedom.grid

    def _descent(self, weight: Tensor, unit: Tensor) -> Tensor:
        """Returns the negative gradient of half the damped error in units, columns first."""
        pull = (self.weight - weight).mul_(self.system.ridge[:, None])
        gradient = self.system.residual(weight, self.normal.cross).add_(pull)
        # A row of the residual in units of the columns is divided by what rows of weights are divided by.
        gradient.mul_(unit / self.system.unit[:, None].square())
        return gradient.to(self.system.dtype).mT.contiguous()

    def _units(self, weight: Tensor) -> Tensor:
        size = unit_of((weight * self.system.unit[:, None]).abs().amax(2, keepdim=True))
        return self.system.unit[:, None] / size

    def better(self, before: _Measured, after: _Measured, old: Grid | None, new: Grid | None) -> Solution:
        """Returns the candidate where its error is not larger, and else the weight to begin with, row by row."""
        worse = ~(after.error <= before.error)
        step = None
        if old is not None and new is not None and old.adjustable:
            by_row = old.by_row(self.weight)
            if not by_row:
                # Rows that share a step cannot go back to the old one each for itself.
                worse = (~(after.error.sum() <= before.error.sum())).expand_as(worse)
            step = torch.where(worse[:, :, None] if by_row else worse.all(), old.step, new.step)
        weight = torch.where(worse[:, :, None], before.weight, after.weight)
        normal = self.normal
        bias = torch.zeros_like(normal.target_mean)
        if normal.centred:
            bias = normal.target_mean - torch.einsum("grc,gc->gr", weight.to(bias.dtype), normal.input_mean)
        error = torch.where(worse, before.error, after.error)
        return Solution(weight, bias, before.error.clamp_min(0.0), error.clamp_min(0.0), step)


def _check(weight: Tensor, normal: Normal, freedom: Freedom, damping: float) -> None:
    shape, expected = tuple(weight.shape), tuple(normal.cross.shape)
    if shape != expected:
        raise UsageError(f"The weight has shape {shape}, but the moments are of {expected}: (groups, rows, columns).")
    if not weight.dtype.is_floating_point or not is_finite(weight):
        raise UsageError(f"A weight to solve for must be finite floating-point numbers; this one is {weight.dtype}.")
    if not (math.isfinite(damping) and damping >= 0):
        raise UsageError(f"damping is {damping}; it is a finite number, 0 or above.")
    for name in ("gram", "cross", "target_power", "input_mean", "target_mean"):
        if not is_finite(getattr(normal, name)):
            raise UsageError(f"The moments hold numbers that are not finite (NaN or infinity) in {name}.")
    freedom.check(weight)
