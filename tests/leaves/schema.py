"""Every leaf of the config, found in the schema, and values that it may have."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from compress_core import ChoiceOf
from compress_core.config.document import RootSection
from compress_core.contract.choices import choices_of
from compress_core.registry import Registry

ABSENT = "<absent>"  # a value that is not written at all
ITEM, ENTRY = "[]", "{}"  # parts of a path: an element of a list, an entry of a dict

# What a leaf may be set to when nobody says more; the types and bounds of its field choose.
CANDIDATES = (1, 2, 0, ["conv1"], "conv1")
FRACTIONS = (0.5, 0.25)


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value, or an optional section, whose presence is one.

    Attributes:
        section: The algorithm, or "" for the top of the document.
        path: Keys from there.
        field: What pydantic knows about it.
        is_section: Whether it is an optional section.
    """

    section: str
    path: tuple[str, ...]
    field: FieldInfo
    is_section: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.section}:{self.name}" if self.section else self.name

    def literals(self) -> tuple[Any, ...]:
        """All values of a field that lists its values."""
        found = tuple(value for kind in _members(self.field.annotation) for value in _literals(kind))
        points = [item.points for item in self.field.metadata if isinstance(item, ChoiceOf)]
        return found or tuple(name for names in points for point in names for name in choices_of(point))

    def guess(self) -> tuple[Any, ...]:
        """Values that should all make a difference; all of them where the schema lists them."""
        if self.is_section:
            return (ABSENT, {})
        if self.literals():
            return self.literals()
        kinds = [kind for kind in _members(self.field.annotation) if kind is not type(None)]
        if bool in kinds:
            return (False, True)
        default = self.field.get_default(call_default_factory=True) if not self.field.is_required() else None
        candidates = (*FRACTIONS, *CANDIDATES) if float in kinds else CANDIDATES
        legal = [value for value in candidates if value != default and self._allows(value)]
        return (ABSENT if default is None else default, *legal[:1])

    def _allows(self, value: Any) -> bool:
        annotation = self.field.annotation
        for metadata in self.field.metadata:
            annotation = Annotated[annotation, metadata]
        try:
            TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            return False
        return True


def leaves_of(registry: Registry) -> list[Leaf]:
    """All leaves of the root and of the sections of all installed algorithms, shared initializers included."""
    found = list(_leaves("", RootSection, ()))
    for name in registry.algorithms():
        found += _leaves(name, registry.section_class(name), ())
    return found


def _leaves(section: str, model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        below = list(_sections(field.annotation, ()))
        if not below:
            yield Leaf(section, path, field)
        if below and type(None) in _members(field.annotation):
            yield Leaf(section, path, field, is_section=True)
        for suffix, cls in below:
            yield from _leaves(section, cls, (*path, *suffix))


def _sections(annotation: Any, suffix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Finds the sections that a field can hold, and by which steps: directly, in a list, in a dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield suffix, annotation
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _sections(arguments[0], suffix)
    elif origin is list:
        yield from _sections(arguments[0], (*suffix, ITEM))
    elif origin is dict:
        yield from _sections(arguments[1], (*suffix, ENTRY))
    elif origin in (types.UnionType, typing.Union, tuple):
        for argument in arguments:
            yield from _sections(argument, suffix)


def _members(annotation: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return [member for argument in arguments for member in _members(argument)]
    return [annotation]


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def at_path(document: dict[str, Any], path: tuple[str, ...], value: Any) -> str:
    """Writes a value into a document, in place, and returns its dotted path.

    An element of a list is the first one, an entry of a dict is the one that there is.
    """
    here: Any = document
    names: list[str] = []
    for part, following in zip(path, (*path[1:], None), strict=True):
        key: Any = _key(here, part)
        names.append(str(key))
        if value is ABSENT and not _has(here, key):
            here = {}  # what is not there needs no place
        elif value is ABSENT and following is None:
            del here[key]
        elif following is None:
            here[key] = value
        else:
            if not _has(here, key):
                empty: Any = [] if following == ITEM else {}
                here.append(empty) if isinstance(here, list) else here.update({key: empty})
            here = here[key]
    return ".".join(names)


def _key(here: Any, part: str) -> Any:
    if part == ITEM:
        return 0
    return next(iter(here), "conv1") if part == ENTRY else part


def _has(here: Any, key: Any) -> bool:
    return key < len(here) if isinstance(here, list) else key in here
