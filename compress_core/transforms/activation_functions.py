"""Activation functions that a transform can compute: along with itself, in one pass, or in place of the function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATION_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
"""Activation functions by name. It has those for which one pass was measured to be faster than two. All take
`inplace`."""

COMPUTABLE_ACTIVATIONS = (*ACTIVATION_FUNCTIONS, "silu")
"""Names of the activation functions in whose place transforms can stand (`ActivationTransform.computes_activation`)."""

_CALLS = {
    "torch.relu": "relu",
    "torch.relu_": "relu",
    "torch.Tensor.relu": "relu",
    "torch.Tensor.relu_": "relu",
    "torch.nn.functional.relu": "relu",
    "torch.nn.functional.relu_": "relu",
    "torch.nn.functional.relu6": "relu6",
    "torch.nn.functional.hardswish": "hardswish",
    "torch.nn.functional.silu": "silu",
}

# Modules that only compute an activation function, and the function that they call.
_MODULES: dict[type[nn.Module], tuple[str, str]] = {
    nn.ReLU: ("relu", "torch.nn.functional.relu"),
    nn.ReLU6: ("relu6", "torch.nn.functional.hardtanh"),
    nn.Hardswish: ("hardswish", "torch.nn.functional.hardswish"),
}


def activation_called(function: str) -> str | None:
    """Returns the name of the activation function that a torch function (named as in `torch.overrides`) computes."""
    return _CALLS.get(function)


def activation_module(cls: type[nn.Module]) -> tuple[str, str] | None:
    """Returns the activation function that modules of exactly this class compute, and the torch function they call."""
    return _MODULES.get(cls)
