"""Prepares a copy of a quantized model for export: replaces quantizers by modules that emit a format's operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress_core.transforms import TransformedWeight, activation_transforms, transformed_weights
from compress_quantization.export.decomposed import DecomposedActivation, DecomposedWeight
from compress_quantization.export.modules import OLDEST_OPSET, OPSET, DequantizedWeight, QuantizeDequantize
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.gates import quantizer_in, with_quantizer


def prepare(model: nn.Module, opset: int = OPSET, *, is_centered: bool = False) -> None:
    """Replaces every quantizer of a model that is on by ONNX's operators, and removes those that are off.

    Weights of `nn.RNN`, `nn.LSTM` and `nn.GRU` keep their quantizers and are stored as quantized floating-point values,
    because ONNX's recurrent operators take no integers.

    Afterwards the model can only be exported, because the new operators compute values only in the exported graph.

    Args:
        model: A copy of the model, in eval mode on the CPU.
        opset: Version of the operator set of the file.
        is_centered: Whether the runtime demands that integers of 0 represent zero.
    """
    version = max(opset, OLDEST_OPSET)

    def make(quantizer: FakeQuantize) -> QuantizeDequantize:
        return QuantizeDequantize(quantizer.grid(), quantizer.shape, version, is_centered=is_centered)

    _replace_activations(model, make)
    _replace_weights(model, lambda values, quantizer: DequantizedWeight(values, quantizer.grid(), version))


def prepare_decomposed(model: nn.Module) -> None:
    """Replaces every quantizer of a model that is on by torch's decomposed operators, and removes those that are off.

    Recurrent weights are as for `prepare`. The model computes the same in torch as before.

    Args:
        model: A copy of the model, in eval mode on the CPU.

    Raises:
        ExportError: XNNPACK does not have the grid of a quantizer.
    """
    _replace_activations(model, DecomposedActivation)
    _replace_weights(model, DecomposedWeight)


def _replace_activations(model: nn.Module, make: Callable[[FakeQuantize], nn.Module]) -> None:
    made: dict[nn.Module, nn.Module] = {}
    for handle in activation_transforms(model):
        quantizer = quantizer_in(handle.transform)
        if quantizer is None:
            continue
        if not quantizer.enabled:
            handle.remove()
            continue
        if quantizer not in made:
            made[quantizer] = with_quantizer(handle.transform, make(quantizer))
        handle.substitute(made[quantizer])


@torch.no_grad()
def _replace_weights(model: nn.Module, make: Callable[[torch.Tensor, FakeQuantize], nn.Module]) -> None:
    replacements: list[tuple[TransformedWeight, nn.Module]] = []
    for weight in transformed_weights(model):
        *before, last = weight.chain.children()
        if not isinstance(last, FakeQuantize) or not last.enabled:
            continue  # the last transform is not a quantizer, so the core bakes the weight
        if any(isinstance(owner, nn.RNNBase) for owner, _ in weight.places):
            continue  # baked as well
        values = weight.parameter.detach()
        for transform in before:
            values = transform(values)
        replacements.append((weight, make(values, last).eval()))
    # All transforms are removed before parametrizations are added, because both change the class of a layer.
    for weight, _ in replacements:
        weight.remove_transforms()
    for weight, dequantized in replacements:
        for owner, name in weight.places:
            # unsafe: torch's checks would run the operator, which computes values only in the exported graph.
            parametrize.register_parametrization(owner, name, dequantized, unsafe=True)
