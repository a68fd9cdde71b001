"""Everything about a model that must be the same after a failure, in a form that can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_core.torch_internals import HOOK_ATTRIBUTES, TENSOR_HOOK_ATTRIBUTES


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Returns classes, flags, hooks and the bits of all tensors of a model, and of the random generators.

    Args:
        model: The model; it is not changed.
    """
    modules: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = {
            "identity": id(module),
            "class": type(module),
            "training": module.training,
            "attributes": sorted(module.__dict__),
            "children": list(module._modules),
            "parameters": {key: _tensor(value) for key, value in module._parameters.items()},
            "buffers": {key: _tensor(value) for key, value in module._buffers.items()},
            "hooks": hooks_of(module),
            "simple": {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str, tuple))},
        }
    return {"modules": modules, **generators()}


def generators() -> dict[str, Any]:
    """Returns the states of the global random generators."""
    return {
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "python rng": random.getstate(),
        "numpy rng": [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    }


def hooks_of(
    owner: nn.Module | torch.Tensor, *, without: Callable[[object], bool] = lambda hook: False
) -> dict[str, list[int]]:
    """Returns the ids of the hooks of a module or tensor, by kind; those kinds of which there is none are left out.

    Args:
        owner: The module or tensor.
        without: Tells which hooks are left out, too, such as those of the core.
    """
    kinds = HOOK_ATTRIBUTES if isinstance(owner, nn.Module) else TENSOR_HOOK_ATTRIBUTES
    found = {key: [id(h) for h in (getattr(owner, key, None) or {}).values() if not without(h)] for key in kinds}
    return {key: hooks for key, hooks in found.items() if hooks}


def _tensor(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    gradient = None if tensor.grad is None else tensor.grad.detach().cpu().numpy().tobytes()
    return (
        id(tensor),
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.requires_grad,
        bits,
        gradient,
        hooks_of(tensor),
    )
