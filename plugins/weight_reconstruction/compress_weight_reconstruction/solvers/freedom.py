"""What the weight of a layer may be, and what a solver hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress_core import UsageError
from compress_weight_reconstruction.solvers.numerics import is_finite

Project = Callable[[Tensor], Tensor]
RoundColumns = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Equally spaced levels: k * step for the integers k from `low` to `high`.

    Attributes:
        step: Distance of two levels, positive, floating; shape (groups, rows, 1), or (1, 1, 1) for the whole layer.
        low: Smallest integer, 0 or below; an int or a tensor of the shape of `step` (a zero point is a shift of both).
        high: Largest integer, 0 or above.
        adjustable: Whether the solver may choose another step, which `Solution.step` then tells. A step for the whole
            layer stays one step.
    """

    step: Tensor
    low: Tensor | int
    high: Tensor | int
    adjustable: bool = False

    def project(self, values: Tensor) -> Tensor:
        """Returns the nearest level to each value, shape (groups, rows, any number of columns)."""
        return torch.clamp(torch.round(values / self.step), *self.bounds()) * self.step

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Returns `low` and `high` in the shape of `step`."""
        return (
            torch.as_tensor(self.low).to(self.step).expand_as(self.step),
            torch.as_tensor(self.high).to(self.step).expand_as(self.step),
        )

    def by_row(self, weight: Tensor) -> bool:
        """Returns whether each row of the weight has a step of its own."""
        return self.step.shape[:2] == weight.shape[:2]

    def rows(self, rows: slice) -> Grid:
        """Returns the grid of some rows."""
        if self.step.shape[1] == 1:
            return self
        low, high = self.bounds()
        return replace(self, step=self.step[:, rows], low=low[:, rows], high=high[:, rows])


@dataclass(frozen=True)
class Freedom:
    """What a weight may be, of shape (groups, rows, columns); with nothing given, anything.

    A weight that has both a support and a grid is rounded, and zero off the support.

    Attributes:
        support: Elements that may differ from zero, bool. Of any structure: whole columns, rows, blocks, N:M, none.
        grid: Equally spaced levels.
        project: The nearest allowed weight to a weight, both of shape (groups, rows, columns) and of the weight's
            dtype, for what is no `grid`. Projecting twice must be projecting once.
        round_columns: What `project` does to some columns alone: it takes their values, shape (groups, rows, n), and
            their indices, shape (n,). Without it `project` is called for each column, on the whole weight.
    """

    support: Tensor | None = None
    grid: Grid | None = None
    project: Project | None = None
    round_columns: RoundColumns | None = None

    @property
    def rounds(self) -> bool:
        """Whether the weight is on a grid of some kind."""
        return self.grid is not None or self.project is not None

    def nearest(self, weight: Tensor) -> Tensor:
        """Returns the allowed weight that is nearest to `weight`, element by element, in its dtype.

        Raises:
            UsageError: `project` returns another shape or numbers that are not finite, or has no zero where the
                support needs one.
        """
        allowed = weight if self.support is None else torch.where(self.support, weight, torch.zeros_like(weight))
        if not self.rounds:
            return allowed
        rounded = (self.project or self._grid.project)(allowed).detach().to(weight.dtype)
        if rounded.shape != weight.shape:
            raise UsageError(
                f"A projection took a weight of shape {tuple(weight.shape)} and returned {tuple(rounded.shape)}; it "
                "has to return the nearest allowed weight, in the same shape."
            )
        if not is_finite(rounded):
            raise UsageError("A projection returned weights that are not finite (NaN or infinity).")
        if self.support is not None and bool((rounded[~self.support.expand_as(rounded)] != 0).any()):
            raise UsageError(
                "A mask and a grid without zero: what the mask removes would not stay zero. Give the grid a level at "
                "zero, or let the mask come after it in `project`."
            )
        return rounded

    @property
    def _grid(self) -> Grid:
        assert self.grid is not None
        return self.grid

    def rows(self, rows: slice) -> Freedom:
        """Returns the freedom of some rows; not for a `project`, which needs the whole weight."""
        support = None if self.support is None else self.support[:, rows]
        return replace(self, support=support, grid=None if self.grid is None else self.grid.rows(rows))

    def check(self, weight: Tensor) -> None:
        """Raises a UsageError unless this describes weights like `weight`."""
        shape = tuple(weight.shape)
        if self.support is not None and (self.support.dtype != torch.bool or tuple(self.support.shape) != shape):
            raise UsageError(
                f"The support is {self.support.dtype} of shape {tuple(self.support.shape)}; it has to be bool, with "
                f"the weight's shape {shape}."
            )
        if self.grid is not None and self.project is not None:
            raise UsageError("A weight has either a `grid` or a `project`; both were given.")
        if self.round_columns is not None and self.project is None:
            raise UsageError("`round_columns` does to some columns what `project` does to all: give both.")
        if self.grid is not None:
            self._check_grid(shape)

    def _check_grid(self, shape: tuple[int, ...]) -> None:
        step = self._grid.step
        if tuple(step.shape) not in {(*shape[:2], 1), (1, 1, 1)}:
            raise UsageError(
                f"The step of a grid has shape {tuple(step.shape)}; {(*shape[:2], 1)} is one for each row, (1, 1, 1) "
                "one for the layer."
            )
        if not bool((torch.isfinite(step) & (step > 0)).all()):
            raise UsageError(f"The steps of a grid are positive and finite; the smallest is {float(step.min())}.")
        low, high = self._grid.bounds()
        if not bool(((low <= 0) & (high >= 0) & (low < high)).all()):
            raise UsageError(
                f"The levels of a grid run from `low` <= 0 to `high` >= 0; seen are {float(low.max())} and "
                f"{float(high.min())}."
            )


@dataclass(frozen=True)
class Solution:
    """A weight that was solved for.

    Errors are mean squared errors of each output over the positions seen, as the moments tell them.

    Attributes:
        weight: The weight, in the shape and dtype of the one given.
        bias: What has to be added to each output so that its mean is the target's: target mean less weight times input
            mean, float64, shape (groups, rows); zero for moments that are not centred.
        error_before: Error of the nearest allowed weight to the one given: masked and rounded, nothing solved.
        error_after: Error of `weight`, never above `error_before` (of the sum over rows, where a step for the whole
            layer was chosen).
        step: Chosen step of an adjustable grid, in the shape of the one given; else None.
    """

    weight: Tensor
    bias: Tensor
    error_before: Tensor
    error_after: Tensor
    step: Tensor | None = None
