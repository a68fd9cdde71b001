"""Remembers the results of operators on fake tensors, which depend on nothing but shapes and the like.

The blocks of a network are alike, and a forward in training mode mostly repeats the one in eval mode: more than half of
a trace's operators have been seen before. Making their results from what is remembered takes a fifth of the time in
which torch's fake mode computes them, decompositions and conversions of the parameters included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from compress_core.torch_internals import (
    DispatchDisabled,
    FakeTensor,
    FakeTensorMode,
    TorchFunctionDisabled,
    schema_of,
    storage_identity,
)
from compress_core.trace.graph import tensors_with_paths

# Shape, strides, dtype and device of a tensor.
_Layout: TypeAlias = "tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]"

# What an operator returned: one tensor or a tuple of them.
_Result: TypeAlias = "_Layout | tuple[_Layout, ...]"

# Arguments that are equal if they have the same class and value.
_VALUES = frozenset(
    {bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_REAL = (torch.Tensor, torch.nn.Parameter)


class _NotRememberedError(Exception):
    """An argument or a result is of a kind that is not remembered."""


@dataclass(frozen=True)
class _Known:
    """The result of an operator; None if it cannot be made from its layout alone."""

    result: _Result | None
    is_tuple: bool = False


class FakeResults:
    """Makes results of operators that ran before on tensors of the same layouts.

    It lasts as long as one call of `trace`, so that settings of torch on which layouts may depend do not change
    meanwhile. Only operators of torch that make new tensors from their arguments count. No tensor is held.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def run(self, mode: FakeTensorMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operator under a fake mode, or makes the result that it would return."""
        key = self._key(mode, function, args, kwargs)
        if key is None:
            return function(*args, **kwargs)
        known = self._known.get(key)
        if known is None or known.result is None:
            output = _computed(function, args, kwargs)
            if known is None:
                self._known[key] = _known(output, mode, (*args, *kwargs.values()))
            return output
        if known.is_tuple:
            return tuple(_made(mode, layout) for layout in known.result)
        return _made(mode, known.result)

    @staticmethod
    def _key(mode: FakeTensorMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns all that the result's layout depends on; None if that is not enough to make the result."""
        if not _makes_new_tensors(function):
            return None
        seen: set[type] = set()
        try:
            given = _described(args, mode, seen), _described(tuple(kwargs.items()), mode, seen)
        except _NotRememberedError:
            return None
        # Of real tensors alone, the mode may compute values and keep them.
        return (function, given, *_settings()) if FakeTensor in seen else None


def _settings() -> tuple[Any, ...]:
    return torch.get_default_dtype(), torch.is_inference_mode_enabled()


@functools.cache
def _makes_new_tensors(function: Any) -> bool:
    """Returns whether an operator of torch makes new tensors, of shapes that follow from those of its arguments."""
    schema = schema_of(function)
    if schema is None or not schema.name.startswith("aten::") or "lift" in schema.name:
        return False
    depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
    if depends.intersection(function.tags) or not schema.returns:
        return False
    if any(entry.alias_info is not None for entry in (*schema.arguments, *schema.returns)):
        return False
    return all(str(entry.type) == "Tensor" for entry in schema.returns)


def _described(item: Any, mode: FakeTensorMode, seen: set[type]) -> Any:
    """Returns what the layout of a result can depend on, and adds the classes of tensors to a set."""
    kind = type(item)
    if kind is FakeTensor:
        if item.fake_mode is not mode or item.constant is not None:
            raise _NotRememberedError  # with a constant the mode computes values
    elif kind in (tuple, list):
        return kind, tuple([_described(entry, mode, seen) for entry in item])
    elif kind in _VALUES:
        return kind, item
    elif kind not in _REAL:
        raise _NotRememberedError
    seen.add(kind)
    return _layout(item)


def _layout(tensor: torch.Tensor) -> _Layout:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise _NotRememberedError
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _known(output: Any, mode: FakeTensorMode, arguments: tuple[Any, ...]) -> _Known:
    results = output if isinstance(output, tuple) else (output,)
    try:
        shared = {storage_identity(tensor) for _, tensor in tensors_with_paths(arguments)}
        for result in results:
            if type(result) is not FakeTensor or result.fake_mode is not mode or result.constant is not None:
                return _Known(None)
            if result.storage_offset() or storage_identity(result) in shared:
                return _Known(None)  # some operators return views without saying so
            shared.add(storage_identity(result))
        layouts = tuple(_layout(result) for result in results)
    except (_NotRememberedError, RuntimeError, NotImplementedError):
        return _Known(None)
    return _Known(layouts, is_tuple=True) if isinstance(output, tuple) else _Known(layouts[0])


def _computed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function is torch.ops.aten.native_batch_norm.default:
        result = _fake_batch_norm(*args)
        if result is not None:
            return result
    return function(*args, **kwargs)


def _fake_batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: float
) -> tuple[torch.Tensor, ...] | None:
    """Returns the fake result of batch norm, ten times faster than torch, which decomposes it into twenty operators.

    Returns None for low precision, where the dtype of the statistics depends on the device.
    """
    if x.dtype not in {torch.float32, torch.float64}:
        return None
    saved = x.shape[1] if training else 0
    return torch.empty_like(x), x.new_empty(saved), x.new_empty(saved)


def _made(mode: FakeTensorMode, layout: Any) -> torch.Tensor:
    shape, strides, dtype, device = layout
    with TorchFunctionDisabled(), DispatchDisabled():
        empty = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return FakeTensor(mode, empty, device)
