"""Records what the transforms of activations compute in torch, and compares models without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.export.inputs import Inputs
from compress_core.export.references import output_tensors
from compress_core.transforms import ActivationTransform, activation_transforms
from compress_core.transforms.python_state import copied

_TINY = 1e-300


@dataclass(frozen=True)
class Call:
    """A call of an activation transform in torch.

    Attributes:
        given: Its argument.
        returned: Its result.
    """

    given: torch.Tensor
    returned: torch.Tensor


@dataclass(frozen=True)
class Recorded:
    """A forward in torch.

    Attributes:
        names: Every name of every transform of activations -> its first name (it may be at several places).
        calls: First name -> its calls, in their order.
        outputs: The output tensors.
    """

    names: Mapping[str, str]
    calls: Mapping[str, list[Call]]
    outputs: tuple[torch.Tensor, ...]


def recorded(model: nn.Module, inputs: Inputs) -> Recorded:
    """Runs a model and records what each activation transform is given and returns.

    Args:
        model: A copy of the compressed model, in eval mode on the CPU.
        inputs: The arguments of its forward.
    """
    # Those inside of others, too, which may be all that a graph shows of a transform.
    transforms = {
        id(module)
        for handle in activation_transforms(model)
        for module in handle.transform.modules()
        if module is handle.transform or isinstance(module, ActivationTransform)
    }
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in transforms:
            names[name] = first.setdefault(id(module), name)
    found: dict[str, list[Call]] = defaultdict(list)

    def hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda module, args, output: found[name].append(Call(args[0].clone(), output.clone()))

    for name, module in model.named_modules():
        if id(module) in transforms:  # which then neither overwrites its input nor computes the function before it
            module.register_forward_hook(hook(name))
    given = inputs.copied()
    with torch.no_grad():
        result = model(*given.args, **given.kwargs)
    return Recorded(names, found, output_tensors(result))


def unrounded_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Returns how the outputs of two models differ without transforms of activations, relative to their magnitude.

    In float64, and without quantizers, nothing amplifies roundings: models that compute the same agree.

    Args:
        model: A copy of the compressed model, in eval mode on the CPU; it is changed.
        other: Another one, with as many outputs; it is changed.
        inputs: The arguments of their forward.
    """
    for one in (model, other):
        for handle in activation_transforms(one):
            handle.remove()
    try:
        found = [recorded(copied(one).double(), inputs.to_double()).outputs for one in (model, other)]
    except RuntimeError:  # the forward names a dtype
        found = [recorded(one, inputs).outputs for one in (model, other)]
    pairs = [(a.double(), b.double()) for a, b in zip(*found, strict=True) if a.numel()]
    return max((float((a - b).abs().mean() / a.abs().mean().clamp_min(_TINY)) for a, b in pairs), default=0.0)
