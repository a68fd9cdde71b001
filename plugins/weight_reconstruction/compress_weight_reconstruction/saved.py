"""The tensors of a model that reconstruction writes to, to restore them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms import TransformedWeight


class SavedTensors:
    """The values of weights, their transforms' parameters, biases and running statistics.

    Args:
        model: The model.
        weights: The weights that may be written to.
    """

    def __init__(self, model: nn.Module, weights: Iterable[TransformedWeight]) -> None:
        found = {id(tensor): tensor for tensor in _written(model, weights)}
        self._values = [(tensor, tensor.detach().clone()) for tensor in found.values()]

    def restore(self) -> None:
        """Restores all values that have changed."""
        with torch.no_grad():
            for tensor, values in self._values:
                if not torch.equal(tensor, values):
                    tensor.copy_(values)


def _written(model: nn.Module, weights: Iterable[TransformedWeight]) -> Iterator[torch.Tensor]:
    for weight in weights:
        yield weight.parameter
        yield from weight.chain.parameters()
    yield from (parameter for parameter in model.parameters() if parameter.ndim == 1)
    for module in model.modules():
        if isinstance(module, AnyBatchNorm):
            yield from module.buffers()
