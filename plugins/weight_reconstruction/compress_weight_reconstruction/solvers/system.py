"""The damped normal equations of a layer, in units in which they are well scaled.

The quadratic error of a weight W is minimized together with a damping that pulls W towards the weight W0 that it had:
`(W - W0) A = S - W0 G`, with A = G + damping. In units of the columns' own powers the diagonal of A is within [1/4, 1],
so float32 is enough, whatever the magnitudes of inputs, and factorizations need no further preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress_core import UsageError
from compress_weight_reconstruction.solvers.moments import Normal
from compress_weight_reconstruction.solvers.numerics import unit_of, wide_dtype

# Of the damping of a column, how much is relative to the mean of all columns: it holds weights that see almost nothing.
_SHARED = 0.1
# Below this many rounding errors of the moments, directions are noise.
_NOISE = 8.0
# Rounding errors that are first added to a diagonal where a factorization fails.
_JITTER = 8.0
# Columns that are converted to float64 at a time.
_COLUMNS = 512


class System:
    """A = gram + diag(ridge), in units of `unit`: what every solver works with.

    Damping is relative to the diagonal of the Gram matrix, and to a tenth of that to its mean. Directions whose inputs
    are within rounding error of nothing are damped in any case. Dead inputs, of which the moments say nothing, have the
    mean diagonal, so that their weights stay.

    Attributes:
        gram: Second moments of the inputs, shape (groups, columns, columns).
        ridge: Damping of each column, float64, shape (groups, columns).
        unit: A power of two for each column, about the square root of A's diagonal; same shape.
        dtype: What to compute in: float32, or float64 if the moments are that exact.
    """

    def __init__(self, normal: Normal, damping: float) -> None:
        self.gram = normal.gram
        self._power = normal.diagonal()
        mean = self._power.mean(1, keepdim=True)
        ridge = damping * (self._power + _SHARED * mean) + _NOISE * normal.rounding * self._power
        nothing = (self._power + ridge) == 0
        self.ridge = torch.where(nothing, torch.where(mean > 0, mean, torch.ones_like(mean)), ridge)
        self.unit = unit_of((self._power + self.ridge).sqrt())
        exact = self.gram.dtype == torch.float64 and normal.rounding <= torch.finfo(torch.float64).eps
        self.dtype = torch.float64 if exact else torch.float32
        self._matrix: Tensor | None = None
        self._factor: Tensor | None = None

    def fits(self, copies: float, limit: int) -> bool:
        """Returns whether so many copies of A are within a number of bytes."""
        return self.gram.numel() * self.dtype.itemsize * copies <= limit

    def power(self) -> Tensor:
        """Returns the diagonal of A in the moments' units, float64, shape (groups, columns)."""
        return self._power + self.ridge

    def diagonal(self) -> Tensor:
        """Returns the diagonal of A in its units, shape (groups, columns)."""
        return (self.power() / self.unit.square()).to(self.dtype)

    def columns(self, columns: slice) -> Tensor:
        """Returns some columns of A, shape (groups, all columns, some columns), in a new tensor."""
        unit, gram = self.unit.to(self.gram.dtype), self.gram[:, :, columns]
        part = (gram / unit[:, :, None]).div_(unit[:, None, columns]).to(self.dtype)
        part[:, columns].diagonal(dim1=1, dim2=2).copy_(self.diagonal()[:, columns])
        return part

    def _whole(self) -> Tensor:
        columns = self.gram.shape[2]
        whole = torch.empty(self.gram.shape, dtype=self.dtype, device=self.gram.device)
        for start in range(0, columns, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            whole[:, :, part] = self.columns(part)
        return whole

    def matrix(self) -> Tensor:
        """Returns A as one matrix, which is kept."""
        if self._matrix is None:
            self._matrix = self._whole()
        return self._matrix

    def factor(self) -> Tensor:
        """Returns the lower Cholesky factor of A, which is kept; takes no memory but its own."""
        if self._factor is None:
            self._factor = _factorized_in_place(self._whole)
        return self._factor

    def apply(self, rows: Tensor) -> Tensor:
        """Returns rows times A, shape (groups, rows, columns); without a copy of A where there is none yet."""
        if self._matrix is not None:
            return rows @ self._matrix
        unit = self.unit[:, None].to(self.gram.dtype)
        product = ((rows.to(self.gram.dtype) / unit) @ self.gram).div_(unit).to(self.dtype)
        return product.addcmul_(rows, (self.ridge / self.unit.square())[:, None].to(self.dtype))

    def residual(self, weight: Tensor, cross: Tensor) -> Tensor:
        """Returns `cross - weight gram`, the negative gradient of half the error; float64, in the moments' units."""
        wide = wide_dtype(weight.device)
        rest = cross.to(wide, copy=True)
        for start in range(0, weight.shape[2], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            rest.baddbmm_(weight[:, :, part].to(wide), self.gram[:, part].to(wide), alpha=-1)
        return rest

    def in_units(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a residual in units of the columns and of its own rows, and the latter, shape (groups, rows, 1)."""
        scaled = residual / self.unit[:, None]
        size = unit_of(scaled.abs().amax(2, keepdim=True))
        return scaled.div_(size).to(self.dtype), size

    def from_units(self, update: Tensor, size: Tensor) -> Tensor:
        """Returns what is to be added to the weight, float64, from an update in units."""
        return update.to(size.dtype).div_(self.unit[:, None]).mul_(size)

    def solve(self, residual: Tensor) -> Tensor:
        """Returns residual A^-1, all in units."""
        return solve_factored(self.factor(), residual)


def _factorized_in_place(make: Callable[[], Tensor]) -> Tensor:
    """Returns lower Cholesky factors, as `cholesky` does, in the memory of the matrices, which are made anew for it."""
    jitter = 0.0
    while True:
        # Column by column in memory, which for a symmetric matrix is the same, and what the library works in.
        matrices = make().mT
        matrices.diagonal(dim1=1, dim2=2).add_(jitter)
        info = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
        torch.linalg.cholesky_ex(matrices, out=(matrices, info))
        if not bool(info.any()):
            return matrices
        jitter = _larger(jitter, matrices)


def cholesky(matrices: Tensor) -> Tensor:
    """Returns lower Cholesky factors of matrices that are positive definite but for rounding, with diagonals near 1.

    Where a factorization fails, a multiple of the identity is added to that matrix, the smallest of powers of ten.
    The matrices may be overwritten.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrices)
    jitter = 0.0
    while bool(info.any()):
        jitter = _larger(jitter, matrices)
        matrices.diagonal(dim1=1, dim2=2).add_((info != 0)[:, None] * jitter)
        factor, info = torch.linalg.cholesky_ex(matrices)
    return factor


def _larger(jitter: float, matrices: Tensor) -> float:
    if jitter > matrices.shape[-1]:
        # Elements of a Gram matrix in its units are at most about 1, so this much is always enough.
        raise UsageError("The moments of this layer's inputs are no second moments: their matrix is not positive.")
    return max(10 * jitter, _JITTER * torch.finfo(matrices.dtype).eps)


def solve_factored(factor: Tensor, rows: Tensor) -> Tensor:
    """Returns rows A^-1 for the lower Cholesky factors of A, shape (matrices, rows, columns)."""
    half: Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved.mT
