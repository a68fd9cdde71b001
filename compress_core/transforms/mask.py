"""`WeightMask`, the transform that sparsity and pruning share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.transforms.base import WeightTransform
from compress_core.transforms.stage import Stage
from compress_core.transforms.weight import add_weight_transform, get_weight_transform, raw_parameter


class WeightMask(WeightTransform):
    """Multiplies a weight by a mask of zeros and ones.

    The gradient of the stored parameter is masked as well. The stored value is kept, so a masked weight can come back
    when the mask is computed again.

    The mask has the weight's dtype. Training steps were not slower with it than with a boolean mask, which torch has to
    convert in each forward and backward (`benchmarks/sparsity_cost.py`).

    Attributes:
        mask: Zeros and ones, with the weight's dtype and device, of its shape or one that broadcasts to it.
    """

    mask: torch.Tensor
    recomputable = True
    follows: ClassVar[Mapping[str, str]] = {"mask": "weight"}

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns `weight * mask`."""
        return weight * self.mask

    def extra_repr(self) -> str:
        """Shows the mask's shape."""
        return f"shape={tuple(self.mask.shape)}"


def mask_weight(
    model: nn.Module,
    name: str,
    mask: torch.Tensor | None = None,
    *,
    key: str = "mask",
    stage: Stage = Stage.SPARSITY,
) -> WeightMask:
    """Masks a weight, or changes its present mask.

    Args:
        model: The model, or any module above the parameter.
        name: Dotted name of the parameter below `model`, e.g. `"features.0.weight"`.
        mask: Zeros and ones (any dtype) of a shape that broadcasts to the weight's; None masks nothing.
        key: Name of the transform; an algorithm passes its own name, so that two algorithms can mask one weight.
        stage: Its stage, which determines the position of the mask in the chain of this weight.

    Returns:
        The transform, whose `mask` buffer may be written to in place.

    Raises:
        TransformError: There is no such parameter, or the mask does not fit it or has values other than 0 and 1.
    """
    parameter = raw_parameter(model, name)
    if mask is None:
        values = torch.ones_like(parameter, requires_grad=False, memory_format=torch.preserve_format)
    else:
        _check_mask(name, mask, parameter)
        values = mask.detach().to(device=parameter.device, dtype=parameter.dtype, copy=True)
    existing = get_weight_transform(model, name, key)
    if existing is None:
        transform = WeightMask(values)
        add_weight_transform(model, name, transform, stage=stage, key=key)
        return transform
    if not isinstance(existing, WeightMask):
        raise TransformError(f"the transform '{key}' of '{name}' is a {type(existing).__name__}, not a mask")
    existing.mask = values
    return existing


def _check_mask(name: str, mask: torch.Tensor, parameter: torch.Tensor) -> None:
    try:
        fits = torch.broadcast_to(mask, parameter.shape).shape == parameter.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise TransformError(
            f"mask for '{name}': shape {tuple(mask.shape)} does not broadcast to the weight's {tuple(parameter.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise TransformError(f"mask for '{name}': holds other values than 0 and 1")
