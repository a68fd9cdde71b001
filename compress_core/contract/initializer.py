"""The base class of shared initializers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from compress_core.config.sections import InitializerConfig
from compress_core.contract.statistics import Statistics
from compress_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from compress_core.contract.context import Context


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
            requests: Path of the request -> the section; may be empty.

        Returns:
            The initializer, or None when there is nothing to do.

        Raises:
            ConfigError: The requests contradict one another. Here: they are not all the same.
        """
        if not requests:
            return None
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

    def check(self, context: Context) -> None:
        """Raises what can be known to be wrong before anything is touched; data is checked by the core."""

    def load_state(self, state: Mapping[str, Any], model: nn.Module, context: Context) -> None:
        """Takes back, on a model that is being resumed, what `statistics().to_dict()` was when the state was saved.

        Args:
            state: That dict, through JSON; empty when it had not run.
            model: The committed model.
            context: The context.
        """

    def statistics(self) -> Statistics | None:
        """Returns what it did, or None when it has not run."""
        return None
