"""The base class of shared initializers."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from compress_core.config.sections import InitializerConfig
from compress_core.contract.algorithm import NeedsUncompressed
from compress_core.contract.statistics import Statistics
from compress_core.data.calibration import InitArgs
from compress_core.errors import ConfigError, Problem, UsageError

if TYPE_CHECKING:
    from compress_core.contract.context import Context


class Phase(enum.IntEnum):
    """When a shared initializer runs: what changes weights comes before what measures statistics of the result."""

    WEIGHTS = 10
    STATISTICS = 20


class Initializer:
    """Base class of an initializer that algorithms share; one instance serves one model.

    Each algorithm's section may hold `initializer.<name>`. All requests are merged into one instance, which runs once
    after every algorithm has committed and calibrated. A subclass implements `compress_initialize`, and
    `compress_observe` if it has to see the uncompressed model.

    Attributes:
        name: The key in the section `initializer`.
        Config: The class of its section.
        struct: Type of the object of `register_extra_structs` that carries its data, if it takes any.
        phase: When it runs; within a phase the order is that of the names.
        needs_uncompressed: Whether it needs the uncompressed model: see `Algorithm`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[InitializerConfig]]
    struct: ClassVar[type[InitArgs] | None] = None
    phase: ClassVar[Phase] = Phase.WEIGHTS
    needs_uncompressed: ClassVar[NeedsUncompressed] = "no"

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

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Runs once more, on the model as it is now, because the user asks for it (`controller.initialize`).

        Here: calls `compress_initialize`. A subclass that takes options overrides this.

        Args:
            model: The compressed model.
            context: The context.
            loader: Batches that take precedence over those that were given before.
            options: What the user gives besides.

        Raises:
            UsageError: There are options, and this initializer takes none.
        """
        if options:
            raise UsageError(f"'{self.name}' takes no options, got {', '.join(options)}")
        hook: Any = getattr(self, "compress_initialize")  # noqa: B009 - subclasses have it, with the arguments they need
        arguments = {"model": model, "context": context}
        with context.reading(loader):
            hook(**{name: arguments[name] for name in inspect.signature(hook).parameters})

    def statistics(self) -> Statistics | None:
        """Returns what it did, or None when it has not run."""
        return None
