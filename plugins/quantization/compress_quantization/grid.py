"""The integer grid of a quantizer, in the form that runtimes and export formats use."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """An affine grid, which represents x by the integer clamp(round(x / scale) + zero_point, quant_min, quant_max).

    Attributes:
        scale: Step of the grid, positive; float32, shape () or (channels,).
        zero_point: Integer that represents 0; int32, the shape of `scale`.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        channel_dim: Dimension of the tensor to which `scale` belongs; None for one grid for the whole tensor.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int
    channel_dim: int | None = None

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the integers that represent `x`; int32, the shape of `x`."""
        scale, zero_point = self._broadcast(self.scale, x), self._broadcast(self.zero_point, x)
        return (torch.round(x / scale) + zero_point).clamp(self.quant_min, self.quant_max).to(torch.int32)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        """Returns the values that integers represent, in the dtype of `scale`."""
        scale, zero_point = self._broadcast(self.scale, integers), self._broadcast(self.zero_point, integers)
        return (integers - zero_point) * scale

    def _broadcast(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self.channel_dim is None:
            return values
        shape = [1] * like.ndim
        shape[self.channel_dim] = -1
        return values.view(shape)
