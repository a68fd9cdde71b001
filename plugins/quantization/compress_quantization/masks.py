"""Finds masks in a trace: tensors with huge numbers that make scores vanish or exclude positions from a maximum.

A mask holds zeros and such numbers, and so does every tensor that it is added to or written into. If these were
quantized, the huge numbers would take up the whole range, and an infinite range cannot be quantized at all.
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
    reads_values,
)

# Up to the first limit, a number in the code counts as minus infinity; half precision cannot go much lower. The limit
# for plus infinity is larger, because factors of images and of time are large numbers too.
_MINUS_INFINITY, _PLUS_INFINITY = -1e4, 1e8

# Functions that write a number into a tensor.
_WRITES_NUMBERS = frozenset(
    ["masked_fill", "full", "full_like", "new_full", "fill", "where", "mul", "multiply", "__rmul__", "__setitem__"]
    + ["scalar_tensor", "pad"]
)

_CASTS = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as"])

# Functions whose result is a mask if their arguments are masks.
_KEEPS_MASKS = frozenset(["masked_fill", "where", "triu", "tril", "minimum", "maximum", "min", "max", "neg"])


def stored_masks(model: nn.Module) -> frozenset[str]:
    """Returns the names of the buffers that hold only zeros and numbers that count as minus infinity."""
    return frozenset(
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point()
        and not buffer.is_meta
        and bool((buffer <= _MINUS_INFINITY).any() and (buffer == 0).any())
    )


def masks_of(forward: ForwardTrace, stored: Container[str] = ()) -> set[ValueId]:
    """Returns the values that are masks or have been masked.

    Masks are values that are stored or created as masks, and values that are used only as masks.

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
    """Returns whether a call creates a mask, or computes with a mask or a masked value."""
    if _gives_masks(call, masks):
        return True
    computes = kind_of(call.function) in {*ARITHMETIC_KINDS, "min", "max", "compare"} or is_transparent(call)
    return computes and any(value in masks for _, value in call.inputs)


def _gives_masks(call: Call, masks: set[ValueId]) -> bool:
    # The result of a layer may be a mask, such as a learned bias, but its input is an ordinary activation.
    return bool(call.results) and masks.issuperset(call.results) and kind_of(call.function) not in LINEAR_KINDS


class _Masking:
    """Follows masks through a forward."""

    def __init__(self, forward: ForwardTrace, stored: Container[str]) -> None:
        values = forward.values
        self._forward = forward
        self._masks = {value.index for value in values if value.parameter and value.parameter in stored}
        # Scores and other activations to which a mask was applied.
        self._masked: set[ValueId] = set()
        # Results of layers, and all values computed from them.
        self._products: set[ValueId] = set()
        # Booleans, and their conversions to zeros and ones.
        self._flags = {value.index for value in values if value.dtype == torch.bool}

    def run(self) -> tuple[set[ValueId], set[ValueId]]:
        """Returns the masks, and the values that are masked."""
        for call in self._forward.calls:
            self._follow(call)
        return self._masks, self._masked

    def _follow(self, call: Call) -> None:
        name = base_name(call.function)
        given = {value for path, value in call.inputs if reads_values(call, path)}
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
    if "max_pool" in name or (kind in ("min", "max") and len(call.inputs) < 2):  # these exclude masked positions
        return False
    return is_transparent(call) or kind in ARITHMETIC_KINDS or name in _KEEPS_MASKS


def _writes_infinity(call: Call) -> bool:
    numbers = [*call.arguments, *call.keywords.values()]  # not numbers in lists, which are sizes
    return base_name(call.function) in _WRITES_NUMBERS and any(
        isinstance(n, (int, float)) and (n <= _MINUS_INFINITY or n >= _PLUS_INFINITY) for n in numbers
    )
