"""Masks of attention in a trace: what is added to scores so that some of them vanish.

A mask holds zeros and numbers that stand for minus infinity. Quantized with the scores, these would take the whole
range; and a range that is infinite is none.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from compress_core.trace import Call, ForwardTrace
from compress_core.trace.graph import ValueId
from compress_quantization.operators import (
    ARITHMETIC_KINDS,
    LINEAR_KINDS,
    base_name,
    is_mask_argument,
    is_transparent,
    kind_of,
)

# From here on a number in the code is taken for minus infinity: half precision has little more room.
_HUGE = -1e4

# Functions that write such a number into a tensor.
_WRITES_NUMBERS = frozenset(["masked_fill", "full", "full_like", "new_full", "fill", "where", "mul", "multiply"]) | {
    "__rmul__",
    "__setitem__",
    "scalar_tensor",
}

_CASTS = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as"])

# Functions of masks that give masks.
_KEEPS_MASKS = frozenset(["masked_fill", "where", "triu", "tril", "minimum", "maximum", "min", "max"])


def stored_masks(model: nn.Module) -> frozenset[str]:
    """Returns the names of the buffers that hold such numbers."""
    return frozenset(
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point() and not buffer.is_meta and buffer.numel() and bool((buffer <= _HUGE).any())
    )


def masks_of(forward: ForwardTrace, stored: Container[str] = ()) -> set[ValueId]:
    """Returns the values that are masks.

    These are the ones that are stored or made as masks are, and the ones that are read as nothing else.

    Args:
        forward: The trace of a forward.
        stored: Names of buffers that hold masks.
    """
    found = _made_as_masks(forward, stored)
    consumers = forward.consumers()
    for value in reversed(forward.values):
        readers = [(forward.calls[index], path) for index, path in consumers[value.index]]
        is_mask = [is_mask_argument(call, path) or _gives_masks(call, found) for call, path in readers]
        if readers and all(is_mask) and not value.outputs:
            found.add(value.index)
    return found


def reads_mask(call: Call, masks: set[ValueId]) -> bool:
    """Tells whether a call adds a mask to something, compares it, or makes one."""
    if _gives_masks(call, masks):
        return True
    reads_values = kind_of(call.function) in {*ARITHMETIC_KINDS, "min", "max", "compare"}
    return reads_values and any(value in masks for _, value in call.inputs)


def _gives_masks(call: Call, masks: set[ValueId]) -> bool:
    # What a layer makes may be a mask, such as a learned bias; what the layer reads is an activation like any other.
    return bool(call.results) and masks.issuperset(call.results) and kind_of(call.function) not in LINEAR_KINDS


def _made_as_masks(forward: ForwardTrace, stored: Container[str]) -> set[ValueId]:
    found = {value.index for value in forward.values if value.parameter and value.parameter in stored}
    flags = {
        value.index for value in forward.values if value.dtype == torch.bool
    }  # and what they are as zeros and ones
    products: set[ValueId] = set()  # scores, among others: a mask that is added to them makes no mask of them
    for call in forward.calls:
        given = {value for _, value in call.inputs}
        made = {*call.results, *call.overwritten}
        if kind_of(call.function) in LINEAR_KINDS | {"scaled_dot_product_attention"} or given & products:
            products |= made
        elif _makes_mask(call, bool(given & found)) or (base_name(call.function) == "log" and given <= flags):
            found |= {value for value in made if forward.values[value].dtype.is_floating_point}
        elif given and given <= flags and (is_transparent(call) or base_name(call.function) in _CASTS):
            flags |= made
    return found


def _makes_mask(call: Call, takes_mask: bool) -> bool:
    name = base_name(call.function)
    if takes_mask:
        kind = kind_of(call.function)
        return is_transparent(call) or kind in ARITHMETIC_KINDS or name in _KEEPS_MASKS
    numbers = [*call.arguments, *call.keywords.values()]  # not those in lists: these are sizes
    return name in _WRITES_NUMBERS and any(isinstance(n, (int, float)) and n <= _HUGE for n in numbers)
