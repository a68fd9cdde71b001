"""Who contributed what, and what could not be loaded."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Generic, TypeVar

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.choices import Choice
from compress_core.contract.initializer import Initializer


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

    @property
    def label(self) -> str:
        """How messages begin that are about this plugin."""
        return str(self) if self.distribution else f"plugin '{self.name}'"

    @classmethod
    def of(cls, point: importlib.metadata.EntryPoint) -> PluginInfo:
        """Returns who an entry point belongs to."""
        distribution = point.dist
        if distribution is None:
            return cls(point.name)
        return cls(point.name, distribution.name, distribution.version)


Kind = TypeVar("Kind", Algorithm, Initializer)


@dataclass(frozen=True)
class Contribution(Generic[Kind]):
    """An algorithm class or initializer class, and who brought it."""

    cls: type[Kind]
    plugin: PluginInfo


@dataclass(frozen=True)
class ContributedChoice:
    """A choice, and who brought it."""

    choice: Choice
    plugin: PluginInfo


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is installed and could not be used."""

    plugin: PluginInfo
    error: BaseException

    def __str__(self) -> str:
        return f"{self.plugin} could not be loaded: {type(self.error).__name__}: {self.error}"
