"""First and second moments of a layer's inputs and of the outputs that it should have: all that a solver needs.

They can be pooled over batches, calls of a layer and processes. Each batch is centred on its own mean before it is
squared, and pairs of parts are combined as in Chan, Golub & LeVeque 1979, so that no large numbers cancel. Every
column is kept in units of a power of two, which makes float32 enough for inputs of any magnitude.

Memory: the accumulators hold `groups * (columns^2 + rows * columns)` numbers, in float64 up to 2^20 for each group and
above that in float32; `finalize` makes one copy of them. An update needs some copies of at most 2^24 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from compress_core import DataError, UsageError
from compress_weight_reconstruction.solvers.numerics import (
    full_precision,
    is_finite,
    power_of_two,
    wide_dtype,
    work_dtype,
)

# Numbers of one side that are converted and multiplied at a time.
_PIECE = 1 << 24
# Sums of at most so many products are kept in float64: that takes little, and many small updates round nothing.
_SMALL = 1 << 20
# Layers of at most so many columns are multiplied in float64: libraries add these one position after the other.
_TINY = 64
# Positions whose products are added in float32 before they are added to float64 sums.
_POSITIONS = 256
# Columns of a Gram matrix that are summed together; half of the others' products are not needed.
_COLUMNS = 512
# Between 2^-40 and 2^40, products of two columns and their sums are normal float32 numbers.
_FLOAT32_EXPONENT = 40


@dataclass(frozen=True)
class Normal:
    """What is known of a layer: the coefficients of the quadratic error of its weight.

    With inputs u and targets t, and both less their means if `centred`, the mean squared error of a weight row w is
    `target_power - 2 w . cross + w gram w'`.

    Attributes:
        count: Number of positions seen.
        input_mean: Mean of u, float64, shape (groups, columns).
        target_mean: Mean of t, float64, shape (groups, rows).
        gram: E[u u'], shape (groups, columns, columns); float32, or float64 where float32 would not hold the values or
            the inputs were float64.
        cross: E[t u'], shape (groups, rows, columns), dtype of `gram`.
        target_power: E[t^2] of each row, float64, shape (groups, rows).
        centred: Whether the second moments are about the means: a bias or a batch norm takes care of these.
        rounding: Relative rounding error of the sums, which no solver can see below.
    """

    count: int
    input_mean: Tensor
    target_mean: Tensor
    gram: Tensor
    cross: Tensor
    target_power: Tensor
    centred: bool
    rounding: float

    def diagonal(self) -> Tensor:
        """Returns the power of each input column, float64, shape (groups, columns)."""
        return self.gram.diagonal(dim1=-2, dim2=-1).to(wide_dtype(self.gram.device)).clamp_min(0.0)

    def rows(self, rows: slice) -> Normal:
        """Returns what is known of some rows, without copying it."""
        return replace(
            self,
            target_mean=self.target_mean[:, rows],
            cross=self.cross[:, rows],
            target_power=self.target_power[:, rows],
        )


class Moments:
    """Moments of the inputs and targets of a layer, which can be merged.

    A grouped convolution has one problem for each group; everything else has one group. Merging is exact but for
    rounding: the result does not depend on how positions were split into parts, nor on the order of these.

    Attributes:
        count: Number of positions so far.
        input_mean: Their mean, float64, shape (groups, columns).
        target_mean: Mean of the targets, float64, shape (groups, rows).
        centred: Whether `finalize` gives moments about the means.
    """

    def __init__(
        self, groups: int, columns: int, rows: int, *, device: torch.device | str, centred: bool = True
    ) -> None:
        if min(groups, columns, rows) < 1:
            raise UsageError(
                f"Moments of {groups} groups, {columns} columns and {rows} rows: there must be at least one of each."
            )
        self.device = torch.device(device)
        self.centred = centred
        self.count = 0
        self._wide = wide_dtype(self.device)
        with full_precision(self.device):
            self.input_mean = self._zeros(groups, columns)
            self.target_mean = self._zeros(groups, rows)
            # Sums of squares are in units of these powers of two; 0 for a column that has not varied so far.
            self._input_unit = self._zeros(groups, columns)
            self._target_unit = self._zeros(groups, rows)
            self._gram = self._sums(groups, columns, columns)
            self._cross = self._sums(groups, rows, columns)
            self._power = self._zeros(groups, rows)
        self._rounding = 0.0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self._wide, device=self.device)

    def _sums(self, groups: int, rows: int, columns: int) -> Tensor:
        dtype = self._wide if rows * columns <= _SMALL else torch.float32
        return torch.zeros(groups, rows, columns, dtype=dtype, device=self.device)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds positions.

        Args:
            inputs: What the compressed layer sees, shape (groups, positions, columns), any floating dtype.
            targets: What its outputs should be, shape (groups, positions, rows).

        Raises:
            UsageError: A shape does not fit.
            DataError: A value is infinite or not a number; the moments are as before.
        """
        self._check(inputs, targets)
        with full_precision(self.device):
            means = [_finite_mean(inputs, "inputs", self._wide), _finite_mean(targets, "targets", self._wide)]
            if inputs.shape[1] == 0:
                return
            size = inputs.shape[0] * max(inputs.shape[2], targets.shape[2])
            pieces = max(1, _PIECE // size)
            if inputs.shape[1] <= pieces:
                self._add(inputs, targets, *means)
                return
            for u, t in zip(torch.split(inputs, pieces, 1), torch.split(targets, pieces, 1), strict=True):
                self._add(u, t, u.mean(1, dtype=self._wide), t.mean(1, dtype=self._wide))

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        groups, columns = self.input_mean.shape
        rows = self.target_mean.shape[1]
        for name, value, size in (("inputs", inputs, columns), ("targets", targets, rows)):
            if value.ndim != 3 or value.shape[0] != groups or value.shape[2] != size:
                raise UsageError(
                    f"The {name} have shape {tuple(value.shape)}, expected ({groups}, positions, {size}): groups, "
                    "positions, and one number for each element of a weight's row (inputs) or each row (targets)."
                )
        if inputs.shape[1] != targets.shape[1]:
            raise UsageError(
                f"{inputs.shape[1]} positions of inputs and {targets.shape[1]} of targets: each position needs both."
            )

    def _add(self, inputs: Tensor, targets: Tensor, input_mean: Tensor, target_mean: Tensor) -> None:
        given = work_dtype(torch.promote_types(inputs.dtype, targets.dtype))
        dtype = self._wide if inputs.shape[2] <= _TINY else given
        u, u_rest = _centred(inputs.to(dtype), input_mean)
        t, t_rest = _centred(targets.to(dtype), target_mean)
        count, total = inputs.shape[1], self.count + inputs.shape[1]
        u_step = input_mean - self.input_mean if self.count else torch.zeros_like(input_mean)
        t_step = target_mean - self.target_mean if self.count else torch.zeros_like(target_mean)
        u_largest, t_largest = _largest(u, u_step), _largest(t, t_step)
        self._see(torch.finfo(given).eps, given)
        self._rescale(u_largest, t_largest)
        u, u_rest, u_step = (self._in_units(x, self._input_unit) for x in (u, u_rest, u_step))
        t, t_rest, t_step = (self._in_units(x, self._target_unit) for x in (t, t_rest, t_step))
        # u and t are centred on a rounded mean, so the rest of the means is taken off the squares.
        between = self.count / total * count
        left = torch.stack([u_step * between, u_rest * -count], 1)
        right = torch.stack([u_step, u_rest], 1)
        targets_right = torch.stack([t_step, t_rest], 1)
        self._add_products(u, u, t)
        self._add_products(left, right, targets_right)
        self._power += t.square().sum(1, dtype=self._wide)
        self._power += between * t_step.square() - count * t_rest.square()
        self.input_mean = self.input_mean + (input_mean - self.input_mean) * (count / total)
        self.target_mean = self.target_mean + (target_mean - self.target_mean) * (count / total)
        self.count = total

    def _add_products(self, left: Tensor, right: Tensor, targets: Tensor) -> None:
        # The Gram matrix is symmetric: blocks below the diagonal are mirrored when all are summed.
        for start in range(0, left.shape[2], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            _add_product(self._gram[:, block, start:], left[:, :, block], right[:, :, start:])
        _add_product(self._cross, targets, left)

    def _in_units(self, values: Tensor, unit: Tensor) -> Tensor:
        divisor = torch.where(unit > 0, unit, torch.ones_like(unit)).to(values.dtype)
        return values.div_(divisor if values.ndim == 2 else divisor[:, None])

    def _see(self, rounding: float, dtype: torch.dtype) -> None:
        self._rounding = max(self._rounding, rounding)
        if dtype == torch.float64:
            self._gram, self._cross = self._gram.to(dtype), self._cross.to(dtype)

    def _rescale(self, inputs: Tensor, targets: Tensor) -> None:
        """Enlarges the units so that values up to these are below 1."""
        u, t = torch.maximum(self._input_unit, inputs), torch.maximum(self._target_unit, targets)
        if torch.equal(u, self._input_unit) and torch.equal(t, self._target_unit):
            return
        u_ratio, t_ratio = _ratio(self._input_unit, u), _ratio(self._target_unit, t)
        _scale(self._gram, u_ratio, u_ratio)
        _scale(self._cross, t_ratio, u_ratio)
        self._power *= t_ratio.square()
        self._input_unit, self._target_unit = u, t

    def merge(self, other: Moments) -> Self:
        """Adds the positions of `other`, which stays as it is, to these moments, and returns these.

        Raises:
            UsageError: The other moments are of another layer: groups, columns, rows or `centred` differ.
        """
        mine, theirs = ((m._cross.shape[0], m._gram.shape[1], m._cross.shape[1], m.centred) for m in (self, other))
        if mine != theirs:
            raise UsageError(
                f"Moments of (groups, columns, rows, centred) = {theirs} cannot be merged into those of {mine}."
            )
        if other.count == 0:
            return self
        with full_precision(self.device):
            self._merge(other)
        return self

    def _merge(self, other: Moments) -> None:
        total = self.count + other.count
        u_mean, t_mean = other.input_mean.to(self.device), other.target_mean.to(self.device)
        u_step = u_mean - self.input_mean if self.count else torch.zeros_like(u_mean)
        t_step = t_mean - self.target_mean if self.count else torch.zeros_like(t_mean)
        u_unit, t_unit = other._input_unit.to(self.device), other._target_unit.to(self.device)
        exact = other._rounding < torch.finfo(torch.float32).eps
        self._see(other._rounding, torch.float64 if exact else torch.float32)
        self._rescale(torch.maximum(u_unit, power_of_two(u_step)), torch.maximum(t_unit, power_of_two(t_step)))
        u_ratio, t_ratio = _ratio(u_unit, self._input_unit), _ratio(t_unit, self._target_unit)
        same = bool((u_ratio == 1).all() and (t_ratio == 1).all())
        for mine, theirs, rows in ((self._gram, other._gram, u_ratio), (self._cross, other._cross, t_ratio)):
            mine.add_(theirs.to(mine) if same else _scale(theirs.to(mine, copy=True), rows, u_ratio))
        u_step, t_step = self._in_units(u_step, self._input_unit), self._in_units(t_step, self._target_unit)
        weighted = u_step[:, None] * (self.count / total * other.count)
        self._add_products(weighted, u_step[:, None], t_step[:, None])
        self._power += other._power.to(self.device) * t_ratio.square()
        self._power += (self.count / total * other.count) * t_step.square()
        self.input_mean = self.input_mean + (u_mean - self.input_mean) * (other.count / total)
        self.target_mean = self.target_mean + (t_mean - self.target_mean) * (other.count / total)
        self.count = total

    def finalize(self) -> Normal:
        """Returns the means and second moments in the units of inputs and targets.

        Raises:
            DataError: No position was seen.
        """
        if self.count == 0:
            raise DataError("There are no moments to solve with: this layer has seen no position of any sample.")
        with full_precision(self.device):
            return self._finalize()

    def _finalize(self) -> Normal:
        u_mean, t_mean = self.input_mean, self.target_mean
        dtype = self._wide if self._rounding < torch.finfo(torch.float32).eps else torch.float32
        sizes = [self._input_unit, self._target_unit]
        if not self.centred:
            sizes = [torch.maximum(x, power_of_two(m)) for x, m in zip(sizes, (u_mean, t_mean), strict=True)]
        if not all(_in_float32(size) for size in sizes):
            dtype = self._wide
        gram, cross = (
            _scale(sums.to(dtype, copy=True).div_(self.count), rows, self._input_unit)
            for sums, rows in ((self._gram, self._input_unit), (self._cross, self._target_unit))
        )
        power = self._power / self.count * self._target_unit.square()
        _mirror(gram)
        if not self.centred:
            gram.baddbmm_(u_mean[:, :, None].to(dtype), u_mean[:, None].to(dtype))
            cross.baddbmm_(t_mean[:, :, None].to(dtype), u_mean[:, None].to(dtype))
            power = power + t_mean.square()
        if not (is_finite(gram.diagonal(dim1=1, dim2=2)) and is_finite(power)):
            raise DataError("Inputs or targets of this layer are so large that their squares are not finite.")
        return Normal(
            count=self.count,
            input_mean=u_mean.clone(),
            target_mean=t_mean.clone(),
            gram=gram,
            cross=cross,
            target_power=power.clamp_min(0.0),
            centred=self.centred,
            rounding=self._rounding,
        )


def _finite_mean(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not values.dtype.is_floating_point:
        raise UsageError(f"The {name} have dtype {values.dtype}; moments are of floating-point numbers.")
    mean = values.mean(1, dtype=dtype)
    if values.shape[1] and not bool(torch.isfinite(mean).all()):
        groups, columns = (~torch.isfinite(mean)).nonzero(as_tuple=True)
        raise DataError(
            f"The {name} of this layer are not finite (NaN or infinity) in {len(columns)} of {mean.numel()} columns, "
            f"first in column {int(columns[0])} of group {int(groups[0])}, so no weight can be solved for. Look for "
            "the sample or the layer before that makes them."
        )
    return mean


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left' right in place."""
    if sums.dtype == torch.float32:
        left, right = left.to(sums.dtype), right.to(sums.dtype)
    if sums.dtype == left.dtype == right.dtype:
        sums.baddbmm_(left.mT, right)
    else:
        for some, others in zip(torch.split(left, _POSITIONS, 1), torch.split(right, _POSITIONS, 1), strict=True):
            sums.add_(some.to(others.dtype).mT @ others)


def _centred(values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values less their mean as rounded to their precision, and the rest of the mean."""
    rounded = mean.to(values.dtype)
    return values - rounded[:, None], mean - rounded.to(mean.dtype)


def _largest(values: Tensor, step: Tensor) -> Tensor:
    largest = torch.maximum(torch.linalg.vector_norm(values, float("inf"), dim=1).to(step.dtype), step.abs())
    if not bool(torch.isfinite(largest).all()):
        raise DataError(f"Inputs or targets of this layer differ by more than the largest number of {values.dtype}.")
    return power_of_two(largest)


def _ratio(old: Tensor, new: Tensor) -> Tensor:
    # Where the old unit is 0, there is nothing to scale but zeros.
    return torch.where(old > 0, old / new.masked_fill(new == 0, 1.0), torch.ones_like(old))


def _scale(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix.mul_(rows[:, :, None].to(matrix.dtype)).mul_(columns[:, None].to(matrix.dtype))


def _in_float32(values: Tensor) -> bool:
    exponent = torch.frexp(values[values != 0]).exponent.abs()
    return not exponent.numel() or int(exponent.max()) <= _FLOAT32_EXPONENT


def _mirror(gram: Tensor) -> None:
    for start in range(0, gram.shape[1], _COLUMNS):
        block = slice(start, start + _COLUMNS)
        # Products of a block with itself are not symmetric to the last digit.
        gram[:, block, block] = gram[:, block, block].triu() + gram[:, block, block].triu(1).mT
        gram[:, start + _COLUMNS :, block] = gram[:, block, start + _COLUMNS :].mT
