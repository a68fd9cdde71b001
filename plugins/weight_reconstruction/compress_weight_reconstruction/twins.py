"""Copies of a model for forwards that run side by side: own modules and attributes, but the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import nn

from compress_core.torch_internals import AnyBatchNorm, version_of
from compress_core.transforms import activation_transforms, transformed_weights
from compress_core.transforms.python_state import copied


def twin_of(model: nn.Module, private: Set[str] | None = None) -> nn.Module:
    """Returns a copy of a model that shares its parameters, running statistics and transforms' tensors.

    What is written to these is seen by every twin. Attributes are the twin's own, so that a model that keeps something
    in its forward does not mix up the batches, and so are buffers that a forward writes to.

    Args:
        model: The model.
        private: Names of the buffers that are the twin's own; by default all but those above.
    """
    return copied(model, _shared(model, private))


class Writes:
    """Tells which buffers of a twin a forward has written to.

    Args:
        twin: The twin, before its forward.
        model: The model that it is a copy of.
    """

    def __init__(self, twin: nn.Module, model: nn.Module) -> None:
        originals = dict(model.named_buffers())
        self._buffers = [
            (name, buffer, _version(buffer), originals[name])
            for name, buffer in twin.named_buffers()
            if buffer is not originals[name]
        ]

    def found(self) -> frozenset[str]:
        """Returns the names of the buffers with another version, or with other values, which `.data` may have set."""
        return frozenset(
            name
            for name, buffer, version, original in self._buffers
            if buffer.layout != torch.strided or _version(buffer) != version or not torch.equal(buffer, original)
        )


def _version(buffer: torch.Tensor) -> int:
    return 0 if buffer.is_inference() else version_of(buffer)


def _shared(model: nn.Module, private: Set[str] | None) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for weight in transformed_weights(model):
        yield from weight.chain.buffers()
    for activation in activation_transforms(model):
        yield from activation.transform.buffers()
    for module in model.modules():
        if isinstance(module, AnyBatchNorm):
            yield from module.buffers()
    if private is not None:
        yield from (buffer for name, buffer in model.named_buffers() if name not in private)
