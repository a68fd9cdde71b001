"""Self-gated activation functions with a quantized gate: x * q(sigmoid(x)) in place of SiLU.

Runtimes compute SiLU as a sigmoid and a product. If a file has quantizers only in front of it and behind it, they
compute both in floating point; with one at the sigmoid too, they compute both with integers. As that rounds, the model
has to compute the same in training.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from compress_core import UsageError
from compress_core.transforms import ActivationTransform
from compress_quantization.fake_quantize import FakeQuantize, SymmetricFakeQuantize

KEY = "gate"
"""What follows the algorithm's name in the key of a gate: behind it there may be a quantizer at the same place."""


class FixedQuantize(SymmetricFakeQuantize):
    """Rounds values between 0 and 1 to multiples of 1/255: the integers 0 to 255 with the zero point 0.

    0 and 1 are on the grid, so that the gate of a large value is exactly 1, and that of a very negative one 0. Nothing
    is learned, calibrated or saved.
    """

    scale: torch.Tensor  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__((1,), 8, signed=False)
        del self.scale
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Refuses every range.

        Raises:
            UsageError: Always.
        """
        raise UsageError("the range of a gate is 0 to 1 and cannot be set")


class QuantizedGate(ActivationTransform):
    """Computes SiLU with a quantized gate: x * q(sigmoid(x)), with straight-through gradients for q.

    Attributes:
        quantizer: q. While it is a `FakeQuantize` that is off or observed, this computes SiLU itself, to the last bit.
    """

    computes_activation: ClassVar[str] = "silu"

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the activation of `x`, in its shape and dtype."""
        if isinstance(self.quantizer, FakeQuantize) and not self.quantizer.is_active(x):
            return F.silu(x)
        gated: torch.Tensor = x * self.quantizer(torch.sigmoid(x))
        return gated


def quantizer_in(transform: nn.Module | None) -> FakeQuantize | None:
    """Returns the quantizer that a transform is or has, or None."""
    found = transform.quantizer if isinstance(transform, QuantizedGate) else transform
    return found if isinstance(found, FakeQuantize) else None


def with_quantizer(transform: nn.Module, quantizer: nn.Module) -> nn.Module:
    """Returns what takes the place of a transform if its quantizer is replaced by another module."""
    return QuantizedGate(quantizer) if isinstance(transform, QuantizedGate) else quantizer
