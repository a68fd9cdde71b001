"""Which plugins are installed, what they contribute, and what went wrong with the others."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import Field, ValidationError, create_model

from compress_core.config.document import UnresolvedSection, validate_sections_with
from compress_core.config.errors import did_you_mean, problems_of, shown
from compress_core.config.sections import AlgorithmConfig, InitializerConfig, InitializerSection
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.contract.initializer import Initializer
from compress_core.contract.stages import Stage
from compress_core.errors import PluginError, Problem
from compress_core.registry.checks import check_plugin, new_manager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginInfo:
    """Who contributed something.

    Attributes:
        name: The entry point's name.
        distribution: The installed package it came with; empty when it was registered in the process.
        version: That package's version.
    """

    name: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution} {self.version})" if self.distribution else self.name


Kind = TypeVar("Kind", Algorithm, Initializer)


@dataclass(frozen=True)
class Contribution(Generic[Kind]):
    """An algorithm class or initializer class, and who brought it."""

    cls: type[Kind]
    plugin: PluginInfo


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is installed and could not be used."""

    plugin: PluginInfo
    error: Exception


class Registry:
    """What is installed. One for the process, made when it is first needed; installing is not activating.

    Attributes:
        failures: Plugins that could not be loaded.
    """

    def __init__(self) -> None:
        self._manager = new_manager()
        self._algorithms: dict[str, list[Contribution[Algorithm]]] = {}
        self._initializers: dict[str, list[Contribution[Initializer]]] = {}
        self._section_classes: dict[str, type[AlgorithmConfig]] = {}
        self.plugins: list[PluginInfo] = []
        self.failures: list[LoadFailure] = []

    def load_entry_points(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
        """Loads every plugin that is installed; one that fails is a warning and an entry in `failures`.

        Args:
            entry_points: What to load instead of the group `compress_core.plugins` of the environment.
        """
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        seen: set[tuple[str, str]] = set()
        for point in entry_points:
            info = _info(point)
            if (point.name, point.value) in seen:  # one distribution can be visible twice on sys.path
                continue
            seen.add((point.name, point.value))
            try:
                self.register(point.load(), info)
            except Exception as error:
                self.failures.append(LoadFailure(info, error))
                logger.warning("%s could not be loaded and is left out: %s: %s", info, type(error).__name__, error)

    def register(self, plugin: object, info: PluginInfo | str) -> None:
        """Registers a plugin: all of what it contributes, or nothing.

        Args:
            plugin: A module or an instance with hook implementations.
            info: Who it is, or just a name for it.

        Raises:
            PluginError: It breaks the contract; the message names the plugin.
        """
        info = PluginInfo(info) if isinstance(info, str) else info
        label = str(info) if info.distribution else f"plugin '{info.name}'"
        check_plugin(plugin, label)
        if self._manager.has_plugin(f"{info.distribution}:{info.name}"):
            raise PluginError(f"{label} is registered already")
        self._manager.register(plugin, name=f"{info.distribution}:{info.name}")
        try:
            algorithms = self._contributed(plugin, "compress_algorithms", Algorithm, label)
            initializers = self._contributed(plugin, "compress_initializers", Initializer, label)
            for cls in algorithms:
                _check_algorithm(cls, label)
            for cls in initializers:
                _check_initializer(cls, label)
                self._check_free(cls.name, label)
            for cls in algorithms:
                if cls.name in self._initializers or cls.name in {i.name for i in initializers}:
                    raise PluginError(f"{label}: the name '{cls.name}' is an initializer's; choose another")
        except BaseException:
            self._manager.unregister(plugin)
            raise
        for cls in algorithms:
            self._algorithms.setdefault(cls.name, []).append(Contribution(cls, info))
        for cls in initializers:
            self._initializers.setdefault(cls.name, []).append(Contribution(cls, info))
        self.plugins.append(info)
        self._section_classes.clear()

    def _contributed(self, plugin: object, hook: str, base: type, label: str) -> list[Any]:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        results = self._manager.subset_hook_caller(hook, remove_plugins=others)()
        classes = [cls for result in results for cls in result]
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, base)):
                raise PluginError(f"{label}: {hook}() returned {cls!r}, which is not a subclass of {base.__name__}")
        return classes

    def _check_free(self, name: str, label: str) -> None:
        if name in self._initializers:
            owner = self._initializers[name][0].plugin
            raise PluginError(
                f"{label}: the initializer '{name}' is contributed by {owner} already; uninstall one of them"
            )
        if name in self._algorithms:
            raise PluginError(f"{label}: the name '{name}' is an algorithm's; choose another")

    def algorithms(self) -> dict[str, list[Contribution[Algorithm]]]:
        """Returns the contributions by algorithm name; more than one for a name is a conflict."""
        return dict(sorted(self._algorithms.items()))

    def initializers(self) -> dict[str, Contribution[Initializer]]:
        """Returns the shared initializers by name."""
        return {name: found[0] for name, found in sorted(self._initializers.items())}

    def algorithm(self, name: str) -> Contribution[Algorithm]:
        """Returns the one contribution of an installed algorithm.

        Raises:
            PluginError: Nobody or more than one plugin contributes it.
        """
        found = self._algorithms.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            owners = " and ".join(str(contribution.plugin) for contribution in found)
            raise PluginError(f"the algorithm '{name}' is contributed by {owners}; uninstall all but one of them")
        raise PluginError(self.unknown_algorithm(name))

    def unknown_algorithm(self, name: str) -> str:
        """Returns the message for an algorithm that nobody contributes."""
        installed = ", ".join(f"{key} ({found[0].plugin})" for key, found in self.algorithms().items()) or "none"
        failed = "; ".join(f"{f.plugin}: {f.error}" for f in self.failures)
        broken = f" Plugins that could not be loaded: {failed}." if failed else ""
        hint = did_you_mean(name, self._algorithms)
        return f"the algorithm '{name}' is not installed.{hint} Installed: {installed}.{broken}"

    def validate_section(
        self, raw: Any, path: str, problems: list[Problem]
    ) -> AlgorithmConfig | UnresolvedSection | None:
        """Validates an algorithm's section; what is wrong with it is added to `problems`.

        Returns:
            The section, None when it is wrong, or what was written when no installed plugin knows the algorithm and its
            name is not a misspelling of one that is known.
        """
        name = raw.get("algorithm") if isinstance(raw, Mapping) else None
        if not isinstance(name, str):
            what = "must be an object with a key 'algorithm'"
            if isinstance(raw, Mapping):
                misspelt = [str(key) for key in raw if did_you_mean("algorithm", [str(key)])]
                what = "'algorithm' is required" + (f", is it misspelt as '{misspelt[0]}'?" if misspelt else "")
            problems.append(Problem(path, f"{what}, got {shown(raw)}. Installed: {', '.join(self.algorithms())}."))
            return None
        full = f"{path}.{name}"
        found = self._algorithms.get(name, [])
        if len(found) != 1:
            try:
                self.algorithm(name)
            except PluginError as error:
                problem = Problem(f"{path}.algorithm", str(error))
            if not found and not did_you_mean(name, self._algorithms):
                return UnresolvedSection(raw, problem)
            problems.append(problem)
            return None
        cls = self.section_class(name)
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            problems.extend(problems_of(error, cls, full))
            return None

    def section_class(self, name: str) -> type[AlgorithmConfig]:
        """Returns the class that sections of an installed algorithm are validated with."""
        if name not in self._section_classes:
            self._section_classes[name] = self._with_shared_initializers(self.algorithm(name).cls.Config)
        return self._section_classes[name]

    def _with_shared_initializers(self, config: type[AlgorithmConfig]) -> type[AlgorithmConfig]:
        field = config.model_fields["initializer"]
        own: Any = field.annotation
        shared: dict[str, Any] = {
            key: (contribution.cls.Config | None, Field(None, description=_summary(contribution.cls)))
            for key, contribution in self.initializers().items()
        }
        section: type[InitializerSection] = create_model(f"{config.__name__}Initializer", __base__=own, **shared)
        return create_model(
            config.__name__,
            __base__=config,
            __doc__=config.__doc__,
            initializer=(section, Field(default_factory=section, description=field.description)),
        )


