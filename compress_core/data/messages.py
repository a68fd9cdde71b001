"""What errors say about a batch: what is in it, what forward takes, and the `forward_fn` to write."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from compress_core.data.arguments import INPUT_KEYS
from compress_core.data.structures import is_tensor_like, named_entries

# Names of entries that are targets; they are suggested only to arguments of the same name.
_TARGETS = ("label", "labels", "target", "targets", "y", "cls", "class", "class_labels", "index", "idx", "id", "loss")
_MOST_ENTRIES = 10


class _Entry(NamedTuple):
    """A tensor of a batch: the name and the expression under which `batch` has it."""

    name: str
    expression: str
    value: Any


def suggestion(model: nn.Module, batch: Any) -> str:
    """Returns a `forward_fn` for a batch, an argument of a call, with the names of forward's parameters."""
    return f"forward_fn=lambda model, batch: model({_call(model, batch)})"


def remedy(model: nn.Module, batch: Any) -> str:
    """Returns what is in a batch, what forward takes, and the line to write."""
    return (
        f"The batch: {described(batch)}; forward of {type(model).__name__} takes {_signature(model)}. Give batches "
        "that the model takes, or say how it takes them: "
        f"register_default_init_args(config, loader, {suggestion(model, batch)})"
    )


def described(batch: Any) -> str:
    """Returns the type of a batch, and its entries with shapes and dtypes."""
    entries = [f"{expression} = {_kind(value)}" for _, expression, value in _walk(batch, "", "batch", all_of_it=True)]
    if not entries or entries == [f"batch = {_kind(batch)}"]:
        return _kind(batch)
    more = f", and {len(entries) - _MOST_ENTRIES} more" if len(entries) > _MOST_ENTRIES else ""
    return f"{type(batch).__name__} with {', '.join(entries[:_MOST_ENTRIES])}{more}"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"Tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, PackedSequence):
        return f"PackedSequence of {len(value.batch_sizes)} steps, {value.data.dtype}"
    if isinstance(value, (tuple, list)) and value:
        return f"{type(value).__name__} of {len(value)} {type(value[0]).__name__}"
    return type(value).__name__ if not isinstance(value, (int, float, str, type(None))) else repr(value)[:30]


def _walk(value: Any, name: str, expression: str, *, all_of_it: bool, depth: int = 0) -> Iterator[_Entry]:
    """Yields the entries of a batch; those without a tensor only if all are wanted."""
    entries = None if is_tensor_like(value) or depth > 4 else named_entries(value)
    if entries is not None:
        for key, item in entries.items():
            inner = f"{expression}[{key!r}]" if isinstance(value, Mapping) else f"{expression}.{key}"
            yield from _walk(item, str(key), inner, all_of_it=all_of_it, depth=depth + 1)
    elif isinstance(value, (tuple, list)) and not is_tensor_like(value) and depth <= 4 and _is_of_tensors(value):
        for index, item in enumerate(value):
            yield from _walk(item, name, f"{expression}[{index}]", all_of_it=all_of_it, depth=depth + 1)
    elif all_of_it or is_tensor_like(value):
        yield _Entry(name, expression, value)


def _is_of_tensors(value: Any) -> bool:
    return len(value) <= _MOST_ENTRIES and any(not isinstance(item, (str, int, float)) for item in value)


def _call(model: nn.Module, batch: Any) -> str:
    samples = _of_samples(batch)
    if samples is not None:
        return samples
    found = [*_walk(batch, "", "batch", all_of_it=False)]
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if _can_be_given(p)]
    required = [p for p in parameters if p.default is p.empty] or parameters[:1]
    if not found or is_tensor_like(batch):
        return "..." if not found else "batch"
    given: dict[str, str] = {}
    for parameter in parameters:
        same = next((entry for entry in found if entry.name == parameter.name), None)
        if same is not None and (parameter.default is parameter.empty or not _is_target(same)):
            given[parameter.name] = same.expression
    left = sorted((entry for entry in found if entry.expression not in given.values()), key=_rank)
    for parameter in required if not given else [p for p in required if p.name not in given]:
        if left and parameter.kind is not parameter.VAR_POSITIONAL:
            given[parameter.name] = left.pop(0).expression
    if not given:
        return left[0].expression
    positional = {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    return ", ".join(text if name in positional else f"{name}={text}" for name, text in given.items())


def _of_samples(batch: Any) -> str | None:
    """Returns the call for a list of samples that nobody has collated; None for anything else."""
    if not isinstance(batch, list) or len(batch) < 2 or isinstance(batch[0], torch.Tensor):
        return None
    firsts = [[*_walk(sample, "", "sample", all_of_it=False)] for sample in batch]
    if not all(firsts) or len({tuple(entry.expression for entry in entries) for entries in firsts}) > 1:
        return None
    if not all(isinstance(sample, type(batch[0])) for sample in batch):
        return None
    best = min(firsts[0], key=_rank)
    return f"torch.stack([{best.expression} for sample in batch])"


def _can_be_given(parameter: inspect.Parameter) -> bool:
    return parameter.kind in {
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    }


def _is_target(entry: _Entry) -> bool:
    return entry.name.lower() in _TARGETS


def _rank(entry: _Entry) -> tuple[bool, bool, bool, int]:
    """Returns what comes first if nothing has the argument's name: inputs by name, then large tensors of numbers."""
    tensor = entry.value if isinstance(entry.value, torch.Tensor) else entry.value.data
    sizes = -math.prod(tensor.shape)
    return entry.name not in INPUT_KEYS, _is_target(entry), not tensor.is_floating_point(), sizes


def _signature(model: nn.Module) -> str:
    names = []
    for parameter in inspect.signature(model.forward).parameters.values():
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r:.20}"
        names.append(f"{stars}{parameter.name}{default}")
    more = ["..."] if len(names) > _MOST_ENTRIES else []
    return f"({', '.join(names[:_MOST_ENTRIES] + more)})"
