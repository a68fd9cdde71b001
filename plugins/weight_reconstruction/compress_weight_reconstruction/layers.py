"""One weight that is reconstructed: what is gathered for it, and how the solution is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress_core.data.forwards import writing
from compress_weight_reconstruction.freedom import Allowed
from compress_weight_reconstruction.interception import Use, WeightCall
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.products import as_matrices, as_weight, input_rows, output_rows, output_sizes, wide
from compress_weight_reconstruction.provisional import Freedom, Moments, solve
from compress_weight_reconstruction.report import LayerError


@dataclass(frozen=True)
class Bias:
    """The bias of a layer, which takes up the mean of the error.

    Attributes:
        parameter: The stored parameter.
        support: Which elements may be changed; boolean, of its shape.
    """

    parameter: nn.Parameter
    support: torch.Tensor


class Layer:
    """A weight and what the forwards have shown of it so far.

    Args:
        name: Dotted name of the weight.
        parameter: The stored parameter.
        use: How it enters its products.
        allowed: What its transforms allow.
        bias: The bias, if the mean of the error goes there.
        has_norm: Whether the mean of the error goes to a batch norm.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, use: Use, allowed: Allowed, bias: Bias | None, *, has_norm: bool
    ) -> None:
        self.name, self._parameter, self._use = name, parameter, use
        self._allowed, self._bias = allowed, bias
        self._centred = has_norm or bias is not None
        self._matrices = self._as_matrices(parameter.detach())
        groups, rows, columns = self._matrices.shape
        self._old_bias = None
        self._moments = Moments(groups, columns, rows, device=parameter.device, centred=self._centred)

    @property
    def columns(self) -> int:
        """Number of inputs of each output."""
        return self._matrices.shape[2]

    def observe(self, reference: WeightCall, compressed: WeightCall, positions: Positions) -> None:
        """Adds one call: the inputs of the compressed model, and the outputs of the uncompressed one.

        Args:
            reference: The call in the uncompressed model, with its output.
            compressed: The call in the compressed model, before it is made.
            positions: Chooses positions of convolutions.
        """
        output, kind, groups = reference.output, self._use.kind, self._use.groups
        assert output is not None
        if not output.numel():
            return
        dims = self._parameter.ndim - 2 if kind != "linear" else 1
        samples, sizes = output_sizes(output, kind, dims)
        chosen = positions.choose(samples, sizes, self.columns).to(output.device)
        targets = output_rows(output, kind, dims, groups, chosen)
        bias = reference.product.arguments.get("bias")
        if bias is not None:
            targets = targets - wide(bias.detach()).reshape(self._matrices.shape[0], 1, -1)
        self._moments.update(input_rows(compressed.product, chosen, sizes), targets)

    def solve(self, damping: float) -> LayerError | str:
        """Solves for the weight and writes it to the parameter.

        Returns:
            The errors before and after, or why the weight was left alone.
        """
        if not self._moments.count:
            return "no batch has reached it"
        normal = self._moments.finalize()
        support = self._as_matrices(self._allowed.support)
        project = None if self._allowed.grid is None else self._project
        solution = solve(self._matrices, normal, Freedom(support, project), damping=damping)
        if not bool(torch.isfinite(solution.weight).all()):
            return "the solution is not finite: the inputs or outputs on the calibration data are too large, or NaN"
        self._write(solution.weight, solution.bias)
        variance = float(normal.target_square.sum())
        before, after = (float(errors.sum()) for errors in (solution.error_before, solution.error_after))
        scale = 1 / variance if variance > 0 else 0.0
        return LayerError(self.name, normal.count, max(before * scale, 0.0), max(after * scale, 0.0))

    def _as_matrices(self, values: torch.Tensor) -> torch.Tensor:
        return as_matrices(values, self._use.kind, self._use.groups, columns_first=self._use.columns_first)

    def _as_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        shape = self._parameter.shape
        return as_weight(matrices, shape, self._use.kind, columns_first=self._use.columns_first)

    def _project(self, matrices: torch.Tensor) -> torch.Tensor:
        return self._as_matrices(self._allowed.project(self._as_weight(matrices).to(self._parameter.dtype)))

    def _write(self, matrices: torch.Tensor, correction: torch.Tensor) -> None:
        new = self._as_weight(matrices).to(self._parameter.dtype)
        with writing(), torch.no_grad():
            self._parameter.copy_(torch.where(self._allowed.support, new, self._parameter))
            if self._bias is not None:
                bias = self._bias.parameter
                moved = bias + correction.reshape(bias.shape).to(bias.dtype)
                bias.copy_(torch.where(self._bias.support, moved, bias))
