"""How much an element or a channel of a weight matters, by the same moments that the weight is solved with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from compress_core import UsageError
from compress_weight_reconstruction.solvers.moments import Normal
from compress_weight_reconstruction.solvers.numerics import full_precision, wide_dtype
from compress_weight_reconstruction.solvers.system import System, cholesky

Score = Literal["magnitude", "activation", "second_order"]
# Columns of the inverse that are made at a time.
_COLUMNS = 512


def column_importance(normal: Normal, score: Score, *, damping: float) -> Tensor:
    """Returns by what the square of a weight is multiplied to tell what removing it costs.

    "magnitude": 1. "activation": the power G_jj of its input, the error if all other weights stay (as in Wanda, Sun et
    al. 2023). "second_order": 1 / [A^-1]_jj, the error if all other weights of the row make up for it (optimal brain
    surgeon, Hassibi & Stork 1993). For dead inputs the latter two are 0.

    Args:
        normal: Moments of the layer.
        score: Which.
        damping: Of A, as in `solve`; only "second_order" needs it.

    Returns:
        float64, shape (groups, columns).
    """
    if score not in get_args(Score):
        raise UsageError(f"score is {score!r}; it is one of {', '.join(map(repr, get_args(Score)))}.")
    power = normal.diagonal()
    if score == "magnitude":
        return torch.ones_like(power)
    if score == "activation":
        return power
    with full_precision(power.device):
        system = System(normal, damping)
        inverse = torch.empty_like(power)
        for part, columns in _inverse_roots(system, torch.arange(power.shape[1], device=power.device), 1):
            inverse[:, part] = columns.square().sum(1).to(inverse.dtype)
        return (system.unit.square() / inverse).masked_fill_(power == 0, 0.0)


def channel_errors(
    weight: Tensor,
    normal: Normal,
    channels: Tensor,
    *,
    damping: float,
    refit: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Returns by how much the squared error rises if an input channel, all of its columns, is removed.

    With `refit`, all other columns make up for it, and the rise is above the least-squares weight: with x the columns'
    part of that, x ([A^-1] of these columns)^-1 x'. Without, all other weights stay as given.

    Args:
        weight: Shape (groups, rows, columns).
        normal: Moments of the layer.
        channels: Number of the channel of each column, from 0, int64, shape (columns,).
        damping: As in `solve`; only `refit` needs it.
        refit: Whether what is left is solved again.
        row_weights: By what the error of each row is multiplied before rows are summed, e.g. the squared scale of the
            batch norm behind it; shape (groups, rows).

    Returns:
        float64, shape (groups, channels).
    """
    _check(weight, normal, channels)
    weights = torch.ones_like(normal.target_power) if row_weights is None else row_weights.to(normal.target_power)
    with full_precision(weight.device):
        system = System(normal, damping)
        weight = weight.detach().to(wide_dtype(weight.device))
        residual = system.residual(weight, normal.cross)
        if not refit:
            return _removed(system, weight, residual, channels, weights)
        rows, size = system.in_units(residual)
        best = weight + system.from_units(system.solve(rows), size)
        best.masked_fill_((normal.diagonal() == 0)[:, None], 0.0)
        return _refitted(system, best, channels, weights)


def _check(weight: Tensor, normal: Normal, channels: Tensor) -> None:
    if weight.shape != normal.cross.shape:
        raise UsageError(f"The weight has shape {tuple(weight.shape)}, the moments are of {tuple(normal.cross.shape)}.")
    if channels.shape != weight.shape[2:] or channels.dtype != torch.int64 or bool((channels < 0).any()):
        raise UsageError(
            f"The channels of {weight.shape[2]} columns are {channels.dtype} of shape {tuple(channels.shape)}; each "
            "column needs one int64, 0 or above."
        )


def _removed(system: System, weight: Tensor, residual: Tensor, channels: Tensor, weights: Tensor) -> Tensor:
    number = int(channels.max()) + 1
    result = torch.zeros(weight.shape[0], number, dtype=weight.dtype, device=weight.device)
    for channel in range(number):
        columns = (channels == channel).nonzero().flatten()
        part = weight[:, :, columns]
        gram = system.gram[:, columns[:, None], columns].to(part.dtype)
        rise = ((part @ gram + 2 * residual[:, :, columns]) * part).sum(2)
        result[:, channel] = (rise * weights).sum(1)
    return result


def _refitted(system: System, best: Tensor, channels: Tensor, weights: Tensor) -> Tensor:
    number = int(channels.max()) + 1
    counts = torch.bincount(channels, minlength=number)
    order = torch.argsort(channels, stable=True)
    result = torch.zeros(best.shape[0], number, dtype=best.dtype, device=best.device)
    scaled = best * system.unit[:, None]
    # Channels of equal size are taken together; in nearly all layers that is all of them.
    for size in sorted(set(counts[counts > 0].tolist())):
        chosen = (counts == size).nonzero().flatten()
        columns = order[(counts == size)[channels[order]]]
        for part, roots in _inverse_roots(system, columns, size):
            some = columns[part].view(-1, size)
            blocks = roots.reshape(*roots.shape[:2], *some.shape).permute(0, 2, 3, 1)
            factor = cholesky((blocks @ blocks.mT).to(best.dtype))
            rows = scaled[:, :, some].permute(0, 2, 3, 1)
            rise = torch.linalg.solve_triangular(factor, rows, upper=False).square().sum(2)
            result[:, chosen[part.start // size : part.stop // size]] = (rise * weights[:, None]).sum(2)
    return result


def _inverse_roots(system: System, columns: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields some columns at a time of L^-1, whose products with one another are the elements of A^-1 = L^-T L^-1.

    Args:
        system: A, in its units.
        columns: Which, in the order wanted.
        size: Columns that are not to be separated.
    """
    factor = system.factor()
    for start in range(0, len(columns), max(1, _COLUMNS // size) * size):
        part = slice(start, min(len(columns), start + max(1, _COLUMNS // size) * size))
        # Above its first non-zero row a column of the inverse of a triangular matrix is zero.
        first = int(columns[part].min())
        unit = torch.zeros(factor.shape[1] - first, part.stop - part.start, dtype=factor.dtype, device=factor.device)
        unit[columns[part] - first, torch.arange(unit.shape[1], device=unit.device)] = 1.0
        yield part, torch.linalg.solve_triangular(factor[:, first:, first:], unit[None], upper=False)
