"""`Registry`: the installed plugins, what they contribute, and which could not be loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compress_core.channels.rules import Rule, look_up_rules_with
from compress_core.config.document import UnresolvedSection, validate_sections_with
from compress_core.config.errors import did_you_mean
from compress_core.config.sections import AlgorithmConfig
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.choices import Choice, ChoicePoint, look_up_choices_with
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.contract.initializer import Initializer
from compress_core.errors import PluginError, Problem
from compress_core.registry.checks import check_algorithm, check_initializer, check_plugin, new_manager
from compress_core.registry.choices import ChoiceTable
from compress_core.registry.plugins import ContributedChoice, Contribution, LoadFailure, PluginInfo, UnplacedChoice
from compress_core.registry.sections import SectionClasses, validated_section

logger = logging.getLogger(__name__)


class Registry:
    """The installed plugins. A process has one registry, created on first use.

    Plugins are imported on demand, and an installed plugin is not active until a config names it. To find an algorithm,
    an initializer or a choice by name, the registry first loads the entry points of that name, and all others only if
    these do not provide it. So a plugin that no config names costs nothing.

    Attributes:
        plugins: The plugins that have been loaded.
        failures: Plugins that could not be loaded.
    """

    def __init__(self) -> None:
        self._manager = new_manager()
        self._pending: list[importlib.metadata.EntryPoint] = []
        self._seen: set[str] = set()
        self._algorithms: dict[str, list[Contribution[Algorithm]]] = {}
        self._initializers: dict[str, Contribution[Initializer]] = {}
        self._table = ChoiceTable()
        self._registering = 0
        self._reported: set[tuple[PluginInfo, str, str, bool]] = set()
        self._sections = SectionClasses()
        self.plugins: list[PluginInfo] = []
        self.failures: list[LoadFailure] = []

    # Finding plugins.

    def find_entry_points(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
        """Finds plugins without loading them; each is loaded on demand.

        Args:
            entry_points: Entry points to use instead of the group `compress_core.plugins` of the environment.
        """
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        self._pending += entry_points

    def load_entry_points(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
        """Loads every plugin; one that fails causes a warning and an entry in `failures`.

        Args:
            entry_points: See `find_entry_points`.
        """
        self.find_entry_points(entry_points)
        self.load_all()

    def load_all(self) -> None:
        """Loads every plugin that was found but not loaded yet."""
        while self._pending:
            self._load(self._pending.pop(0))

    def _load_named(self, name: str) -> None:
        wanted = [point for point in self._pending if point.name == name]
        self._pending = [point for point in self._pending if point.name != name]
        for point in wanted:
            self._load(point)

    def _load(self, point: importlib.metadata.EntryPoint) -> None:
        # A plugin may have an entry point for each of its names, and a distribution may be visible twice on sys.path.
        if point.value in self._seen:
            return
        self._seen.add(point.value)
        info = PluginInfo.of(point)
        try:
            plugin = point.load()
            self.register(plugin, info.called(plugin))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a plugin must not end the user's program
            self.failures.append(LoadFailure(info, error))
            logger.warning("%s could not be loaded and is left out: %s: %s", info, type(error).__name__, error)

    def register(self, plugin: object, info: PluginInfo | str) -> None:
        """Registers a plugin: either everything that it contributes, or nothing.

        A choice for a point that nobody declares waits for it; see `unplaced`.

        Args:
            plugin: A module or an instance with hook implementations.
            info: Identifies the plugin; may be just a name.

        Raises:
            PluginError: The plugin breaks the contract; the message names it and lists everything that is wrong.
        """
        info = PluginInfo(info) if isinstance(info, str) else info
        label = info.label
        check_plugin(plugin, label)
        if self._manager.has_plugin(f"{info.distribution}:{info.name}"):
            raise PluginError(f"{label} is registered already")
        self._manager.register(plugin, name=f"{info.distribution}:{info.name}")
        self._registering += 1
        try:
            algorithms = self._contributed(plugin, "compress_algorithms", label, subclass_of=Algorithm)
            initializers = self._contributed(plugin, "compress_initializers", label, subclass_of=Initializer)
            points = self._contributed(plugin, "compress_choice_points", label, instance_of=ChoicePoint)
            choices = self._contributed(plugin, "compress_choices", label, instance_of=Choice)
            self._check(algorithms, initializers, label)
            self._table.check(points, choices, label, self._point)
        except BaseException:
            self._manager.unregister(plugin)
            raise
        finally:
            self._registering -= 1
        for cls in algorithms:
            self._algorithms.setdefault(cls.name, []).append(Contribution(cls, info))
        for cls in initializers:
            self._initializers[cls.name] = Contribution(cls, info)
        self._table.add(points, choices, info)
        self.plugins.append(info)
        self._sections.forget()
        if not self._registering:  # plugins that are loaded on the way may declare each other's points
            self._report_unplaced()

    def _report_unplaced(self) -> None:
        for found in self._unplaced():
            key = (found.plugin, found.choice.point, found.choice.name, found.is_suspect)
            if key not in self._reported:
                logger.log(logging.WARNING if found.is_suspect else logging.DEBUG, "%s", found)
                self._reported.add(key)

    def _unplaced(self) -> list[UnplacedChoice]:
        return self._table.unplaced({*self._algorithms, *self._initializers, *(info.name for info in self.plugins)})

    def _contributed(
        self, plugin: object, hook: str, label: str, *, subclass_of: type | None = None, instance_of: type = type
    ) -> list[Any]:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        found = []
        for result in self._manager.subset_hook_caller(hook, remove_plugins=others)():
            try:
                found += list(result)
            except TypeError as error:
                raise PluginError(f"{label}: {hook}() returned {result!r}, which is not a list") from error
        for item in found:
            fits = isinstance(item, instance_of)
            if subclass_of is not None:
                fits = isinstance(item, type) and issubclass(item, subclass_of)
            if not fits:
                wanted = f"a subclass of {subclass_of.__name__}" if subclass_of else f"a {instance_of.__name__}"
                raise PluginError(f"{label}: {hook}() returned {item!r}, which is not {wanted}")
        return found

    def _check(self, algorithms: list[type[Algorithm]], initializers: list[type[Initializer]], label: str) -> None:
        problems = [problem for cls in algorithms for problem in check_algorithm(cls)]
        problems += [problem for cls in initializers for problem in check_initializer(cls)]
        if problems:
            raise PluginError(f"{label}: {'; '.join(problems)}")
        for initializer in initializers:
            if (owner := self._initializers.get(initializer.name)) is not None:
                raise PluginError(
                    f"{label}: the initializer '{initializer.name}' is contributed by {owner.plugin} already; "
                    "uninstall one of them"
                )
            if initializer.name in self._algorithms:
                raise PluginError(f"{label}: the name '{initializer.name}' is that of an algorithm; choose another")
        taken = {*self._initializers, *(initializer.name for initializer in initializers)}
        for algorithm in algorithms:
            if algorithm.name in taken:
                raise PluginError(f"{label}: the name '{algorithm.name}' is that of an initializer; choose another")

    # Looking up contributions.

    def algorithms(self) -> dict[str, list[Contribution[Algorithm]]]:
        """Returns the contributions by algorithm name; more than one contribution for a name is a conflict."""
        self.load_all()
        return dict(sorted(self._algorithms.items()))

    def initializers(self) -> dict[str, Contribution[Initializer]]:
        """Returns the shared initializers by name."""
        self.load_all()
        return dict(sorted(self._initializers.items()))

    def points(self) -> dict[str, ChoicePoint]:
        """Returns the choice points by name."""
        self.load_all()
        return dict(sorted(self._table.points.items()))

    def choices(self, point: str) -> dict[str, ContributedChoice]:
        """Returns the choices of a point by name."""
        self.load_all()
        return dict(sorted(self._table.choices.get(point, {}).items()))

    def unplaced(self) -> list[UnplacedChoice]:
        """Returns the choices that nothing can choose, mostly because their point's plugin is not installed."""
        self.load_all()
        return self._unplaced()

    def algorithm(self, name: str) -> Contribution[Algorithm]:
        """Returns the contribution of an installed algorithm.

        Raises:
            PluginError: No plugin, or more than one, contributes it.
        """
        found = self._found_algorithms(name)
        if len(found) == 1:
            return found[0]
        if found:
            owners = " and ".join(str(contribution.plugin) for contribution in found)
            raise PluginError(f"the algorithm '{name}' is contributed by {owners}; uninstall all but one of them")
        raise PluginError(self.unknown_algorithm(name))

    def loaded_initializers(self, names: Iterable[str] = ()) -> dict[str, Contribution[Initializer]]:
        """Returns the initializers loaded so far, after loading those in `names` as far as they are installed."""
        for name in names:
            self._load_named(name)
        return dict(sorted(self._initializers.items()))

    def choice(self, name: str, *points: str) -> ContributedChoice | None:
        """Returns the choice with this name at the first of `points` that has it, or None."""

        def found() -> ContributedChoice | None:
            at_points = (self._table.choices.get(point, {}).get(name) for point in points)
            return next((choice for choice in at_points if choice is not None), None)

        self._load_named(name)
        for point in points:
            if found() is None:
                self._load_named(point.partition(".")[0])
        if found() is None:
            self.load_all()
        return found()

    def _point(self, name: str) -> ChoicePoint | None:
        if name not in self._table.points:
            self._load_named(name.partition(".")[0])
        if name not in self._table.points:
            self.load_all()
        return self._table.points.get(name)

    def _found_algorithms(self, name: str) -> list[Contribution[Algorithm]]:
        self._load_named(name)
        if name not in self._algorithms:
            self.load_all()
        return self._algorithms.get(name, [])

    def unknown_algorithm(self, name: str) -> str:
        """Returns the message for an algorithm that is not installed; problems that concern it come first."""
        self.load_all()
        about_it = [failure for failure in self.failures if name in (failure.plugin.name, failure.plugin.distribution)]
        others = [failure for failure in self.failures if failure not in about_it]
        parts = [f"the algorithm '{name}' is not installed.{did_you_mean(name, self._algorithms)}"]
        parts += [f"{str(failure).removesuffix('.')}." for failure in about_it]
        parts.append(f"Installed: {', '.join(self.algorithms()) or 'none'}.")
        parts += [f"{str(failure).removesuffix('.')}." for failure in others]
        return " ".join(parts)

    # Sections of a document.

    def validate_section(
        self, raw: Any, path: str, problems: list[Problem]
    ) -> AlgorithmConfig | UnresolvedSection | None:
        """Validates an algorithm's section and adds what is wrong with it to `problems`.

        Returns:
            The section; None if it is wrong; an `UnresolvedSection` if the algorithm is not installed and its name does
            not look like a misspelling of an installed one.
        """
        return validated_section(self, raw, path, problems)

    def section_class(self, name: str, initializers: Iterable[str] | None = None) -> type[AlgorithmConfig]:
        """Returns the class that validates the sections of an installed algorithm.

        Args:
            name: The algorithm.
            initializers: Names of the shared initializers that it has to accept; by default all installed ones.
        """
        if initializers is None:
            self.load_all()
        cls = self.algorithm(name).cls
        return self._sections.of(cls, self.loaded_initializers(initializers or ()))


