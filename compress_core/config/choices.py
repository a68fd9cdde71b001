"""Choice points: config values that plugins can add names to, such as a filter importance or a level schedule.

A `ChoicePoint` declares what can be chosen, a `Choice` is one named value for it. Plugins contribute both; the built-in
ones use the same hooks. A config field annotated with `ChoiceOf` accepts the names that are installed.
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
    """A config value that plugins can add named values to.

    Attributes:
        name: Dotted; begins with the algorithm if it belongs to a single one: `filter_pruning.importance`.
        description: What is chosen, and what a value has to be; authors of plugins read this.
        check: Returns what is wrong with a value, or None; called when a plugin registers a value.
    """

    name: str
    description: str
    check: Callable[[Any], str | None]


@dataclass(frozen=True)
class Choice:
    """A named value for a choice point.

    Attributes:
        point: Name of the `ChoicePoint`.
        name: The name that configs use.
        value: An object as the description of the point asks for, for example a function.
        description: One sentence about it; if empty, the first line of the value's docstring is shown.
    """

    point: str
    name: str
    value: Any
    description: str = ""


def callable_choice(value: Any) -> str | None:
    """Refuses values that are not callable; for use as `ChoicePoint.check`."""
    return None if callable(value) else f"must be callable, got {type(value).__name__}"


class ChoiceSource(Protocol):
    """Looks up installed choices; the registry implements this and registers itself, as this layer cannot import it."""

    def all_choices(self, point: str) -> Mapping[str, Choice]:
        """Returns the choices of a point by name."""

    def find_choice(self, name: str, points: Sequence[str]) -> Choice | None:
        """Returns the choice with this name at the first of `points` that has it, or None."""

    def left_out(self, name: str) -> list[str]:
        """Returns what to say about choices with this name that belong to no installed point."""


# Only the last one is used.
_sources: list[ChoiceSource] = []


def look_up_choices_with(source: ChoiceSource) -> None:
    """Makes `source` the one that choices are looked up with."""
    _sources.append(source)


def choices_of(point: str) -> dict[str, Choice]:
    """Returns every installed choice of a point by name; this loads all plugins."""
    return dict(_sources[-1].all_choices(point)) if _sources else {}


def find_choice(name: str, *points: str) -> Choice | None:
    """Returns the choice with this name at the first of `points` that has it, or None."""
    return _sources[-1].find_choice(name, points) if _sources else None


def choice(name: str, *points: str) -> Any:
    """Returns the value of a choice.

    Args:
        name: The name in the config.
        points: Names of the points that it may belong to.

    Raises:
        ValueError: No plugin contributes it; the message lists the installed names.
    """
    found = find_choice(name, *points)
    if found is None:
        known = {key: None for point in points for key in choices_of(point)}
        hint = did_you_mean(name, known)
        left_out = "".join(f". {line}" for line in (_sources[-1].left_out(name) if _sources else ()))
        raise ValueError(
            f"there is no '{name}' among {' and '.join(points)}.{hint} Installed: {', '.join(known)}{left_out}"
        )
    return found.value


class ChoiceOf:
    """Annotation of a config field that takes the name of a choice.

    The JSON schema and the error for an unknown name list the installed names.

    Args:
        points: Names of the points; the first one that has the name is used.
        also: Names that are accepted although nobody contributes them.
        lenient: Whether any name is accepted while no plugin contributes to the points, for a field of the core whose
            values another distribution contributes: a config can be read without it.

    Example:
        ```python
        class Params(Section):
            filter_importance: Annotated[str, ChoiceOf("filter_pruning.importance")] = Field("L2", description="...")
        ```
    """

    def __init__(self, *points: str, also: Sequence[str] = (), lenient: bool = False) -> None:
        self.points = points
        self.also = tuple(also)
        self.lenient = lenient

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": [*self._installed(), *self.also]}

    def _installed(self) -> list[str]:
        return [name for point in self.points for name in choices_of(point)]

    def _checked(self, name: str) -> str:
        if name in self.also or find_choice(name, *self.points) is not None:
            return name
        if not self.lenient or self._installed():
            choice(name, *self.points)
        return name
