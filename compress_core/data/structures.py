"""Batches as collate functions make them: tensors within lists, mappings, named tuples, dataclasses and objects.

All that reads batches (moving, counting, describing, choosing arguments) goes through these functions, so that what one
finds the others find.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from compress_core.torch_internals import tree_leaves, tree_map

# In place of a device: objects that move themselves are copied, and stay where they are.
_COPY = "as it is"

TensorFn = Callable[[torch.Tensor], torch.Tensor]

# Objects of these kinds hold no batch, whatever their attributes are.
_NO_BATCHES = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, torch.Generator)


def is_tensor_like(value: Any) -> bool:
    """Returns whether a value is one input to a model: a tensor or a `PackedSequence`, which is a tuple only inside."""
    return isinstance(value, (torch.Tensor, PackedSequence))


def named_entries(value: Any) -> dict[Any, Any] | None:
    """Returns the entries of a value by name; None if it has no names.

    These are the items of a mapping, the fields of a named tuple, a dataclass or a class of attrs, what `to_dict`
    returns (graphs of PyTorch Geometric), or the public attributes of any other object that holds tensors.
    """
    if is_tensor_like(value) or isinstance(value, _NO_BATCHES):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        return None if names is None else dict(zip(names, value, strict=True))
    names = _field_names(value)
    if names is not None:
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, (list, set, frozenset)) or _is_registered(value):
        return None
    return _attributes(value)


def inputs_of(value: Any) -> Iterator[torch.Tensor | PackedSequence]:
    """Yields the tensors and packed sequences of a batch, in order."""
    if is_tensor_like(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from inputs_of(item)
    elif (entries := named_entries(value)) is not None:
        for item in entries.values():
            yield from inputs_of(item)
    elif _is_registered(value):
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a batch, in order; those inside of packed sequences, too."""
    for found in inputs_of(value):
        if isinstance(found, PackedSequence):
            yield from (part for part in found if isinstance(part, torch.Tensor))
        else:
            yield found


def has_tensors(value: Any) -> bool:
    """Returns whether a value holds a tensor."""
    return next(inputs_of(value), None) is not None


def moved(batch: Any, device: torch.device | str, *, copied: bool = False) -> Any:
    """Returns a batch whose tensors are on a device; objects keep their types, and the given batch is not changed.

    Args:
        batch: The batch.
        device: The device.
        copied: Whether tensors that are there already are copied.
    """
    return _mapped(batch, lambda tensor: tensor.to(device, copy=copied), device)


def copied(batch: Any) -> Any:
    """Returns a batch with copies of its tensors, because a loader may fill the same ones again."""
    return _mapped(batch, torch.clone, _COPY)


def map_tensors(function: TensorFn, batch: Any) -> Any:
    """Returns a batch with a function applied to each tensor; objects that move themselves (`to`) stay as they are."""
    return _mapped(batch, function, None)


def _mapped(value: Any, function: TensorFn, device: torch.device | str | None) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return _mapped_packed(value, function)
    if isinstance(value, (tuple, list)):
        return _with_items(value, [_mapped(item, function, device) for item in value])
    is_moved = device is not None and _moves_itself(value)
    if isinstance(value, Mapping) and not (is_moved and hasattr(value, "clone")):
        return _with_entries(value, {key: _mapped(item, function, device) for key, item in value.items()})
    return _mapped_object(value, function, device)


def _mapped_object(value: Any, function: TensorFn, device: torch.device | str | None) -> Any:
    names = _field_names(value)
    if names is None and _is_registered(value):
        return tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
    if not has_tensors(value):
        return value
    if names is None and _moves_itself(value):
        return value if device is None else _moved_by_itself(value, device)
    entries = named_entries(value) or {}
    return _with_attributes(value, {name: _mapped(item, function, device) for name, item in entries.items()})


def _mapped_packed(value: PackedSequence, function: TensorFn) -> PackedSequence:
    """Returns a packed sequence; its batch sizes stay on the CPU, where torch wants them."""
    data, sizes = function(value.data), function(value.batch_sizes)
    order = [None if index is None else function(index) for index in (value.sorted_indices, value.unsorted_indices)]
    return PackedSequence(data, sizes if sizes.device.type == "cpu" else value.batch_sizes, *order)


def _with_items(value: Any, items: list[Any]) -> Any:
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    if type(value) is list:
        return items
    if isinstance(value, list):
        twin = copy.copy(value)
        twin[:] = items
        return twin
    # Named tuples take their fields one by one; torch.return_types take a sequence.
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _with_entries(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """Returns a mapping of the same type, such as transformers' BatchEncoding; a dict if it cannot be copied."""
    if type(value) is dict:
        return entries
    if type(value) is OrderedDict:
        return OrderedDict(entries)
    try:
        # A shallow copy may share the dict in which a class keeps its items, but that of a UserDict does not.
        twin: Any = copy.copy(value) if isinstance(value, UserDict) else copy.deepcopy(value)
        for key, item in entries.items():
            twin[key] = item
    except Exception:  # immutable, or with tensors that cannot be copied
        return entries
    return twin


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    twin = copy.copy(value)
    for name, item in attributes.items():
        if item is not getattr(value, name):
            object.__setattr__(twin, name, item)  # also where the class is frozen
    return twin


def _moves_itself(value: Any) -> bool:
    return callable(getattr(value, "to", None))


def _moved_by_itself(value: Any, device: torch.device | str) -> Any:
    clone = getattr(value, "clone", None)
    twin = clone() if callable(clone) else copy.deepcopy(value)
    if device == _COPY:
        return twin
    result = twin.to(device)
    return twin if result is None else result


def _field_names(value: Any) -> list[str] | None:
    """Returns the names of the fields of a dataclass or a class of attrs."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return [entry.name for entry in dataclasses.fields(value)]
    attributes = getattr(type(value), "__attrs_attrs__", None)
    return None if attributes is None else [entry.name for entry in attributes]


def _is_registered(value: Any) -> bool:
    """Returns whether somebody has told torch how to take a value of this class apart."""
    leaves = tree_leaves(value)
    return not (len(leaves) == 1 and leaves[0] is value)


def _attributes(value: Any) -> dict[Any, Any] | None:
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict) and _moves_itself(value):
        try:
            found = to_dict()
        except Exception:  # another library's, with other arguments
            found = None
        if isinstance(found, dict):
            return found
    try:
        own = vars(value)
    except TypeError:
        return None
    found = {name: item for name, item in own.items() if not name.startswith("_") and _is_container(item)}
    return found if any(map(has_tensors, found.values())) else None


def _is_container(value: Any) -> bool:
    """Returns whether to look into an attribute; other objects may lead anywhere, and back."""
    return isinstance(value, (torch.Tensor, tuple, list, Mapping)) or _field_names(value) is not None
