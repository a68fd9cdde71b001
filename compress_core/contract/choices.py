"""Open points: values of the config that plugins can add to, such as a filter importance or a level schedule.

A `ChoicePoint` says what can be chosen, a `Choice` is one of the things. Both come from plugins, the built-in ones by
the same hooks as anybody's, and a config field annotated with `ChoiceOf` takes the names of those that are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from compress_core.config.errors import did_you_mean


@dataclass(frozen=True)
class ChoicePoint:
    """Something that plugins can add named values to.

    Attributes:
        name: Dotted, the algorithm first where it is one algorithm's: `filter_pruning.importance`.
        description: What is chosen, and what a value has to be, for whoever writes one.
        check: Returns what is wrong with a value, or None; called when a plugin registers one.
    """

    name: str
    description: str
    check: Callable[[Any], str | None]


@dataclass(frozen=True)
class Choice:
    """A named value for an open point.

    Attributes:
        point: Name of the `ChoicePoint`.
        name: What a config says.
        value: What the point's description asks for.
        description: What it is, in a sentence; empty for the first line of the value's docstring.
    """

    point: str
    name: str
    value: Any
    description: str = ""


def callable_choice(value: Any) -> str | None:
    """For `ChoicePoint.check`: refuses what cannot be called."""
    return None if callable(value) else f"must be callable, got {type(value).__name__}"


class ChoiceSource(Protocol):
    """Whoever knows what is installed: the registry, which stands above this room and puts itself here."""

    def all_choices(self, point: str) -> Mapping[str, Choice]:
        """Returns the choices of a point by name."""

    def find_choice(self, name: str, points: Sequence[str]) -> Choice | None:
        """Returns the choice of a name at the first of some points that has it, or None."""


# The last one counts.
_sources: list[ChoiceSource] = []


def look_up_choices_with(source: ChoiceSource) -> None:
    """Makes `source` the one that is asked for choices."""
    _sources.append(source)


def choices_of(point: str) -> dict[str, Choice]:
    """Returns every installed choice of a point by name; this loads all plugins."""
    return dict(_sources[-1].all_choices(point)) if _sources else {}


def find_choice(name: str, *points: str) -> Choice | None:
    """Returns the choice of a name at the first of some points that has it, or None."""
    return _sources[-1].find_choice(name, points) if _sources else None


def choice(name: str, *points: str) -> Any:
    """Returns the value of a choice.

    Args:
        name: What the config says.
        points: Names of the points that it may belong to.

    Raises:
        ValueError: Nobody contributes it; the message lists what is installed.
    """
    found = find_choice(name, *points)
    if found is None:
        known = {key: None for point in points for key in choices_of(point)}
        hint = did_you_mean(name, known)
        raise ValueError(f"there is no '{name}' among {' and '.join(points)}.{hint} Installed: {', '.join(known)}")
    return found.value


class ChoiceOf:
    """Annotation of a config field that takes the name of a choice.

    The names that are installed stand in the JSON schema and in the error for any other name.

    Args:
        points: Names of the points; the first that has the name counts.

    Example:
        ```python
        class Params(Section):
            filter_importance: Annotated[str, ChoiceOf("filter_pruning.importance")] = Field("L2", description="...")
        ```
    """

    def __init__(self, *points: str) -> None:
        self.points = points

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": [name for point in self.points for name in choices_of(point)]}

    def _checked(self, name: str) -> str:
        choice(name, *self.points)
        return name
