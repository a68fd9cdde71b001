"""Activation functions that a transform directly behind them can take over, to compute both in one pass."""

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
"""What the names of activation functions stand for: those for which one pass was measured to be faster than two. All
take `inplace`."""

_CALLS = {
    "torch.relu": "relu",
    "torch.relu_": "relu",
    "torch.Tensor.relu": "relu",
    "torch.Tensor.relu_": "relu",
    "torch.nn.functional.relu": "relu",
    "torch.nn.functional.relu_": "relu",
    "torch.nn.functional.relu6": "relu6",
    "torch.nn.functional.hardswish": "hardswish",
}

# Modules that do nothing else, and the function that they call.
_MODULES: dict[type[nn.Module], tuple[str, str]] = {
    nn.ReLU: ("relu", "torch.nn.functional.relu"),
    nn.ReLU6: ("relu6", "torch.nn.functional.hardtanh"),
    nn.Hardswish: ("hardswish", "torch.nn.functional.hardswish"),
}


def activation_called(function: str) -> str | None:
    """Returns which activation function a torch function is, by the name of `torch.overrides.resolve_name`."""
    return _CALLS.get(function)


def activation_module(cls: type[nn.Module]) -> tuple[str, str] | None:
    """Returns which activation function a module of exactly this class is, and the torch function that it calls."""
    return _MODULES.get(cls)
