"""Conjugate gradients on all rows of a weight at once, each on its own support."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_SWEEPS = 60
# What is left of the squared residual when a row is done: its error is then the least but for about this part.
_REST = 1e-6


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], rows: Tensor, diagonal: Tensor, support: Tensor | None, sweeps: int = MOST_SWEEPS
) -> Tensor:
    """Returns x with x A = rows on the support and x = 0 elsewhere, to a relative residual of 1e-3 if sweeps allow.

    The error of each row falls with each sweep, so stopping early is safe. A is never copied nor cut into submatrices:
    memory is that of six times `rows`.

    Args:
        apply: Multiplies rows by A, which is symmetric and positive semi-definite.
        rows: Right-hand sides, shape (groups, rows, columns).
        diagonal: Diagonal of A, the preconditioner, shape (groups, columns).
        support: Elements that may be non-zero, shape of `rows`; None for all.
        sweeps: Largest number of products with A.
    """
    inverse = (1.0 / diagonal)[:, None]
    x = torch.zeros_like(rows)
    rest = rows.clone() if support is None else rows * support
    direction = rest * inverse
    power = (rest * direction).sum(2, keepdim=True)
    goal = power * _REST
    for _ in range(sweeps):
        product = apply(direction)
        if support is not None:
            product *= support
        curvature = (direction * product).sum(2, keepdim=True)
        # A row that is done, or has no curvature left but rounding, stays as it is.
        goes_on = (power > goal) & (curvature > 0)
        if not bool(goes_on.any()):
            break
        step = torch.where(goes_on, power / curvature, 0.0)
        x.addcmul_(step, direction)
        rest.addcmul_(step, product, value=-1)
        scaled = rest * inverse
        new = (rest * scaled).sum(2, keepdim=True)
        direction = scaled.addcmul_(torch.where(goes_on, new / power, 0.0), direction)
        power = torch.where(goes_on, new, power)
    return x
