"""Prepares a copy of a quantized model for export: modules that emit ONNX operators in the place of quantizers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress_core.transforms.activation_forward import ActivationTransforms
from compress_core.transforms.chain import TransformChain
from compress_core.transforms.weight import chain_of, detach_chain, parameter_places
from compress_quantization.export.modules import DequantizedWeight, QuantizeDequantize
from compress_quantization.fake_quantize import FakeQuantize


def prepare(model: nn.Module) -> None:
    """Replaces every quantizer of a model that is on, and removes those that are off.

    Weights of `nn.RNN`, `nn.LSTM` and `nn.GRU` keep theirs, and are stored as the floating-point values that these
    compute: ONNX's recurrent operators take no integers.

    The model is good for export only afterwards: its weights are integers, and activations are computed nowhere but
    in the exported graph.

    Args:
        model: A copy of the model, in eval mode on the CPU.
    """
    _replace_activations(model)
    _replace_weights(model)


def _replace_activations(model: nn.Module) -> None:
    made: dict[FakeQuantize, QuantizeDequantize] = {}
    for container in [module for module in model.modules() if isinstance(module, ActivationTransforms)]:
        for chain in container.children():
            assert isinstance(chain, TransformChain)
            for key, quantizer in list(chain.named_children()):
                if not isinstance(quantizer, FakeQuantize):
                    continue
                if not quantizer.enabled:
                    chain.discard(key)
                    continue
                if quantizer not in made:
                    made[quantizer] = QuantizeDequantize(quantizer.grid(), quantizer.shape).eval()
                chain._modules[key] = made[quantizer]


@torch.no_grad()
def _replace_weights(model: nn.Module) -> None:
    replacements: list[tuple[nn.Module, str, DequantizedWeight]] = []
    for places in parameter_places(model).values():
        transformed = [(owner, name) for _, owner, name in places if chain_of(owner, name) is not None]
        if not transformed:
            continue
        owner, name = transformed[0]
        chain, weight = chain_of(owner, name), owner._parameters[name]
        assert chain is not None and weight is not None
        *before, last = chain.children()
        if not isinstance(last, FakeQuantize) or not last.enabled:
            continue  # nothing is on a grid in the end: the core bakes what is there
        if any(isinstance(place, nn.RNNBase) for place, _ in transformed):
            continue  # baked as well
        values = weight.detach()
        for transform in before:
            values = transform(values)
        dequantized = DequantizedWeight(values, last.grid()).eval()
        replacements += [(owner, name, dequantized) for owner, name in transformed]
    # All chains go before the first parametrization comes: both change the class of a layer, which may have several.
    for owner, name, _ in replacements:
        detach_chain(owner, name)
    for owner, name, dequantized in replacements:
        # unsafe: the checks would run the operator, which has values in the exported graph only.
        parametrize.register_parametrization(owner, name, dequantized, unsafe=True)