@functools.cache
def _installed() -> Registry:
    registry = Registry()
    registry.find_entry_points()
    return registry


_in_use: list[Registry] = []


def default_registry() -> Registry:
    """Returns the registry of what is installed in this environment."""
    return _in_use[-1] if _in_use else _installed()


@contextlib.contextmanager
def use_registry(registry: Registry) -> Iterator[Registry]:
    """Context manager in which `registry` replaces the default one; for tests and notebooks."""
    _in_use.append(registry)
    try:
        yield registry
    finally:
        _in_use.remove(registry)


# Lower layers cannot import the registry, so it registers itself with them.


class _InstalledChoices:
    """Implements `compress_core.config.choices.ChoiceSource`."""

    def all_choices(self, point: str) -> Mapping[str, Choice]:
        return {name: found.choice for name, found in default_registry().choices(point).items()}

    def find_choice(self, name: str, points: Sequence[str]) -> Choice | None:
        found = default_registry().choice(name, *points)
        return None if found is None else found.choice

    def left_out(self, name: str) -> list[str]:
        return [str(found) for found in default_registry().unplaced() if found.choice.name == name]


def _rule(operator: str) -> Rule | None:
    found = default_registry().choice(operator, "channels.rule")
    return None if found is None else found.choice.value


look_up_choices_with(_InstalledChoices())
look_up_rules_with(_rule)
validate_sections_with(lambda raw, path, problems: default_registry().validate_section(raw, path, problems))
