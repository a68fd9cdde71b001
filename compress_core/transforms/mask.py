"""`WeightMask`, the transform that sparsity and pruning share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.transforms.base import ProjectingTransform
from compress_core.transforms.checkpoints import loading_of
from compress_core.transforms.stage import Stage
from compress_core.transforms.weight import add_weight_transform, get_weight_transform, raw_parameter

# From this number of elements on, writing another tensor takes longer than a custom function.
_LARGE = 1 << 18


def _numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # On CPUs, bytes are converted eight times as fast as booleans, and products with booleans convert them.
    return mask.view(torch.uint8).to(dtype)


class _Masked(torch.autograd.Function):
    """The product of a weight and a boolean mask, which keeps the mask for the backward pass instead of a float one."""

    @staticmethod
    def forward(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _numbers(mask, weight.dtype).mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        if gradient.requires_grad and torch.is_grad_enabled():
            return gradient * mask, None
        return _numbers(mask, gradient.dtype).mul_(gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        mask: torch.Tensor = ctx.saved_tensors[0]
        return tangent * mask

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], weight: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        pairs = zip((weight, mask), in_dims, strict=True)
        weights, masks = (tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in pairs)
        return weights * masks, 0


class WeightMask(ProjectingTransform):
    """Multiplies a weight by a mask of zeros and ones.

    The gradient of the stored parameter is masked as well. The stored value is kept, so a masked weight can come back
    when the mask is computed again.

    The mask is boolean, so averages of models (`AveragedModel`, EMA of timm and others) copy it: an average of zeros
    and ones would mask nothing. A `state_dict` with a mask of another dtype loads if it holds only zeros and ones.

    Attributes:
        mask: True for elements that are kept; on the weight's device, of its shape or one that broadcasts to it.
        is_outdated: Whether weights were loaded from a checkpoint without this mask since then; who computes the mask
            again resets it.
    """

    mask: torch.Tensor
    is_outdated = False
    recomputable = True
    follows: ClassVar[Mapping[str, str]] = {"mask": "weight"}

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask if mask.dtype == torch.bool else mask != 0)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns `weight * mask`."""
        is_large = self.mask.shape == weight.shape and weight.numel() >= _LARGE
        # Graphs that are recorded hold only torch's own functions.
        if not is_large or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return weight * _numbers(self.mask, weight.dtype)
        masked: torch.Tensor = _Masked.apply(weight, self.mask)  # type: ignore[no-untyped-call]
        return masked

    def support(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the mask."""
        return self.mask

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Of a checkpoint without masks, the chain makes one with those that are here.
        self.is_outdated = id(self) not in loading_of(missing_keys).found
        found = state_dict.get(f"{prefix}mask")
        if isinstance(found, torch.Tensor) and found.dtype != torch.bool:
            if not bool(((found == 0) | (found == 1)).all()):
                error_msgs.append(
                    f"'{prefix}mask' holds other values than 0 and 1: this is an average of masks, with which nothing "
                    "is masked. Take the entries of masks from the state_dict of the model itself"
                )
                return
            state_dict[f"{prefix}mask"] = found != 0
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

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
        values = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False, memory_format=torch.preserve_format)
    else:
        _check_mask(name, mask, parameter)
        values = mask.detach().to(device=parameter.device, dtype=torch.bool, copy=True)
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
