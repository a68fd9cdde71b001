"""Records of which plugin contributed what, and which plugins could not be loaded."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.choices import Choice
from compress_core.contract.initializer import Initializer
from compress_core.errors import PluginError


@dataclass(frozen=True)
class PluginInfo:
    """Identifies a plugin.

    Attributes:
        name: What it calls itself (`plugin_name`), else the name of its entry point.
        distribution: The installed package that has the entry point; empty for a plugin registered in the process.
        version: The version of that package.
    """

    name: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution} {self.version})" if self.distribution else self.name

    @property
    def label(self) -> str:
        """The beginning of messages about this plugin."""
        return str(self) if self.distribution else f"plugin '{self.name}'"

    @classmethod
    def of(cls, point: importlib.metadata.EntryPoint) -> PluginInfo:
        """Returns the plugin of an entry point."""
        distribution = point.dist
        if distribution is None:
            return cls(point.name)
        return cls(point.name, distribution.name, distribution.version)

    def called(self, plugin: object) -> PluginInfo:
        """Returns the same with the name that a plugin gives itself, which may have several entry points.

        Raises:
            PluginError: Its `plugin_name` is no text.
        """
        name = getattr(plugin, "plugin_name", self.name)
        if not isinstance(name, str) or not name.strip():
            raise PluginError(f"{self.label}: plugin_name is {name!r}; give the name as text, or leave it out")
        return replace(self, name=name)


Kind = TypeVar("Kind", Algorithm, Initializer)


@dataclass(frozen=True)
class Contribution(Generic[Kind]):
    """An algorithm class or initializer class, and the plugin that contributed it."""

    cls: type[Kind]
    plugin: PluginInfo


@dataclass(frozen=True)
class ContributedChoice:
    """A choice, and the plugin that contributed it."""

    choice: Choice
    plugin: PluginInfo


@dataclass(frozen=True)
class UnplacedChoice:
    """A choice that nothing can choose.

    Attributes:
        choice: The choice.
        plugin: The plugin that contributes it.
        reason: Why it is left out.
        is_suspect: Whether that is likely a mistake; otherwise the plugin that its point belongs to is not installed.
    """

    choice: Choice
    plugin: PluginInfo
    reason: str
    is_suspect: bool

    def __str__(self) -> str:
        return f"{self.plugin}: the choice '{self.choice.name}' of '{self.choice.point}' is left out: {self.reason}"


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is installed but could not be loaded."""

    plugin: PluginInfo
    error: BaseException

    def __str__(self) -> str:
        return f"{self.plugin} could not be loaded: {type(self.error).__name__}: {self.error}"
