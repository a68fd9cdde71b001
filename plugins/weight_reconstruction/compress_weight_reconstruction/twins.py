"""Copies of a model for forwards that run side by side: own modules and attributes, but the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.python_state import copied


def twin_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that shares its parameters, running statistics and transforms' tensors.

    What is written to these is seen by every twin. Everything else (attributes, other buffers) is the twin's own, so
    that a model that keeps something in its forward does not mix up the batches.
    """
    return copied(model, _shared(model))


def _shared(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, (TransformContainer, AnyBatchNorm)):
            yield from module.buffers()
