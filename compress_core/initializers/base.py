"""The base class of shared initializers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from compress_core.config.model import InitializerConfig
from compress_core.errors import ConfigError, Problem
from compress_core.statistics import Statistics


class Initializer:
    """Base class of an initializer that algorithms share; one instance serves one model.

    Each algorithm's section may hold `initializer.<name>`. All requests are merged into one instance, which runs once
    after every algorithm has committed and calibrated. A subclass implements `compress_initialize`, and
    `compress_observe` if it has to see the uncompressed model.

    Attributes:
        name: The key in the section `initializer`.
        Config: The class of its section.
        struct: Type of the object of `register_extra_structs` that carries its data, if it takes any.
    """

    name: ClassVar[str]
    Config: ClassVar[type[InitializerConfig]]
    struct: ClassVar[type | None] = None

    def __init__(self, config: InitializerConfig, paths: tuple[str, ...]) -> None:
        self.config = config
        self.paths = paths

    @classmethod
    def from_requests(cls, requests: Mapping[str, InitializerConfig]) -> Self | None:
        """Merges what the algorithms asked for.

        Args:
            requests: Path of the request -> the section; at least one.

        Returns:
            The initializer, or None when there is nothing to do.

        Raises:
            ConfigError: The requests contradict one another. Here: they are not all the same.
        """
        first_path, first = next(iter(requests.items()))
        problems = [
            Problem(path, f"differs from {first_path}, but runs once for both; make them the same")
            for path, config in requests.items()
            if config != first
        ]
        if problems:
            raise ConfigError(problems)
        return cls(first, tuple(requests))

    def needs_data(self) -> bool:
        """Tells whether it has to be given batches."""
        return self.struct is not None

    def statistics(self) -> Statistics | None:
        """Returns what it did, or None when it has not run."""
        return None
