"""How a column of a weight becomes the nearest allowed column, in the units in which solvers compute."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compress_weight_reconstruction.solvers.freedom import Freedom, Grid


class Rounder(Protocol):
    """Rounds one column at a time."""

    def column(self, index: int, values: Tensor) -> Tensor:
        """Returns the nearest allowed values of a column, shape (groups, 1, rows), in units; may overwrite `values`."""


class GridRounder:
    """Rounds to equally spaced levels."""

    def __init__(self, grid: Grid, unit: Tensor, support: Tensor | None, dtype: torch.dtype) -> None:
        # In units a step differs between columns. Steps below the smallest number belong to inputs of no effect.
        step = (grid.step.to(unit.dtype) * unit).to(dtype).clamp_min_(torch.finfo(dtype).tiny)
        # Cut into columns beforehand: with some thousand columns, indexing would take a third of the time.
        self._step = torch.split(step.mT.contiguous(), 1, 1)
        self._low, self._high = (bound.mT.to(dtype) for bound in grid.bounds())
        self._support = None if support is None else torch.split(support.mT.to(dtype).contiguous(), 1, 1)

    def column(self, index: int, values: Tensor) -> Tensor:
        """Rounds to the nearest level, as `Rounder` says."""
        step = self._step[index]
        levels = torch.clamp(values.div_(step).round_(), self._low, self._high).mul_(step)
        return levels if self._support is None else levels.mul_(self._support[index])


class ProjectRounder:
    """Rounds with whatever projection a transform offers, one column of the whole weight at a time."""

    def __init__(self, freedom: Freedom, weight: Tensor, unit: Tensor) -> None:
        self._freedom, self._weight, self._unit = freedom, weight.clone(), unit

    def column(self, index: int, values: Tensor) -> Tensor:
        """Rounds to what the projection returns, as `Rounder` says."""
        part = slice(index, index + 1)
        unit = self._unit[:, :, part]
        wanted = (values.mT / unit).to(self._weight.dtype)
        if self._freedom.support is not None:
            wanted = wanted * self._freedom.support[:, :, part]
        if self._freedom.round_columns is not None:
            rounded = self._freedom.round_columns(wanted, torch.tensor([index], device=values.device))
        else:
            assert self._freedom.project is not None
            self._weight[:, :, part] = wanted
            rounded = self._freedom.project(self._weight)[:, :, part]
            # What is nearest to one element may depend on the others, so these are allowed values where they can be.
            self._weight[:, :, part] = rounded
        return (rounded.to(unit.dtype) * unit).to(values.dtype).mT


def rounder_of(freedom: Freedom, weight: Tensor, unit: Tensor, dtype: torch.dtype) -> Rounder:
    """Returns the rounder of a freedom.

    Args:
        freedom: With a grid or a projection.
        weight: An allowed weight to begin with, shape (groups, rows, columns).
        unit: What a weight is multiplied by to be in units, float64, shape of `weight`.
        dtype: What is computed in.
    """
    if freedom.grid is not None:
        return GridRounder(freedom.grid, unit, freedom.support, dtype)
    return ProjectRounder(freedom, weight, unit)
