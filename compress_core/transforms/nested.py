"""Reads and replaces a tensor in nested arguments or results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from compress_core.errors import TransformError
from compress_core.transforms.places import Path


def replace_at(value: Any, path: Path, replace: Callable[[torch.Tensor], torch.Tensor], where: object) -> Any:
    """Returns `value` with the tensor at `path` replaced; containers on the path are copied, not changed.

    A list or tuple may be shorter than in the example, as in a loop that concatenates ever more tensors: then there is
    nothing to replace.

    Args:
        value: A tensor, or nested tuples, lists, mappings and objects with tensors.
        path: Path of the tensor; empty for `value` itself.
        replace: Maps the tensor to its replacement.
        where: The place, for messages.

    Raises:
        TransformError: There is nothing at the path.
    """
    if not path:
        if isinstance(value, (tuple, list, dict)):
            raise TransformError(
                f"{where}: the value is a {type(value).__name__} where the example input gave a tensor; give an "
                "example input for each structure"
            )
        return replace(value) if isinstance(value, torch.Tensor) else value
    step, rest = path[0], path[1:]
    if isinstance(value, (tuple, list)) and isinstance(step, int) and step >= len(value):
        return value
    try:
        inner = _get(value, step)
    except (LookupError, TypeError, AttributeError):
        raise TransformError(
            f"{where}: the value has no item {step!r}: it is a {type(value).__name__} where the example input gave "
            "another structure; give an example input for each structure"
        ) from None
    return _with_item(value, step, replace_at(inner, rest, replace, where))


def _get(value: Any, step: int | str) -> Any:
    if isinstance(value, torch.Tensor):
        raise TypeError  # a row of it is none of its items
    return getattr(value, step) if isinstance(step, str) and not hasattr(value, "keys") else value[step]


def _with_item(value: Any, step: int | str, item: Any) -> Any:
    if isinstance(value, tuple):
        items = [item if index == step else other for index, other in enumerate(value)]
        if type(value) is tuple:
            return tuple(items)
        # Named tuples take their fields one by one; torch.return_types take a sequence.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is list:
        return [item if index == step else other for index, other in enumerate(value)]
    if type(value) is dict:
        return {key: item if key == step else other for key, other in value.items()}
    twin = copy.copy(value)
    if isinstance(step, str) and not hasattr(value, "keys"):
        _set_attribute(twin, step, item)
    else:
        twin[step] = item
    return twin


def _set_attribute(twin: Any, name: str, item: Any) -> None:
    try:
        setattr(twin, name, item)
    except AttributeError:  # of a frozen class; the twin is new, and nobody else has it
        object.__setattr__(twin, name, item)


def replace_argument(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
    replace: Callable[[torch.Tensor], torch.Tensor],
    where: object,
    names: tuple[str, ...] = (),
    known: frozenset[str] = frozenset(),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with the tensor at `path` replaced.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        path: The position or keyword of the argument, followed by the path of the tensor within it.
        replace: Maps the tensor to its replacement.
        where: The place, for messages.
        names: Names of the positional parameters, to find an argument passed by position or by keyword.
        known: Names of parameters that a call may leave out.

    Raises:
        TransformError: The argument was not passed.
    """
    first = _passed(args, kwargs, path[0], names)
    if isinstance(first, int) and first < len(args):
        changed = replace_at(args[first], path[1:], replace, where)
        return (*args[:first], changed, *args[first + 1 :]), kwargs
    if isinstance(first, str) and first in kwargs:
        return args, {**kwargs, first: replace_at(kwargs[first], path[1:], replace, where)}
    if first in known:
        return args, kwargs
    raise TransformError(
        f"{where}: this call has no argument {path[0]!r}, as the call of the example input had; give an example input "
        "for each way of calling"
    )


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], which: int | str, names: tuple[str, ...]) -> Any:
    """Returns an argument of a call by position or keyword, or None if it was not passed; see `replace_argument`."""
    first = _passed(args, kwargs, which, names)
    if isinstance(first, int):
        return args[first] if first < len(args) else None
    return kwargs.get(first)


def _passed(args: tuple[Any, ...], kwargs: dict[str, Any], which: int | str, names: tuple[str, ...]) -> int | str:
    """Returns the position or the keyword by which an argument was passed in this call."""
    if isinstance(which, int) and len(args) <= which < len(names):
        which = names[which]
    if isinstance(which, str) and which not in kwargs and which in names and names.index(which) < len(args):
        which = names.index(which)
    return which
