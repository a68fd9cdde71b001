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

    Each algorithm's section may contain `initializer.<name>`. All requests are merged into one instance, which runs
    once, after every algorithm has committed and calibrated. A subclass implements `compress_initialize`, and
    `compress_observe` if it has to see the uncompressed model.

    Attributes:
        name: Its key in the section `initializer`.
        Config: The class of its config section.
        struct: Type of the object of `register_extra_structs` that carries its data; None if it needs no data.
        phase: When it runs; within a phase the order is that of the names.
        needs_uncompressed: Whether it needs the uncompressed model: see `Algorithm`.
        changes_in_place: Whether it writes to the model's own parameters, instead of running statistics only. The model
            without its transforms is then no longer the uncompressed model, and whoever needs that gets a copy.
    """

    name: ClassVar[str]
    Config: ClassVar[type[InitializerConfig]]
    struct: ClassVar[type[InitArgs] | None] = None
    phase: ClassVar[Phase] = Phase.WEIGHTS
    needs_uncompressed: ClassVar[NeedsUncompressed] = "no"
    changes_in_place: ClassVar[bool] = False

    def __init__(self, config: InitializerConfig, paths: tuple[str, ...]) -> None:
        self.config = config
        self.paths = paths

    @classmethod
    def from_requests(cls, requests: Mapping[str, InitializerConfig]) -> Self | None:
        """Merges the requests of all algorithms into one initializer.

        Args:
            requests: Config path of the request -> the section; may be empty.

        Returns:
            The initializer, or None when there is nothing to do.

        Raises:
            ConfigError: The requests contradict one another. This implementation requires them to be equal.
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
        """Returns whether it needs batches."""
        return self.struct is not None

    def check(self, context: Context) -> None:
        """Raises errors that can be found before the model is changed; the core itself checks the data."""

    def load_state(self, state: Mapping[str, Any], model: nn.Module, context: Context) -> None:
        """Restores the initializer's record of its last run, on a model that is being resumed.

        Args:
            state: `statistics().to_dict()` as it was saved; empty if the initializer had not run.
            model: The committed model.
            context: The context.
        """

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Runs the initializer again on the current model; called by `controller.initialize`.

        This implementation calls `compress_initialize`. A subclass that takes options overrides it.

        Args:
            model: The compressed model.
            context: The context.
            loader: Batches that take precedence over those given before.
            options: Further options of the user.

        Raises:
            UsageError: There are options, but this initializer takes none.
        """
        if options:
            raise UsageError(f"'{self.name}' takes no options, got {', '.join(options)}")
        hook: Any = getattr(self, "compress_initialize")  # noqa: B009 - subclasses have it, with the arguments they use
        arguments = {"model": model, "context": context}
        with context.reading(loader):
            hook(**{name: arguments[name] for name in inspect.signature(hook).parameters})

    def statistics(self) -> Statistics | None:
        """Returns figures about the last run, or None when it has not run."""
        return None
