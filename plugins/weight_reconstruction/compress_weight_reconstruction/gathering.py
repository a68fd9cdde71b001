"""Gathers moments of a weight's inputs and outputs, call by call."""

from __future__ import annotations

import torch

from compress_core import DataError
from compress_weight_reconstruction.interception import Use, WeightCall
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.products import (
    Product,
    input_rows,
    output_rows,
    output_sizes,
    targets_without_bias,
)
from compress_weight_reconstruction.solvers import Moments


class Gathering:
    """The moments of one weight, or of a part of it.

    Args:
        name: Its dotted name, for messages.
        parameter: The values of the weight, in the shape of the parameter or of the part.
        use: How it enters its products.
        centred: Whether moments are about the means.

    Attributes:
        shape: (groups, rows, columns).
        moments: What was gathered; None before the first call. Made when it is needed, because Gram matrices of all
            layers together would be large.
        calls: Number of calls.
        samples: Number of samples in all calls; of a linear layer, size of the first dimension of its outputs.
    """

    def __init__(self, name: str, parameter: torch.Tensor, use: Use, *, centred: bool = True) -> None:
        self._name, self._use, self._centred = name, use, centred
        self._dims = parameter.ndim - 2 if use.kind != "linear" else 1
        self.shape = use.as_matrices(parameter.detach()).shape
        self.moments: Moments | None = None
        self.calls = self.samples = 0

    def add(
        self, inputs: Product, reference: WeightCall, positions: Positions, missing: torch.Tensor | None = None
    ) -> None:
        """Adds one call.

        Args:
            inputs: The product that the inputs are taken of.
            reference: The call, with its output, that makes the targets: what the weight has added to the output.
            positions: Chooses positions.
            missing: What is added to the targets, in the shape of the output.

        Raises:
            DataError: There are values that are not finite.
        """
        output, kind = reference.output, self._use.kind
        assert output is not None
        if not output.numel():
            return
        groups, rows, columns = self.shape
        samples, sizes = output_sizes(output, kind, self._dims)
        chosen = positions.choose(samples, sizes, columns).to(output.device)
        targets = targets_without_bias(reference.product, output, self._dims, chosen)
        if missing is not None:
            targets = targets + output_rows(missing, kind, self._dims, self._use.groups, chosen)
        if self.moments is None:
            self.moments = Moments(groups, columns, rows, device=output.device, centred=self._centred)
        try:
            self.moments.update(input_rows(inputs, chosen, sizes), targets)
        except DataError as error:
            raise DataError(f"the layer of '{self._name}', on the calibration data: {error}") from error
        self.calls += 1
        self.samples += samples
