"""Multi-head attention with its inside in view.

`nn.MultiheadAttention` leaves all its work to one function, which first asks whether a function mode is active and, if
so, is a single call to that mode: of the projections and products inside the mode sees nothing. Here is the same
function, torch's own code, with another answer to that question.

Its globals are those of this module, because torch.compile looks globals up in the module that a function names.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional

_WHOLE: Any = functional.multi_head_attention_forward
# Whoever has put something else in its place gets it called, as a whole.
_IS_TORCHS_OWN = (
    isinstance(_WHOLE, FunctionType) and _WHOLE.__globals__ is vars(functional) and _WHOLE.__closure__ is None
)


def inside_of(function: Any) -> Callable[..., Any] | None:
    """Returns what computes the same as a function of torch, and whose own calls a function mode gets to see.

    Args:
        function: A function as a mode is given it.

    Returns:
        The function to call while the mode is active; None for functions that have no inside of interest.
    """
    if function is not _WHOLE or not _IS_TORCHS_OWN:
        return None
    if not torch.compiler.is_dynamo_compiling():
        _take_globals()  # somebody may have replaced one, such as scaled_dot_product_attention, by a faster one
    return _inside


# What the code of torch finds here under the names of its own globals.


def has_torch_function(_: Any) -> bool:
    """Answers that no mode has to be asked."""
    return False


def _check_key_padding_mask(mask: torch.Tensor, length: int, batch: int) -> None:
    # Torch's own one has a message with a tensor in it, which dynamo cannot trace.
    if tuple(mask.shape) != (batch, length):
        raise AssertionError(f"the shape of key_padding_mask is {tuple(mask.shape)}, expected is {(batch, length)}")


def _in_projection_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Torch makes one, two or three products, depending on which of the tensors are the same object. Places count calls:
    # a later forward, with one query for example, must not put quantizers of one tensor on another.
    linear = functional.linear
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    # Not in a loop: its turns would be one place.
    projected_query = linear(query, weights[0], biases[0])
    projected_key = linear(key, weights[1], biases[1])
    projected_value = linear(value, weights[2], biases[2])
    return projected_query, projected_key, projected_value


_OWN = frozenset(globals())


def _take_globals() -> None:
    known = vars(functional)
    globals().update({name: known[name] for name in _WHOLE.__code__.co_names if name in known and name not in _OWN})


_inside: Callable[..., Any] | None = None
if _IS_TORCHS_OWN:
    _take_globals()
    _inside = FunctionType(_WHOLE.__code__, globals(), _WHOLE.__name__, _WHOLE.__defaults__)
    _inside.__kwdefaults__ = _WHOLE.__kwdefaults__
