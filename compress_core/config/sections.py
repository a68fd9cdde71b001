"""Building blocks of config sections, for the core and for plugins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from compress_core.config.frozen import FrozenDict, FrozenList, frozen


def _whole(value: Any) -> Any:
    """Converts whole floats to int, because JSON has one number type and some configs write epochs as 10.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_whole)]
"""A whole number; `10.0` counts as one."""

Scopes = Annotated[list[str], BeforeValidator(_as_list)]
"""A scope or a list of scopes (`compress_core.config.scopes`)."""


class Section(BaseModel):
    """Base class of every object in a config: immutable, strict about types, without unknown keys, and tracks reads.

    A section records which fields are read. A value that was given but never read cannot have had an effect, and
    `compress_core.contract.ledger` reports it. So read a field only where it takes effect; checks should read a copy
    (`unread`).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    _reads: set[str] = PrivateAttr(default_factory=set)

    def model_post_init(self, context: Any) -> None:
        """Makes the values of the fields immutable, so that a plugin cannot change another plugin's section."""
        for name, value in self.__dict__.items():
            self.__dict__[name] = frozen(value)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("_") and name in type(self).__pydantic_fields__:
            private = object.__getattribute__(self, "__pydantic_private__")
            if private is not None:
                private["_reads"].add(name)
        return value

    def unread(self) -> Self:
        """Returns a copy of this section in which no field counts as read.

        Checks use such a copy, because checking a value does not mean that it has an effect.
        """
        copy = self.model_copy()
        object.__setattr__(copy, "__pydantic_private__", {"_reads": set()})
        for name, value in self.__dict__.items():
            copy.__dict__[name] = _unread(value)
        return copy

    def given_leaves(self, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
        """Yields (path, value, whether it was read) for every value that the user wrote.

        This includes nested sections, also those in lists and dicts. Each list within a list has a path of its own,
        and counts as read when the outer list was read.
        """
        for name in type(self).__pydantic_fields__:
            if name in self.model_fields_set:
                yield from _leaves(f"{prefix}{name}", self.__dict__[name], name in self._reads)


def _unread(value: Any) -> Any:
    if isinstance(value, Section):
        return value.unread()
    if isinstance(value, list):
        return FrozenList([_unread(item) for item in value])
    return FrozenDict({key: _unread(item) for key, item in value.items()}) if isinstance(value, dict) else value


def _leaves(path: str, value: Any, was_read: bool) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(value, Section):
        yield from value.given_leaves(f"{path}.")
        return
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(items, dict) and any(isinstance(item, (Section, list, tuple)) for item in items.values()):
        for key, item in items.items():
            yield from _leaves(f"{path}.{key}", item, was_read)
    else:
        yield path, value, was_read


class InitializerConfig(Section):
    """Base class of the section `initializer.<name>` of a shared initializer."""


class InitializerSection(Section):
    """The section `initializer` of an algorithm.

    A subclass adds the algorithm's own data-driven settings. The core adds the sections of the installed shared
    initializers, such as `batchnorm_adaptation`.
    """

    def names(self) -> list[str]:
        """Returns the keys that the user wrote in this section."""
        return sorted(self.model_fields_set)

    def shared(self, name: str) -> InitializerConfig | None:
        """Returns the section of the shared initializer `name`, or None if the user wrote none."""
        value = getattr(self, name, None)
        return value if isinstance(value, InitializerConfig) else None


class AlgorithmConfig(Section):
    """Base class of an algorithm's section; a subclass adds fields and may give `initializer` a narrower type.

    Example:
        ```python
        class Config(AlgorithmConfig):
            level: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
        ```
    """

    algorithm: str = Field(description="name of the algorithm")
    initializer: InitializerSection = Field(
        default_factory=InitializerSection, description="what is measured on data before training"
    )
    ignored_scopes: Scopes = Field(default_factory=list, description="parts of the model to leave unchanged")
    target_scopes: Scopes = Field(default_factory=list, description="if given, the only parts to compress")
    validate_scopes: bool = Field(True, description="whether a scope that matches nothing is an error")
