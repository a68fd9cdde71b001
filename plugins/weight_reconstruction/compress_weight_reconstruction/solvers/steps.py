"""Chooses the step of a grid: a smaller one clips the largest weights and rounds all others more finely."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress_weight_reconstruction.solvers.freedom import Grid

_CANDIDATES = 40
_SMALLEST = 0.35


def choose_step(grid: Grid, weight: Tensor, power: Tensor) -> Grid:
    """Returns the grid with the step of least weighted rounding error.

    Candidates are the step as it is, and 40 between that which just reaches the largest weight and 0.35 of it.

    Args:
        grid: An adjustable grid.
        weight: What will be rounded, float64, shape (groups, rows, columns).
        power: Weight of the squared error of each column, float64, shape (groups, 1, columns).
    """
    low, high = (bound.to(weight) for bound in grid.bounds())
    largest, smallest = weight.amax(2, keepdim=True), weight.amin(2, keepdim=True)
    if not grid.by_row(weight):
        largest, smallest = largest.amax().view(1, 1, 1), smallest.amin().view(1, 1, 1)
    reach = torch.maximum(_reach(largest, high), _reach(smallest, low))
    best = grid.step.to(weight)
    reach = torch.where(reach > 0, reach, best)
    least = _error(grid, best, weight, power)
    for shrink in torch.linspace(1.0, _SMALLEST, _CANDIDATES, dtype=torch.float64).tolist():
        # As it will be stored, so that the error is that of the grid that is returned.
        step = (reach * shrink).to(grid.step.dtype).to(weight)
        error = _error(grid, step, weight, power)
        better = (error < least) & (step > 0) & torch.isfinite(step)
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return replace(grid, step=best.to(grid.step.dtype))


def _reach(extreme: Tensor, level: Tensor) -> Tensor:
    """Returns the step with which a level is an extreme value; 0 where there is no such level."""
    return torch.where(level == 0, 0.0, extreme / level.masked_fill(level == 0, 1.0)).clamp_min(0.0)


def _error(grid: Grid, step: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    rounded = replace(grid, step=step).project(weight)
    error = (rounded.sub_(weight).square_() * power).sum(2, keepdim=True)
    return error if error.shape == step.shape else error.sum().view(1, 1, 1)
