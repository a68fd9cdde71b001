"""Copies of a model for forwards that run side by side: own modules and attributes, but the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.chain import TransformContainer


def twin_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that shares its parameters, running statistics and transforms' tensors.

    What is written to these is seen by every twin. Everything else (attributes, other buffers) is the twin's own, so
    that a model that keeps something in its forward does not mix up the batches.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _shared(model)})


def _shared(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, (TransformContainer, AnyBatchNorm)):
            yield from module.buffers()
