"""The hooks of one model, a typed method each.

A plugin manager of its own holds the algorithm instances of the model, so that what is installed is not what is active.
Calls for one algorithm leave out all other algorithms (`subset_hook_caller`): a result or an error belongs to somebody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress_core.config import AlgorithmConfig
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.initializer import Initializer
from compress_core.contract.stages import CompressionStage
from compress_core.contract.statistics import Statistics
from compress_core.errors import ConfigError, PluginError, Problem
from compress_core.export.target import ExportTarget, GraphRewrite
from compress_core.registry import PluginInfo, Registry
from compress_core.registry.checks import check_plugin, new_manager


class Lifecycle:
    """Calls the hooks of one model's algorithms, in pipeline order, and says who is to blame.

    Args:
        registry: What is installed.
        context: What the hooks are told.
        observers: Further plugin objects that are active for this model alone; they see every algorithm's calls.

    Raises:
        ConfigError: An algorithm of the config is not installed.
        PluginError: An observer breaks the contract.
    """

    def __init__(self, registry: Registry, context: Context, observers: Iterable[object] = ()) -> None:
        self.context = context
        self.origins: dict[str, PluginInfo] = {}
        self.plans: dict[str, Plan] = {}
        self._manager = new_manager()
        if isinstance(observers, nn.Module) or not isinstance(observers, Iterable):
            raise PluginError(f"observers must be a list of plugin objects, got {type(observers).__name__}")
        self._observers = list(observers)
        for observer in self._observers:
            check_plugin(observer, f"observer {type(observer).__name__}")
            self._manager.register(observer)
        self.algorithms: list[Algorithm] = sorted(self._instances(registry), key=lambda a: a.stage)  # stable
        self.initializers: dict[str, Initializer] = dict(self._shared_initializers(registry))
        instances: list[Algorithm | Initializer] = [*self.algorithms, *self.initializers.values()]
        for instance in instances:
            self._manager.register(instance, name=instance.name)

    def _instances(self, registry: Registry) -> Iterator[Algorithm]:
        problems = []
        for index, section in enumerate(self.context.sections):
            if not isinstance(section, AlgorithmConfig):
                # The document may have been read before the plugin was installed, or never had one.
                problems.append(
                    Problem(f"{self.context.config.section_path(index)}.algorithm", section.problem.message)
                )
                continue
            contribution = registry.algorithm(section.algorithm)
            self.origins[section.algorithm] = contribution.plugin
            with self._attributed("__init__", section.algorithm):
                algorithm = contribution.cls(section)
            yield algorithm
        if problems:
            raise ConfigError(problems)

    def _shared_initializers(self, registry: Registry) -> Iterator[tuple[str, Initializer]]:
        for name, contribution in registry.initializers().items():
            requests = self.context.requests(name)
            self.origins[name] = contribution.plugin
            with self._attributed("from_requests", name):
                initializer = contribution.cls.from_requests(requests)
            if initializer is not None:
                for path, request in requests.items():
                    for leaf, value, _ in request.given_leaves(f"{path}."):
                        self.context.ledger.record(leaf, value, f"used by {name}")
                yield name, initializer

    # The hooks, in the order in which they are called.

    def configure(self) -> None:
        """Lets every algorithm check its config; all problems are reported together."""
        problems: list[Problem] = []
        for algorithm in self.algorithms:
            try:
                self._call("compress_configure", algorithm, config=algorithm.config)
            except ConfigError as error:
                prefix, _ = self.context.section(algorithm)
                problems.extend(Problem(f"{prefix}.{p.path}" if p.path else prefix, p.message) for p in error.problems)
        if problems:
            raise ConfigError(problems)

    def plan(self, model: nn.Module) -> None:
        """Collects every algorithm's plan."""
        for algorithm in self.algorithms:
            plan = self._one("compress_plan", algorithm, Plan, model=model)
            if not plan.targets:
                path, _ = self.context.section(algorithm)
                raise ConfigError("finds nothing to compress in this model; remove this section", path=path)
            self.plans[algorithm.name] = plan

    def observe(self, model: nn.Module) -> None:
        """Shows the untouched model to the initializers."""
        self._call_initializers("compress_observe", model)

    def commit(self, model: nn.Module) -> None:
        """Lets every algorithm change the model."""
        for algorithm in self.algorithms:
            self._call("compress_commit", algorithm, model=model, plan=self.plans[algorithm.name])

    def calibrate(self, model: nn.Module) -> None:
        """Lets every algorithm set itself up from data."""
        for algorithm in self.algorithms:
            self._call("compress_calibrate", algorithm, model=model)

    def initialize(self, model: nn.Module) -> None:
        """Runs the shared initializers, once."""
        self._call_initializers("compress_initialize", model)

    def step(self, model: nn.Module, clock: Clock) -> None:
        """Begins an optimizer step."""
        for algorithm in self.algorithms:
            self._call("compress_step", algorithm, model=model, clock=clock)

    def epoch_step(self, model: nn.Module, clock: Clock) -> None:
        """Begins an epoch."""
        for algorithm in self.algorithms:
            self._call("compress_epoch_step", algorithm, model=model, clock=clock)

    def losses(self, model: nn.Module) -> list[torch.Tensor]:
        """Returns the algorithms' additions to the loss."""
        results = [self._optional("compress_loss", a, torch.Tensor, model=model) for a in self.algorithms]
        return [result for result in results if result is not None]

    def statistics(self, model: nn.Module) -> dict[str, Statistics]:
        """Returns the statistics of every algorithm that has some."""
        found = {a.name: self._optional("compress_statistics", a, Statistics, model=model) for a in self.algorithms}
        return {name: statistics for name, statistics in found.items() if statistics is not None}

    def stage(self, model: nn.Module) -> CompressionStage:
        """Returns the common stage of all algorithms."""
        stages = [self._optional("compress_stage", a, CompressionStage, model=model) for a in self.algorithms]
        return CompressionStage.combine(CompressionStage.FULLY_COMPRESSED if s is None else s for s in stages)

    def state(self, model: nn.Module) -> dict[str, Mapping[str, Any]]:
        """Returns the state of every algorithm."""
        return {a.name: self._optional("compress_state", a, Mapping, model=model) or {} for a in self.algorithms}

    def load_state(self, model: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives every algorithm its state back."""
        for algorithm in self.algorithms:
            self._call("compress_load_state", algorithm, model=model, state=states[algorithm.name])

    def strip(self, model: nn.Module) -> None:
        """Lets the algorithms bake their changes, the last first."""
        for algorithm in reversed(self.algorithms):
            self._call("compress_strip", algorithm, model=model)

    def export(self, model: nn.Module, target: ExportTarget) -> list[GraphRewrite]:
        """Lets the algorithms prepare a copy of the model for an export, the first first.

        Those that say nothing about exports are stripped at their turn.

        Returns:
            What is to be done to the exported graph.
        """
        implemented = [impl.plugin for impl in self._manager.hook.compress_export.get_hookimpls()]
        rewrites = []
        for algorithm in self.algorithms:
            if not any(plugin is algorithm for plugin in implemented):
                self._call("compress_strip", algorithm, model=model)
                continue
            rewrite = self._optional("compress_export", algorithm, Callable, model=model, target=target)
            if rewrite is not None:
                rewrites.append(rewrite)
        return rewrites

    # How they are called.

    def _call(self, hook: str, algorithm: Algorithm, **arguments: Any) -> Sequence[Any]:
        others: list[object] = [other for other in self.algorithms if other is not algorithm]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        with self._attributed(hook, algorithm.name):
            result: Sequence[Any] = caller(algorithm=algorithm, context=self.context, **arguments)
        return result

    def _call_initializers(self, hook: str, model: nn.Module) -> None:
        """Calls the observers once, then one initializer after the other."""
        groups: dict[str, object] = {"an observer": None, **self.initializers}
        for name, member in groups.items():
            active = self._observers if member is None else [member]
            others = [plugin for plugin in self._manager.get_plugins() if not any(plugin is a for a in active)]
            with self._attributed(hook, name):
                self._manager.subset_hook_caller(hook, remove_plugins=others)(model=model, context=self.context)

    def _optional(self, hook: str, algorithm: Algorithm, kind: Any, **arguments: Any) -> Any:
        results = self._call(hook, algorithm, **arguments)
        who = f"{hook}() of the algorithm '{algorithm.name}' ({self.origins[algorithm.name]})"
        if len(results) > 1:
            raise PluginError(f"{who} and an observer both returned a value; an observer must return None")
        if results and not isinstance(results[0], kind):
            raise PluginError(f"{who} returned a {type(results[0]).__name__}, not a {kind.__name__}")
        return results[0] if results else None

    def _one(self, hook: str, algorithm: Algorithm, kind: type[Any], **arguments: Any) -> Any:
        result = self._optional(hook, algorithm, kind, **arguments)
        if result is None:
            raise PluginError(
                f"{hook}() of the algorithm '{algorithm.name}' returned nothing; it needs a {kind.__name__}"
            )
        return result

    @contextlib.contextmanager
    def _attributed(self, hook: str, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            origin = self.origins.get(name)
            error.add_note(f"raised in {hook}() of '{name}'" + (f", {origin}" if origin else ""))
            raise
