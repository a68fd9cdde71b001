"""Compressions of a trained network without fine-tuning, as the adaptation benchmark needs them.

Sparsity is the plugin's. Filter pruning and quantization are simulated here with masks and rounded weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress_core import Stage, create_compressed_model, mask_weight
from compress_core.transforms import add_weight_transform, raw_parameter


@dataclass(frozen=True)
class Compression:
    """A way to compress: kind `sparsity` (level), `filters` (share zeroed in each convolution) or `bits` (weights)."""

    kind: str
    amount: float

    def __str__(self) -> str:
        if self.kind == "bits":
            return f"{self.amount:.0f}-bit weights"
        return f"{100 * self.amount:.0f} % {'sparsity' if self.kind == 'sparsity' else 'of filters'}"

    def apply(self, model: nn.Module) -> None:
        """Compresses a model in place; batch norm stays as it is."""
        if self.kind == "sparsity":
            section = {"algorithm": "magnitude_sparsity", "sparsity_init": self.amount}
            section["params"] = {"sparsity_target": self.amount}
            create_compressed_model(model, {"compression": section})
            return
        for name, parameter in list(model.named_parameters()):
            if self.kind == "bits" and parameter.ndim > 1:
                add_weight_transform(model, name, RoundedWeight(int(self.amount)), stage=Stage.PRECISION)
            elif self.kind == "filters" and parameter.ndim == 4:
                mask_weight(model, name, weakest_filters_masked(raw_parameter(model, name), self.amount))


CASES = (
    Compression("sparsity", 0.5),
    Compression("sparsity", 0.8),
    Compression("sparsity", 0.9),
    Compression("filters", 0.2),
    Compression("filters", 0.4),
    Compression("bits", 8),
    Compression("bits", 4),
    Compression("bits", 3),
)


class RoundedWeight(nn.Module):
    """Rounds a weight to a symmetric grid of 2^bits - 1 values for each output channel."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        largest = weight.detach().flatten(1).abs().amax(1).clamp_min(1e-12)
        scale = (largest / self.levels).view(-1, *[1] * (weight.ndim - 1))
        return (weight / scale).round() * scale


def weakest_filters_masked(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Returns a mask without the filters of the smallest L2 norms."""
    norms = weight.detach().flatten(1).norm(dim=1)
    mask = torch.ones_like(norms)
    mask[norms.argsort()[: round(share * len(norms))]] = 0
    return mask.view(-1, 1, 1, 1)
