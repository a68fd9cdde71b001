"""What to do to a tensor."""

from __future__ import annotations

from typing import NamedTuple

from compress_quantization.kernels.formulas import Activation, factors_of


class Task(NamedTuple):
    """What to do to a tensor, apart from the values of the range.

    Attributes:
        channel_dim: Dimension of the channels; None for one grid for the whole tensor.
        levels: Smallest and largest integer of the grid; counted from the low end when the range has an offset.
        offset: Whether the range has a low end of its own (asymmetric).
        activation: Activation function that is applied before, of `ACTIVATION_FUNCTIONS`, or None.
        multiplier: Factor on the gradients of the range.
    """

    channel_dim: int | None
    levels: tuple[int, int]
    offset: bool = False
    activation: Activation = None
    multiplier: float = 1.0

    @property
    def factors(self) -> tuple[float, float, float]:
        """What errors and elements below the range count, see `formulas.factors_of`."""
        return factors_of(self.levels, self.activation, self.offset)
