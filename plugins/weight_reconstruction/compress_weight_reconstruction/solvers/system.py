"""The damped normal equations of a layer, in units in which they are well scaled.

The quadratic error of a weight W is minimized together with a damping that pulls W towards the weight W0 that it had:
`(W - W0) A = S - W0 G`, with A = G + damping. In units of the columns' own powers the diagonal of A is within [1/4, 1],
so float32 is enough, whatever the magnitudes of inputs, and factorizations need no further preconditioner.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress_weight_reconstruction.solvers.moments import Normal
from compress_weight_reconstruction.solvers.numerics import unit_of, wide_dtype

# Of the damping of a column, how much is relative to the mean of all columns: it holds weights that see almost nothing.
_SHARED = 0.1
# Below this many rounding errors of the moments, directions are noise.
_NOISE = 8.0
# Columns that are converted to float64 at a time.
_COLUMNS = 512


@dataclass(frozen=True)
class System:
    """A = gram + diag(ridge), in units of `unit`: what every solver works with.

    Attributes:
        normal: The moments.
        ridge: Damping of each column, float64, shape (groups, columns).
        unit: A power of two for each column, about the square root of A's diagonal; same shape.
        dtype: What to compute in: float32, or float64 if the moments are that exact.
    """

    normal: Normal
    ridge: Tensor
    unit: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, normal: Normal, damping: float) -> System:
        """Returns the system with a damping relative to the diagonal, and to a tenth of that to its mean.

        A direction whose inputs are within rounding error of nothing is damped in any case. Dead inputs, for which
        the moments say nothing, have the mean diagonal, so that their weights stay.
        """
        diagonal = normal.diagonal()
        mean = diagonal.mean(1, keepdim=True)
        ridge = damping * (diagonal + _SHARED * mean) + _NOISE * normal.rounding * diagonal
        nothing = (diagonal + ridge) == 0
        ridge = torch.where(nothing, torch.where(mean > 0, mean, torch.ones_like(mean)), ridge)
        exact = normal.gram.dtype == torch.float64 and normal.rounding <= torch.finfo(torch.float64).eps
        return cls(normal, ridge, unit_of((diagonal + ridge).sqrt()), torch.float64 if exact else torch.float32)

    def diagonal(self) -> Tensor:
        """Returns the diagonal of A in its units, shape (groups, columns)."""
        return ((self.normal.diagonal() + self.ridge) / self.unit.square()).to(self.dtype)

    def columns(self, columns: slice | Tensor) -> Tensor:
        """Returns some columns of A, shape (groups, all columns, some columns), in a new tensor."""
        unit, gram = self.unit.to(self.normal.gram.dtype), self.normal.gram[:, :, columns]
        part = (gram / unit[:, :, None]).div_(unit[:, None, columns]).to(self.dtype)
        index = torch.arange(self.unit.shape[1], device=part.device)[columns]
        part[:, index, torch.arange(len(index), device=part.device)] = self.diagonal()[:, columns]
        return part

    @cached_property
    def matrix(self) -> Tensor:
        """A as one matrix, kept once it was made."""
        return self.columns(slice(None))

    @cached_property
    def factor(self) -> Tensor:
        """The lower Cholesky factor of A, kept once it was made."""
        return cholesky(self.matrix)

    def apply(self, rows: Tensor) -> Tensor:
        """Returns rows times A, shape (groups, rows, columns); without a copy of A where there is none yet."""
        if "matrix" in self.__dict__:
            return rows @ self.matrix
        unit, gram = self.unit[:, None].to(self.normal.gram.dtype), self.normal.gram
        product = ((rows.to(gram.dtype) / unit) @ gram).div_(unit).to(self.dtype)
        return product.addcmul_(rows, (self.ridge / self.unit.square())[:, None].to(self.dtype))

    def residual(self, weight: Tensor) -> Tensor:
        """Returns `cross - weight gram`, the negative gradient of half the error; float64, in the moments' units."""
        wide = wide_dtype(weight.device)
        rest = self.normal.cross.to(wide, copy=True)
        weight = weight.to(wide)
        for start in range(0, weight.shape[2], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            rest.baddbmm_(weight[:, :, part], self.normal.gram[:, part].to(wide), alpha=-1)
        return rest

    def in_units(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a residual in units of the columns and of its own rows, and the latter, shape (groups, rows, 1)."""
        scaled = residual / self.unit[:, None]
        size = unit_of(scaled.abs().amax(2, keepdim=True))
        return (scaled / size).to(self.dtype), size

    def from_units(self, update: Tensor, size: Tensor) -> Tensor:
        """Returns what is to be added to the weight, float64, from an update in units."""
        return update.to(size.dtype).div_(self.unit[:, None]).mul_(size)

    def solve(self, residual: Tensor) -> Tensor:
        """Returns residual A^-1, all in units."""
        return solve_factored(self.factor, residual)


def cholesky(matrices: Tensor) -> Tensor:
    """Returns lower Cholesky factors of matrices that are positive definite but for rounding, with diagonals near 1.

    Where a factorization fails, a multiple of the identity is added to that matrix, the smallest of powers of ten.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrices)
    jitter = 8 * torch.finfo(matrices.dtype).eps
    while bool(info.any()):
        failed = info != 0
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        factor[failed], info[failed] = torch.linalg.cholesky_ex(matrices[failed] + jitter * eye)
        jitter *= 10
    return factor


def solve_factored(factor: Tensor, rows: Tensor) -> Tensor:
    """Returns rows A^-1 for the lower Cholesky factors of A, shape (matrices, rows, columns)."""
    half: Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved.mT
