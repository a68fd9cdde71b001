"""Creates quantizers from their settings, finds them in a model, and replaces them by torch's own operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from compress_core import Stage
from compress_core.transforms import (
    ActivationTransform,
    activation_transforms,
    add_activation_transform,
    add_weight_transform,
    get_activation_transform,
    get_weight_transform,
)
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, FakeQuantize, SymmetricFakeQuantize
from compress_quantization.gates import KEY, FixedQuantize, QuantizedGate, quantizer_in, with_quantizer
from compress_quantization.kernels.formulas import representable
from compress_quantization.plan import PlannedQuantizer
from compress_quantization.quantizer_config import QuantizerSpec


def make_quantizer(spec: QuantizerSpec, shape: tuple[int, ...], *, is_gate: bool = False) -> FakeQuantize:
    """Returns a quantizer without a calibrated range.

    Args:
        spec: Its settings.
        shape: Shape of its scale.
        is_gate: Whether it is for the gate of an activation function, whose grid is fixed.
    """
    if is_gate:
        return FixedQuantize()
    cls = SymmetricFakeQuantize if spec.mode == "symmetric" else AsymmetricFakeQuantize
    module = cls(
        shape,
        bits=spec.bits,
        narrow_range=spec.narrow_range,
        half_range=spec.half_range,
        logarithm_scale=spec.logarithm_scale,
        smallest_scale=spec.smallest_scale,
    )
    if spec.mode == "symmetric":
        module.signed = bool(spec.signed)
    return module


def add_quantizer(model: nn.Module, planned: PlannedQuantizer, module: FakeQuantize, stage: Stage, key: str) -> None:
    """Adds the quantizer of a planned entry to a model, under the key of the algorithm.

    Raises:
        TransformError: A tensor of the entry cannot be transformed.
    """
    module.label = planned.name
    if planned.parameter:
        add_weight_transform(model, planned.parameter, module, stage=stage, key=key)
        return
    transform: ActivationTransform = module
    if planned.is_gate:
        transform, key = QuantizedGate(module), f"{key}_{KEY}"
        transform.label = planned.name
    for place in planned.places:
        add_activation_transform(model, place, transform, stage=stage, key=key)


def find_quantizer(model: nn.Module, planned: PlannedQuantizer, key: str) -> FakeQuantize | None:
    """Returns the quantizer of a planned entry in a model or in a copy of it.

    None if the user has replaced or removed every layer that had it.
    """
    if planned.parameter:
        return cast("FakeQuantize | None", get_weight_transform(model, planned.parameter, key))
    key = f"{key}_{KEY}" if planned.is_gate else key
    found = (get_activation_transform(model, place, key) for place in planned.places)
    return quantizer_in(next((module for module in found if module is not None), None))


class NativeFakeQuantize(ActivationTransform):
    """torch's own fake-quantize operator with a fixed grid, with which `strip` replaces activation quantizers.

    Args:
        quantizer: The quantizer with the grid to use.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    follows: ClassVar[Mapping[str, str]] = {"scale": "channels", "zero_point": "channels"}

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        grid = quantizer.grid()
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone())
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        # Counted from the end, as in broadcasting, so that tensors without a batch dimension are quantized as well.
        self.channel_dim = None if grid.channel_dim is None else grid.channel_dim - len(quantizer.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` on the grid, in its dtype."""
        if not x.is_floating_point():
            return x
        # The operators compute in float32 for any dtype of the model, and `model.half()` must not round the scale.
        value, scale = x.to(_computed_in(x.dtype)), self.scale.float()
        levels = (self.quant_min, self.quant_max)
        if self.channel_dim is None:
            result = torch.fake_quantize_per_tensor_affine(value, scale, self.zero_point, *levels)
        else:
            # Beyond 2^63 steps, this operator gives the other end of the grid.
            shape = (-1, *[1] * (-1 - self.channel_dim))
            low, high = ((level - self.zero_point).mul(scale).reshape(shape) for level in levels)
            value = torch.minimum(torch.maximum(value, low.to(value.dtype)), high.to(value.dtype))
            dim = self.channel_dim + x.ndim
            result = torch.fake_quantize_per_channel_affine(value, scale, self.zero_point, dim, *levels)
        return representable(result, x.dtype).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NativeFakeQuantize:
        """Moves the grid with the model but keeps its dtype, because rounding the scale would change every value."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def replace_by_native(model: nn.Module, planned: Iterable[PlannedQuantizer], key: str) -> None:
    """Replaces activation quantizers by torch's own operator, and removes those that are off."""
    natives: dict[FakeQuantize, NativeFakeQuantize] = {}
    for entry in planned:
        quantizer = find_quantizer(model, entry, key)
        if isinstance(quantizer, FakeQuantize):  # None: its layers were replaced by the user
            natives[quantizer] = NativeFakeQuantize(quantizer)
    for handle in activation_transforms(model):  # once for all: it walks through the whole model
        quantizer = quantizer_in(handle.transform)
        if quantizer is None or quantizer not in natives:
            continue
        if quantizer.enabled:
            handle.substitute(with_quantizer(handle.transform, natives[quantizer]))
        else:
            handle.remove()
