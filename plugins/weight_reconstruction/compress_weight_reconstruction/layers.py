"""One weight that is reconstructed: what is gathered for it, and how the solution is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress_core.data.forwards import writing
from compress_weight_reconstruction.freedom import Allowed
from compress_weight_reconstruction.gathering import Gathering
from compress_weight_reconstruction.interception import Use, WeightCall
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.products import (
    wide,
)
from compress_weight_reconstruction.report import LayerError
from compress_weight_reconstruction.solvers import Freedom, Grid, Normal, Solution, solve

# The share of the shortcut's error that the last layer before a residual sum makes up for.
_SHORTCUT = 0.5
_SMALLEST_SCALE = 0.1


@dataclass(frozen=True)
class Bias:
    """The bias of a layer, which takes up the mean of the error.

    Attributes:
        parameter: The stored parameter, or a part of it.
        support: Which elements may be changed; boolean, of its shape.
    """

    parameter: torch.Tensor
    support: torch.Tensor


class Layer:
    """A weight and what the forwards have shown of it so far.

    Args:
        name: Dotted name of the weight, with the rows in brackets if it is a part of one.
        parameter: The stored parameter, or a part of it.
        use: How it enters its products.
        allowed: What its transforms allow.
        bias: The bias, if the mean of the error goes there.
        has_norm: Whether the mean of the error goes to a batch norm.
        scale: By what that batch norm multiplies each output.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.Tensor,
        use: Use,
        allowed: Allowed,
        bias: Bias | None,
        *,
        has_norm: bool,
        scale: torch.Tensor | None,
    ) -> None:
        self.name, self._parameter, self._use = name, parameter, use
        self._allowed, self._bias = allowed, bias
        self._scale = scale
        self._gathering = Gathering(name, parameter, use, centred=has_norm or bias is not None)
        self._reason = ""

    @property
    def weight_name(self) -> str:
        """Dotted name of the parameter, without the rows of a part."""
        return self.name.partition("[")[0]

    def observe(self, reference: WeightCall, compressed: WeightCall, positions: Positions) -> None:
        """Adds one call: the inputs of the compressed model, and the outputs of the uncompressed one.

        Args:
            reference: The call in the uncompressed model, with its output.
            compressed: The call in the compressed model, before it is made.
            positions: Chooses positions.

        Raises:
            DataError: There are values that are not finite.
        """
        if reference.product.arguments["input"].shape != compressed.product.arguments["input"].shape:
            self._reason = "its inputs have other shapes in the two models, so their positions cannot be paired"
            return
        self._gathering.add(compressed.product, reference, positions, self._missing(reference, compressed))

    def _missing(self, reference: WeightCall, compressed: WeightCall) -> torch.Tensor | None:
        """Returns what the layer should add for the shortcut of a residual sum, in the shape of its output."""
        wanted, found, output = reference.shortcut, compressed.shortcut, reference.output
        if wanted is None or found is None or output is None or not wanted.shape == found.shape == output.shape:
            return None
        missing = _SHORTCUT * (wide(wanted) - wide(found))
        if self._scale is None:
            return missing
        # A channel that the batch norm makes small would have to become very large.
        scale = wide(self._scale)
        counts = scale.abs() > _SMALLEST_SCALE * scale.abs().mean()
        factor = torch.where(counts, 1 / scale, 0.0)
        channel = -1 if self._use.kind == "linear" else output.ndim - self._parameter.ndim + 1
        return missing * factor.view([-1 if dim == channel % output.ndim else 1 for dim in range(output.ndim)])

    def solve(self, damping: float) -> LayerError | str:
        """Solves for the weight and writes it to the parameter.

        Args:
            damping: See the config.

        Returns:
            The errors before and after, or why the weight was left alone.
        """
        # Dropped when they are solved, as they are large.
        moments, self._gathering.moments = self._gathering.moments, None
        if self._reason or moments is None or not moments.count:
            return self._reason or "no batch has reached it"
        normal = moments.finalize()
        del moments
        support = self._as_matrices(self._allowed.support)
        grid = self._grid()
        project = self._project if self._allowed.grid is not None and grid is None else None
        solution = solve(self._weight(), normal, Freedom(support.contiguous(), grid, project), damping=damping)
        if not bool(torch.isfinite(solution.weight.to(self._parameter.dtype)).all()):
            return f"the solution is out of the range of {self._parameter.dtype}"
        self._write(solution)
        return _error(self.name, normal, solution, support.any(2))

    def _weight(self) -> torch.Tensor:
        return wide(self._as_matrices(self._parameter.detach())).contiguous()

    def _as_matrices(self, values: torch.Tensor) -> torch.Tensor:
        return self._use.as_matrices(values)

    def _as_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        return self._use.as_weight(matrices, self._parameter.shape)

    def _grid(self) -> Grid | None:
        """Returns the grid by row; None if there is none, or if its values differ within a row."""
        levels = self._allowed.grid
        if levels is None:
            return None
        scale, zero = (
            self._as_matrices(values.detach().expand(self._parameter.shape))
            for values in (levels.scale, levels.zero_point)
        )
        step, shift = wide(scale[:, :, :1]), zero[:, :, :1]
        if not torch.equal(scale, scale[:, :, :1].expand_as(scale)) or not torch.equal(zero, shift.expand_as(zero)):
            return None
        adjustable = levels.adjustable
        if levels.scale.numel() == 1:
            step, shift = step[:1, :1], shift[:1, :1]
        elif levels.scale.numel() != step.numel():
            adjustable = False
        return Grid(step.contiguous(), levels.low - shift, levels.high - shift, adjustable)

    def _project(self, matrices: torch.Tensor) -> torch.Tensor:
        return self._as_matrices(self._allowed.project(self._as_weight(matrices).to(self._parameter.dtype)))

    def _write(self, solution: Solution) -> None:
        solved = self._as_weight(solution.weight).to(self._parameter.dtype)
        # What is masked becomes zero: the others have made up for it, so its old value must not come back. Where
        # nothing is left of a row nothing was solved, and a channel that comes back has its filter.
        rows = self._as_matrices(self._allowed.support).any(2, keepdim=True)
        is_solved = self._as_weight(rows.expand(self._gathering.shape))
        with writing(), torch.no_grad():
            self._parameter.copy_(torch.where(is_solved, solved.mul_(self._allowed.support), self._parameter))
            if self._bias is not None:
                bias = self._bias.parameter
                moved = bias + solution.bias.reshape(bias.shape).to(bias.dtype)
                bias.copy_(torch.where(self._bias.support, moved, bias))
            if solution.step is not None:
                self._set_scale(solution.step)

    def _set_scale(self, step: torch.Tensor) -> None:
        levels, gridded = self._allowed.grid, self._allowed.gridded
        assert levels is not None and gridded is not None
        rows = self._as_weight(step.expand(self._gathering.shape).to(levels.scale.dtype))
        index = tuple(slice(None) if size > 1 else slice(1) for size in _padded(levels.scale, rows.ndim))
        gridded.set_scale(rows[index].reshape(levels.scale.shape))


def _padded(scale: torch.Tensor, dims: int) -> tuple[int, ...]:
    return (1,) * (dims - scale.ndim) + tuple(scale.shape)


def _error(name: str, normal: Normal, solution: Solution, kept: torch.Tensor) -> LayerError:
    """Returns the errors of the rows of which something is left."""
    variance = float(normal.target_power[kept].sum())
    scale = 1 / variance if variance > 0 else 0.0
    before, after = (float(errors[kept].sum()) * scale for errors in (solution.error_before, solution.error_after))
    return LayerError(name, normal.count, before, after)
