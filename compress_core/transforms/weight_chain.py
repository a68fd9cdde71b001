"""The chain of a weight."""

from __future__ import annotations

import torch

from compress_core.transforms.chain import TransformChain
from compress_core.transforms.recomputation import note


class WeightChain(TransformChain):
    """The transforms of a weight, computed whenever a layer reads it.

    Nothing is kept in eval mode. Writes through `.data`, NumPy or other memory change no version of the parameter, so
    only comparing all elements with a copy would find them: that takes as long as transforming them (ResNet-18 at 64
    pixels, batch 1, with fake-quantizers: 46 ms with such a check, 37 ms without keeping anything, 32 ms without any
    check). For 32 images weights that are not even checked would buy 1 to 2 % of a forward of ResNet-18, 3 % of the
    small ViT and 7 % of MobileNetV2.

    Attributes:
        recompute: Whether layers compute the weight again in the backward pass, see `recomputation`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maps the stored parameter to the tensor that the layer computes with; the shape stays."""
        result = super().forward(tensor)
        if self.recompute and not torch.compiler.is_compiling():
            note(self, tensor, result)
        return result
