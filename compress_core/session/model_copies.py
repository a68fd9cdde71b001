"""Copies of a compressed model with weights of their own, such as an average: they take decisions from the model."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress_core.errors import UsageError
from compress_core.transforms.chain import TransformChain

_SIMPLE = (bool, int, float, str, tuple, type(None))


def copy_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """Returns the copy of a compressed model that a user gives, without `AveragedModel` around it.

    Raises:
        UsageError: It is not a copy: its tensors have other names or shapes.
    """
    found = other.module if isinstance(other, AveragedModel) else other
    mine = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    theirs = {name: tuple(tensor.shape) for name, tensor in found.state_dict().items() if torch.is_tensor(tensor)}
    different = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise UsageError(
            f"the {type(found).__name__} is no copy of the compressed model: '{name}' has the shape "
            f"{theirs.get(name)}, and {mine.get(name)} in the compressed model. Pass a deepcopy of the compressed "
            "model with other weights, made after the last change of its structure"
        )
    return found


def take_decisions(target: nn.Module, model: nn.Module) -> None:
    """Gives the transforms of a copy what is not learned: masks and other buffers, and switches, of the model's."""
    chains = {name: chain for name, chain in model.named_modules() if isinstance(chain, TransformChain)}
    copies = dict(target.named_modules())
    with torch.no_grad():
        for name, chain in chains.items():
            for (own_name, module), mine in zip(chain.named_modules(), copies[name].modules(), strict=True):
                if not own_name:
                    continue
                for key, buffer in module.named_buffers(recurse=False):
                    mine.get_buffer(key).copy_(buffer)
                switches = {key: value for key, value in vars(module).items() if isinstance(value, _SIMPLE)}
                vars(mine).update({key: value for key, value in switches.items() if key != "training"})
