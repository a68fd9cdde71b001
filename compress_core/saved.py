"""Values that come from outside, such as a compression state: checked before anything is made of them.

A state may come from a stranger, or from a file that something has damaged. So its types are checked strictly (nothing
is converted), its sizes are compared with those of the model before a tensor of that size is made, and every error is a
`StateError` that names the path of the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from compress_core.errors import StateError

Value = TypeVar("Value")

# Deeper than any plan, and far from Python's limit of recursion, which copying and printing such a value would meet.
_DEEPEST = 64
_LARGEST = 2**63 - 1
_LONGEST_SHOWN = 80

Whole: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
"""A whole number from 0 on that fits in 64 bits."""

Positive: TypeAlias = Annotated[int, Field(ge=1, le=_LARGEST)]
"""A whole number from 1 on that fits in 64 bits."""


class _FirstOnly(FailFast):
    # In a union, what annotates a type has to be hashable.
    __hash__ = object.__hash__


Items: TypeAlias = Annotated[list[Value], _FirstOnly()]
"""A list of which only the first wrong entry is reported: a million of them would take a million reports."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""The settings of a pydantic model of saved values."""


def damaged(path: str, message: str) -> StateError:
    """Returns the error for a value of a state.

    Args:
        path: Where the value is, such as `compression_state.algorithms.quantization.plan`.
        message: What is wrong with it, and what it is.
    """
    return StateError(f"{path}: {message}. The state is damaged, or of another model; load it as it was saved")


def shown(value: Any) -> str:
    """Returns a value as messages quote it; a long one is not even converted as a whole."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, (int, str)) or isinstance(value, bool) else _short(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def _short(value: int | str) -> str:
    if isinstance(value, str):
        return repr(value[:_LONGEST_SHOWN])
    # Python refuses to print integers of thousands of digits.
    return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"


def check_plain(value: Any, path: str, *, finite: bool = True) -> None:
    """Refuses what JSON cannot hold, what is nested too deeply, and numbers that do not fit in 64 bits.

    The work is proportional to the number of values, and nothing is recursive.

    Args:
        value: Dicts with strings as keys, lists, and what JSON has besides.
        path: Where it is, for messages.
        finite: Whether NaN and infinity are refused.

    Raises:
        StateError: Names the path of the first such value.
    """
    # Only containers wait for their turn: a state can hold lists of a hundred thousand numbers.
    pending: list[tuple[Any, Any, int]] = [({path: value}, None, -1)]
    while pending:
        container, place, depth = pending.pop()
        if depth >= _DEEPEST:
            raise damaged(_joined(place), f"is nested more than {_DEEPEST} levels deep")
        if isinstance(container, Mapping):
            for key in container:
                if not isinstance(key, str):
                    raise damaged(_joined(place), f"has the key {shown(key)}, which is no text")
            entries: Any = container.items()
        else:
            entries = enumerate(container)
        for key, item in entries:
            problem = _problem(item, finite)
            if problem is None:
                continue
            if not isinstance(item, (Mapping, list, tuple)):
                raise damaged(_joined((place, key)), problem)
            pending.append((item, (place, key), depth + 1))


def _problem(item: Any, finite: bool) -> str | None:
    if item is None or isinstance(item, (str, bool)):
        return None
    if isinstance(item, int):
        return None if abs(item) <= _LARGEST else f"does not fit in 64 bits, got {shown(item)}"
    if isinstance(item, float):
        return None if not finite or math.isfinite(item) else f"must be a finite number, got {item}"
    return f"must be what JSON can hold, got {type(item).__name__}"


def _joined(place: Any) -> str:
    parts = []
    while place is not None:
        place, key = place
        parts.append(str(key))
    return ".".join(reversed(parts[-12:] if len(parts) > 12 else parts)) + ("..." if len(parts) > 12 else "")


def parsed(kind: type[Value], value: Any, path: str) -> Value:
    """Returns saved values as an object, with the types exactly as they are annotated: nothing is converted.

    Args:
        kind: A pydantic model, a dataclass or another type that pydantic can check.
        value: What JSON can hold; lists stand for tuples.
        path: Where the value is, for messages.

    Raises:
        StateError: Names the path of the first value that does not fit.
    """
    check_plain(value, path)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=dict), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([path, *(str(part) for part in first["loc"])])
        text = first["msg"][0].lower() + first["msg"][1:]
        raise damaged(place, text if first["type"] == "missing" else f"{text}, got {shown(first['input'])}") from error
