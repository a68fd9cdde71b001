"""Translates pydantic errors into sentences that name the path, the value and the remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from compress_core.errors import Problem

# A given value longer than this is cut in a message.
_LONGEST_VALUE = 80


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str) -> list[Problem]:
    """Translates the errors of one section.

    Args:
        error: What pydantic raised.
        model: The class that was validated.
        prefix: Path of the section in the document, without a dot at its end.
    """
    return [_problem(details, model, prefix) for details in error.errors(include_url=False)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest known word, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""


def shown(value: Any) -> str:
    """Returns the value as messages quote it, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def join_path(prefix: str, location: Sequence[int | str]) -> str:
    """Returns the dotted path of a location below `prefix`."""
    return ".".join([*([prefix] if prefix else []), *(str(part) for part in location)])


def _problem(details: Any, model: type[BaseModel], prefix: str) -> Problem:
    location = _location(details["loc"], model)
    path = join_path(prefix, location)
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = dict.fromkeys(_fields_at(model, location[:-1]))
        return Problem(
            path,
            f"unknown key (value {shown(value)}).{did_you_mean(str(location[-1]), known)} "
            f"Known here: {', '.join(known) or 'nothing'}.",
        )
    if kind == "missing":
        return Problem(path, f"is required.{_meaning(model, location)}")
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return Problem(path, f"{message} (value {shown(value)})." if shown(value) not in message else message)
    text = details["msg"][0].lower() + details["msg"][1:]
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, _literals_at(model, location))
    return Problem(path, f"{text}, got {shown(value)}.{hint}{_meaning(model, location)}")


def _location(parts: Sequence[int | str], model: type[BaseModel]) -> list[int | str]:
    """Removes what pydantic adds to a location, but keeps keys of dicts that look the same, such as scopes."""
    kept: list[int | str] = []
    for part in parts:
        if not _is_internal(part) or _values_of_dict(_annotation_at(model, kept)[1]) is not None:
            kept.append(part)
    return kept


def _is_internal(part: int | str) -> bool:
    # pydantic adds the names of union members and validators to a location.
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "float", "bool", "list", "dict"})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in typing.get_args(annotation):
        found.extend(_models_in(argument))
    return found


def _values_of_dict(annotation: Any) -> Any:
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def _annotation_at(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[type[BaseModel]], Any]:
    """Walks down the fields; returns the model classes that can stand at a location, and its annotation."""
    models: list[type[BaseModel]] = [model]
    annotation: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        if (values := _values_of_dict(annotation)) is not None:
            annotation, models = values, _models_in(values)
            continue
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is None:
            return [], None
        annotation = field.annotation
        models = _models_in(annotation)
    return models, annotation


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    models, _ = _annotation_at(model, location)
    return [name for m in models for name in m.model_fields]


def _literals_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    _, annotation = _annotation_at(model, location)
    options: list[str] = []
    pending = [annotation]
    while pending:
        item = pending.pop()
        if typing.get_origin(item) is typing.Literal:
            options.extend(str(option) for option in typing.get_args(item))
        elif typing.get_origin(item) in (typing.Union, types.UnionType, typing.Annotated, list):
            pending.extend(typing.get_args(item))
    return options


def _meaning(model: type[BaseModel], location: Sequence[int | str]) -> str:
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return ""
    models, _ = _annotation_at(model, names[:-1])
    for m in models:
        field = m.model_fields.get(names[-1])
        if field is not None and field.description:
            return f" It is: {field.description}."
    return ""
