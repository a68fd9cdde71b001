"""Tensors of a `state_dict` that NNCF saved, as an algorithm is given them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NncfTensor:
    """A tensor that NNCF added to a model.

    Attributes:
        key: Its name in the file.
        module: Dotted name of the layer that it belongs to; empty for activations.
        quantizer: NNCF's name of the quantizer, `Net/ReLU[relu]/relu_0|OUTPUT`; empty for layers.
        name: Its last part, such as `_binary_mask` or `scale`.
        value: The tensor.
    """

    key: str
    module: str
    quantizer: str
    name: str
    value: torch.Tensor
