"""Forwards that are attributes of a module and hide that of its class, where transforms are."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

# Where accelerate keeps the method that its wrapper for mixed precision calls.
_ORIGINAL = "_original_forward"


def drop_plain_forward(module: nn.Module) -> None:
    """Removes a `forward` attribute that is the method of the class itself, and so changes nothing.

    accelerate leaves one when it takes its wrapper off (`unwrap_model(model, keep_fp32_wrapper=False)`).
    """
    if _is_own(module, module.__dict__.get("forward")):
        del module.__dict__["forward"]


def drop_mixed_precision(model: nn.Module) -> None:
    """Takes accelerate's wrapper for mixed precision off a copy of a model, which then computes in its own types."""
    for module in model.modules():
        if _is_own(module, module.__dict__.get(_ORIGINAL)):
            del module.__dict__[_ORIGINAL]
            module.__dict__.pop("forward", None)
        drop_plain_forward(module)


def is_mixed_precision(module: nn.Module) -> bool:
    """Returns whether accelerate has wrapped the forward of a module for mixed precision."""
    return _ORIGINAL in module.__dict__


def _is_own(module: nn.Module, method: Any) -> bool:
    if not isinstance(method, MethodType) or method.__self__ is not module:
        return False
    return any(method.__func__ is vars(kind).get("forward") for kind in type(module).__mro__)
