"""Builds the classes of algorithm sections, shared initializers included, and validates sections with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pydantic import Field, ValidationError, create_model

from compress_core.config.document import CompressionConfig, UnresolvedSection
from compress_core.config.errors import did_you_mean, problems_of, shown
from compress_core.config.sections import AlgorithmConfig, InitializerSection
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.initializer import Initializer
from compress_core.errors import PluginError, Problem
from compress_core.registry.plugins import Contribution


class SectionClasses:
    """The classes that validate sections, each built on first use."""

    def __init__(self) -> None:
        self._made: dict[type[Algorithm], type[AlgorithmConfig]] = {}

    def forget(self) -> None:
        """Discards the classes, because the set of initializers has changed."""
        self._made.clear()

    def of(
        self, algorithm: type[Algorithm], initializers: Mapping[str, Contribution[Initializer]]
    ) -> type[AlgorithmConfig]:
        """Returns the class of an algorithm's sections, with these initializers in it."""
        if algorithm not in self._made:
            self._made[algorithm] = _with_shared_initializers(algorithm.Config, initializers)
        return self._made[algorithm]


class Installed(Protocol):
    """The part of `compress_core.registry.Registry` that validation uses."""

    def algorithms(self) -> Mapping[str, Any]:
        """Returns the installed algorithms by name."""

    def algorithm(self, name: str) -> Contribution[Algorithm]:
        """Returns the algorithm with this name, or raises PluginError."""

    def section_class(self, name: str, initializers: Iterable[str] | None = None) -> type[AlgorithmConfig]:
        """Returns the class of the algorithm's sections."""


def validated_section(
    registry: Installed, raw: Any, path: str, problems: list[Problem]
) -> AlgorithmConfig | UnresolvedSection | None:
    """See `Registry.validate_section`."""
    name = raw.get("algorithm") if isinstance(raw, Mapping) else None
    if not isinstance(name, str):
        what = "must be an object with a key 'algorithm'"
        if isinstance(raw, Mapping):
            misspelt = [str(key) for key in raw if did_you_mean("algorithm", [str(key)])]
            what = "'algorithm' is required" + (f", is it misspelt as '{misspelt[0]}'?" if misspelt else "")
        problems.append(Problem(path, f"{what}, got {shown(raw)}. Installed: {', '.join(registry.algorithms())}."))
        return None
    try:
        registry.algorithm(name)
    except PluginError as error:
        problem = Problem(f"{path}.algorithm", str(error))
        known = registry.algorithms()
        if name not in known and not did_you_mean(name, known):
            return UnresolvedSection(raw, problem)
        problems.append(problem)
        return None
    asked = raw.get("initializer")
    names = [str(key) for key in asked] if isinstance(asked, Mapping) else []
    try:
        return registry.section_class(name, names).model_validate(dict(raw))
    except ValidationError:
        pass
    # Validated again with all installed initializers, so that errors do not depend on what happens to be loaded.
    cls = registry.section_class(name)
    try:
        return cls.model_validate(dict(raw))
    except ValidationError as error:
        problems.extend(problems_of(error, cls, f"{path}.{name}"))
        return None


# Classes that are made here stand in no file, where pydantic would look for docstrings of attributes for a long time.
_WITHOUT_SOURCE = {"use_attribute_docstrings": False}


def _with_shared_initializers(
    config: type[AlgorithmConfig], initializers: Mapping[str, Contribution[Initializer]]
) -> type[AlgorithmConfig]:
    field = config.model_fields["initializer"]
    own: Any = field.annotation
    shared: dict[str, Any] = {
        key: (contribution.cls.Config | None, Field(None, description=_summary(contribution.cls)))
        for key, contribution in initializers.items()
    }
    section: type[InitializerSection] = create_model(
        f"{config.__name__}Initializer", __base__=own, __cls_kwargs__=_WITHOUT_SOURCE, **shared
    )
    made: type[AlgorithmConfig] = create_model(
        config.__name__,
        __base__=config,
        __doc__=config.__doc__,
        __cls_kwargs__=_WITHOUT_SOURCE,
        initializer=(section, Field(default_factory=section, description=field.description)),
    )
    made.__reduce__ = _reduce  # type: ignore[method-assign, assignment]
    return made


def _reduce(self: AlgorithmConfig) -> tuple[Any, ...]:
    # Pickle cannot find this class by its name; it is built again from what is installed.
    return _section_again, (self.model_dump(exclude_unset=True),)


def _section_again(document: Mapping[str, Any]) -> AlgorithmConfig | UnresolvedSection:
    return CompressionConfig({"compression": document}).sections[0]


def _summary(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")