def _summary(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")


def _info(point: importlib.metadata.EntryPoint) -> PluginInfo:
    distribution = point.dist
    if distribution is None:
        return PluginInfo(point.name)
    return PluginInfo(point.name, distribution.name, distribution.version)


def _check_names(cls: Any, label: str) -> None:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise PluginError(f"{label}: {cls.__name__}.name must be an identifier such as 'my_method', got {name!r}")


def _check_initializer(cls: type[Initializer], label: str) -> None:
    _check_names(cls, label)
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, InitializerConfig)):
        raise PluginError(f"{label}: {cls.__name__}.Config must be a subclass of compress_core.InitializerConfig")
    if not callable(getattr(cls, "compress_initialize", None)):
        raise PluginError(f"{label}: {cls.__name__} must implement compress_initialize()")
    _check_implementations(cls, f"{label}: {cls.__name__}")


def _check_algorithm(cls: type[Algorithm], label: str) -> None:
    _check_names(cls, label)
    if not isinstance(getattr(cls, "stage", None), Stage):
        raise PluginError(f"{label}: {cls.__name__}.stage must be a compress_core.Stage")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, AlgorithmConfig)):
        raise PluginError(f"{label}: {cls.__name__}.Config must be a subclass of compress_core.AlgorithmConfig")
    for hook in ("compress_plan", "compress_commit"):
        if not callable(getattr(cls, hook, None)):
            raise PluginError(f"{label}: {cls.__name__} must implement {hook}()")
    _check_implementations(cls, f"{label}: {cls.__name__}")


def _check_implementations(cls: type[Algorithm] | type[Initializer], label: str) -> None:
    # An instance needs a config, which there is none of yet; __init__ is not what is checked here.
    check_plugin(cls.__new__(cls), label)


@functools.cache
def _installed() -> Registry:
    registry = Registry()
    registry.load_entry_points()
    return registry


_in_use: list[Registry] = []


def default_registry() -> Registry:
    """Returns the registry of what is installed in this environment."""
    return _in_use[-1] if _in_use else _installed()


@contextlib.contextmanager
def use_registry(registry: Registry) -> Iterator[Registry]:
    """Within the context `registry` takes the place of what is installed (tests, notebooks)."""
    _in_use.append(registry)
    try:
        yield registry
    finally:
        _in_use.remove(registry)


def _validate_section(raw: Any, path: str, problems: list[Problem]) -> AlgorithmConfig | UnresolvedSection | None:
    return default_registry().validate_section(raw, path, problems)


validate_sections_with(_validate_section)
