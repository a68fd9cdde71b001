"""Masks in a trace: numbers that stand for infinity, so that scores vanish or a maximum passes positions over.

A mask holds zeros and such numbers, and what it is added to or written into holds them too. Quantized, these would take
the whole range; and a range that is infinite is none.
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

# From here on a number in the code is taken for minus infinity: half precision has little more room. Factors of images
# and of time are large, so that it takes more for plus infinity.
_MINUS_INFINITY, _PLUS_INFINITY = -1e4, 1e8

# Functions that write such a number into a tensor.
_WRITES_NUMBERS = frozenset(
    ["masked_fill", "full", "full_like", "new_full", "fill", "where", "mul", "multiply", "__rmul__", "__setitem__"]
    + ["scalar_tensor", "pad"]
)

# Functions that read the shape of a tensor, and no values.
_READS_SHAPE = frozenset([f"{n}_like" for n in ("full", "zeros", "ones", "empty")]) | {
    f"new_{n}" for n in ("full", "zeros", "ones", "empty", "tensor")
}

_CASTS = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as"])

# Functions of masks that give masks.
_KEEPS_MASKS = frozenset(["masked_fill", "where", "triu", "tril", "minimum", "maximum", "min", "max", "neg"])


def stored_masks(model: nn.Module) -> frozenset[str]:
    """Returns the names of the buffers that hold zeros and numbers that stand for minus infinity."""
    return frozenset(
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point()
        and not buffer.is_meta
        and bool((buffer <= _MINUS_INFINITY).any() and (buffer == 0).any())
    )


def masks_of(forward: ForwardTrace, stored: Container[str] = ()) -> set[ValueId]:
    """Returns the values that are masks or have been masked.

    Masks are the values that are stored or made as such, and those that are read as nothing else.

    Args:
        forward: The trace of a forward.
        stored: Names of buffers that hold masks.
    """
    masks, masked = _Masking(forward, stored).run()
    consumers = forward.consumers()
    for value in reversed(forward.values):
        readers = [(forward.calls[index], path) for index, path in consumers[value.index]]
        is_mask = [is_mask_argument(call, path) or _gives_masks(call, masks) for call, path in readers]
        if readers and all(is_mask) and not value.outputs:
            masks.add(value.index)
    return masks | masked


def reads_mask(call: Call, masks: set[ValueId]) -> bool:
    """Tells whether a call makes a mask, or computes with one or with what is masked."""
    if _gives_masks(call, masks):
        return True
    computes = kind_of(call.function) in {*ARITHMETIC_KINDS, "min", "max", "compare"} or is_transparent(call)
    return computes and any(value in masks for _, value in call.inputs)


def _gives_masks(call: Call, masks: set[ValueId]) -> bool:
    # What a layer makes may be a mask, such as a learned bias; what the layer reads is an activation like any other.
    return bool(call.results) and masks.issuperset(call.results) and kind_of(call.function) not in LINEAR_KINDS


class _Masking:
    """Follows masks through a forward."""

    def __init__(self, forward: ForwardTrace, stored: Container[str]) -> None:
        values = forward.values
        self._forward = forward
        self._masks = {value.index for value in values if value.parameter and value.parameter in stored}
        # Scores and other activations with a mask in them.
        self._masked: set[ValueId] = set()
        # What layers have computed, and all that follows.
        self._products: set[ValueId] = set()
        # Booleans, and what they are as zeros and ones.
        self._flags = {value.index for value in values if value.dtype == torch.bool}

    def run(self) -> tuple[set[ValueId], set[ValueId]]:
        """Returns the masks, and the values that are masked."""
        for call in self._forward.calls:
            self._follow(call)
        return self._masks, self._masked

    def _follow(self, call: Call) -> None:
        name = base_name(call.function)
        given = set() if name in _READS_SHAPE else {value for _, value in call.inputs}
        made = {*call.results, *call.overwritten}
        if kind_of(call.function) in LINEAR_KINDS | {"scaled_dot_product_attention"}:
            self._products |= made
            return
        if given and given <= self._flags and (is_transparent(call) or name in _CASTS):
            self._flags |= made
        makes_mask = _writes_infinity(call) or (name == "log" and given and given <= self._flags)
        if makes_mask or (given & (self._masks | self._masked) and _keeps_masks(call)):
            found = self._masked if given & self._products else self._masks
            found |= {value for value in made if self._forward.values[value].dtype.is_floating_point}
        if given & self._products:
            self._products |= made


def _keeps_masks(call: Call) -> bool:
    name, kind = base_name(call.function), kind_of(call.function)
    if "max_pool" in name or (kind in ("min", "max") and len(call.inputs) < 2):  # where masked positions are left out
        return False
    return is_transparent(call) or kind in ARITHMETIC_KINDS or name in _KEEPS_MASKS


def _writes_infinity(call: Call) -> bool:
    numbers = [*call.arguments, *call.keywords.values()]  # not those in lists: these are sizes
    return base_name(call.function) in _WRITES_NUMBERS and any(
        isinstance(n, (int, float)) and (n <= _MINUS_INFINITY or n >= _PLUS_INFINITY) for n in numbers
    )
