"""The hooks of one model, a typed method each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress_core.channels.shrinking import Shrinkage
from compress_core.config import AlgorithmConfig
from compress_core.config.scopes import is_of_document
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.batch import Batch
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.initializer import Initializer
from compress_core.contract.stages import CompressionStage
from compress_core.contract.statistics import Statistics
from compress_core.errors import ConfigError, PluginError, Problem, UsageError
from compress_core.export.target import ExportTarget, GraphRewrite
from compress_core.pages import Block
from compress_core.registry import Registry
from compress_core.session.hook_calls import HookCalls
from compress_core.session.learning_rates import apply_multiplier
from compress_core.transforms.model_wide import evaluating, transforms_by_key


class Lifecycle(HookCalls):
    """Calls the hooks of one model's algorithms in pipeline order, and names the algorithm in every error.

    Args:
        registry: The installed plugins.
        context: The context that the hooks get.
        observers: Further plugin objects that are active for this model alone; they see every algorithm's calls.

    Raises:
        ConfigError: An algorithm of the config is not installed.
        PluginError: An observer breaks the contract.
    """

    def __init__(self, registry: Registry, context: Context, observers: Iterable[object] = ()) -> None:
        super().__init__(context, observers)
        self.plans: dict[str, Plan] = {}
        self._removing = False
        # Stable: within a stage the user's order counts.
        self.algorithms = sorted(self._instances(registry), key=_position)
        found = sorted(self._shared_initializers(registry), key=lambda item: (item[1].phase, item[0]))
        self.initializers = dict(found)
        self.context.bypassable = not (
            any(a.changes_in_place or a.replaces_modules for a in self.algorithms)
            or any(initializer.changes_in_place for initializer in self.initializers.values())
        )
        self.context.announce_shrinkage = self.shrunk

    def _instances(self, registry: Registry) -> Iterator[Algorithm]:
        problems = []
        for index, section in enumerate(self.context.sections):
            if not isinstance(section, AlgorithmConfig):
                # The config may have been read before the plugin was installed.
                problems.append(
                    Problem(f"{self.context.config.section_path(index)}.algorithm", section.problem.message)
                )
                continue
            contribution = registry.algorithm(section.algorithm)
            self.origins[section.algorithm] = contribution.plugin
            with self._attributed("__init__", section.algorithm):
                algorithm = contribution.cls(section)
                algorithm.attach(self.context)
            yield algorithm
        if problems:
            raise ConfigError(problems)

    def _shared_initializers(self, registry: Registry) -> Iterator[tuple[str, Initializer]]:
        asked = [
            name for s in self.context.sections if isinstance(s, AlgorithmConfig) for name in s.initializer.names()
        ]
        # Batch-norm adaptation is always included, because the controller offers it even if no section asks for it.
        for name, contribution in registry.loaded_initializers([*asked, "batchnorm_adaptation"]).items():
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
                problems.extend(self._full_path(algorithm, problem) for problem in error.problems)
        if problems:
            raise ConfigError(problems)

    def pipeline(self) -> list[list[Algorithm]]:
        """Returns the algorithms in groups: all of a group plan, then all commit, before the next group plans.

        There is at least one group; it is empty when the config names no algorithm.

        A group is a stage. An algorithm that replaces modules is a group of its own before the others of its stage,
        because their plans must refer to the new modules.
        """
        groups: list[list[Algorithm]] = []
        for algorithm in self.algorithms:
            together = groups and not algorithm.replaces_modules and not groups[-1][0].replaces_modules
            if together and groups[-1][0].stage == algorithm.stage:
                groups[-1].append(algorithm)
            else:
                groups.append([algorithm])
        return groups or [[]]

    def plan(self, model: nn.Module, algorithm: Algorithm) -> None:
        """Asks an algorithm for its plan, and keeps it."""
        algorithm.attach(self.context, model)
        try:
            plan = self._one("compress_plan", algorithm, Plan, model=model)
        except ConfigError as error:
            # What services of the context report about the document's own fields has its full path already.
            problems = [p if is_of_document(p.path) else self._full_path(algorithm, p) for p in error.problems]
            complete = ConfigError(problems)
            complete.__notes__ = error.__notes__
            raise complete from error
        if plan.targets and not algorithm.changes_model:
            raise PluginError(
                f"compress_plan() of {self.who(algorithm)} returned targets, such as '{plan.targets[0]}', and it "
                "declares changes_model = False; return Plan(()), and name in its details what the state depends on"
            )
        if not plan.targets and algorithm.changes_model:
            path, _ = self.context.section(algorithm)
            reasons = "; ".join(f"'{name}' {reason}" for name, reason in list(plan.skipped.items())[:3])
            why = f" ({len(plan.skipped)} left alone: {reasons})" if reasons else ""
            raise ConfigError(f"finds nothing to compress in this model{why}; remove this section", path=path)
        try:
            json.dumps(plan.to_dict(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"compress_plan() of {self.who(algorithm)} returned a plan that is not JSON-able ({error}): it is "
                "saved in the compression state. Keep names and numbers in it, and tensors in transforms"
            ) from error
        self.plans[algorithm.name] = plan

    def _full_path(self, algorithm: Algorithm, problem: Problem) -> Problem:
        """Returns the problem with its full config path; algorithms report paths relative to their section."""
        prefix, _ = self.context.section(algorithm)
        if f"{problem.path}.".startswith(f"{prefix}."):
            return problem
        return Problem(f"{prefix}.{problem.path}" if problem.path else prefix, problem.message)

    def observe(self, model: nn.Module) -> None:
        """Shows the uncompressed model to the initializers."""
        self._call_initializers("compress_observe", model)

    def commit(self, model: nn.Module, algorithm: Algorithm) -> None:
        """Lets an algorithm change the model.

        Raises:
            PluginError: It removed transforms that an earlier algorithm added.
        """
        before = transforms_by_key(model)
        if algorithm.changes_in_place or algorithm.replaces_modules:
            self.context.kept_trace.forget()
        self._call("compress_commit", algorithm, model=model, plan=self.plans[algorithm.name])
        self._refuse_losses("compress_commit", algorithm, before, model)
        after = transforms_by_key(model)
        added = [(name, transform) for number, (name, _, transform) in after.items() if number not in before]
        self._check_additions(algorithm, added)
        apply_multiplier(algorithm, self.context, added)

    def _check_additions(self, algorithm: Algorithm, added: list[tuple[str, nn.Module]]) -> None:
        """Refuses transforms of an algorithm that declares that it changes nothing."""
        if added and not algorithm.changes_model:
            raise PluginError(
                f"compress_commit() of {self.who(algorithm)} has added a transform at '{added[0][0]}', and the class "
                "declares changes_model = False; remove the declaration"
            )

    def _refuse_losses(
        self, hook: str, algorithm: Algorithm, before: Mapping[int, tuple[str, str, nn.Module]], model: nn.Module
    ) -> None:
        after = transforms_by_key(model)
        lost = [(name, key) for number, (name, key, _) in before.items() if number not in after]
        if lost:
            name, key = lost[0]
            raise PluginError(
                f"{hook}() of {self.who(algorithm)} has thrown away {len(lost)} transforms of earlier algorithms, such "
                f"as '{key}' at '{name}', which would go on as if they were there. Keep the tensors that have "
                "transforms, or declare replaces_modules = True and a stage before theirs"
            )

    def effect(self, model: nn.Module, algorithm: Algorithm, footprint: Footprint, *, at_end: bool) -> Footprint | None:
        """Returns the footprint after an algorithm, as it is now or at the end; None if it says nothing of it."""
        found: Footprint | None = self._optional(
            "compress_effect", algorithm, Footprint, model=model, footprint=footprint, at_end=at_end
        )
        return found

    def calibrate(self, model: nn.Module, algorithm: Algorithm) -> None:
        """Lets an algorithm compute its values from data."""
        before = transforms_by_key(model)
        with evaluating(model):
            self._call("compress_calibrate", algorithm, model=model)
        self._refuse_losses("compress_calibrate", algorithm, before, model)

    def close_ledger(self) -> None:
        """Records the effect of each value of the config, and refuses values that were never read."""
        root = self.context.config.root
        for algorithm in self.algorithms:
            path, config = self.context.section(algorithm)
            self.context.ledger.close_section(
                path,
                config,
                self.plans[algorithm.name].targets,
                read_later=algorithm.reads_later,
                strict=root.unused_values == "error",
            )
        self.context.ledger.close_root(root)

    def close_planned_ledger(self) -> None:
        """Does what `close_ledger` does, for algorithms that have not calibrated."""
        root = self.context.config.root
        for algorithm in self.algorithms:
            path, config = self.context.section(algorithm)
            plan = self.plans.get(algorithm.name)
            self.context.ledger.close_planned_section(
                path,
                config,
                () if plan is None else plan.targets,
                read_later=algorithm.reads_later,
                calibrates=plan is None or self.implements("compress_calibrate", algorithm),
                strict=root.unused_values == "error",
            )
        self.context.ledger.close_root(root)

    def initialize(self, model: nn.Module) -> None:
        """Runs the shared initializers, once."""
        with evaluating(model):
            self._call_initializers("compress_initialize", model)

    def step(self, model: nn.Module, clock: Clock) -> None:
        """Begins an optimizer step."""
        for algorithm in self.algorithms:
            self._call("compress_step", algorithm, model=model, clock=clock)

    def epoch_step(self, model: nn.Module, clock: Clock) -> None:
        """Begins an epoch."""
        for algorithm in self.algorithms:
            self._call("compress_epoch_step", algorithm, model=model, clock=clock)

    def losses(self, model: nn.Module, batch: Batch | None) -> list[torch.Tensor]:
        """Returns the terms that the algorithms add to the loss, each of shape ().

        Args:
            model: The model.
            batch: The last forward in training, if it was recorded.

        Raises:
            UsageError: An algorithm needs a forward, and there has been none.
            PluginError: An algorithm returned something other than a scalar.
        """
        found = []
        for algorithm in self.algorithms:
            if algorithm.needs_batch and batch is None:
                raise UsageError(
                    f"the loss of '{algorithm.name}' needs a forward of the model in training mode, with gradients, "
                    "and there has been none; call the model first, or pass its outputs and inputs: "
                    "controller.loss(outputs, *inputs)"
                )
            given = batch if algorithm.needs_batch else None
            loss = self._optional("compress_loss", algorithm, torch.Tensor, model=model, batch=given)
            if loss is None:
                continue
            if loss.numel() != 1 or not loss.is_floating_point():
                raise PluginError(
                    f"compress_loss() of {self.who(algorithm)} returned a tensor of shape {tuple(loss.shape)} and "
                    f"{loss.dtype}, not a floating-point scalar; reduce it, for example with .mean()"
                )
            found.append(loss.reshape(()))
        return found

    def shrunk(self, model: nn.Module, shrinkage: Shrinkage) -> None:
        """Tells every algorithm that tensors have become smaller."""
        if self._removing:
            self.context.removed_so_far = self.context.removed_so_far.then(shrinkage)
        for algorithm in self.algorithms:
            self._call("compress_shrunk", algorithm, model=model, shrinkage=shrinkage)

    def rates(self) -> list[float]:
        """Returns the compression rate of every algorithm that has one."""
        found = []
        for algorithm in self.algorithms:
            with self._attributed("compression_rate", algorithm.name):
                rate = algorithm.compression_rate
            if rate is not None:
                found.append(rate)
        return found

    def statistics(self, model: nn.Module) -> dict[str, Statistics]:
        """Returns the statistics of every algorithm that provides them."""
        found = {a.name: self._optional("compress_statistics", a, Statistics, model=model) for a in self.algorithms}
        return {name: statistics for name, statistics in found.items() if statistics is not None}

    def report(self, model: nn.Module) -> dict[str, Sequence[Block]]:
        """Returns what algorithms have measured for a report, by name; see `compress_report`.

        Raises:
            PluginError: An algorithm returned something other than blocks.
        """
        found = {}
        for algorithm in self.algorithms:
            with evaluating(model):
                blocks = self._optional("compress_report", algorithm, Sequence, model=model) or ()
            wrong = next((block for block in blocks if not isinstance(block, Block)), None)
            if wrong is not None:
                raise PluginError(
                    f"compress_report() of {self.who(algorithm)} returned a {type(wrong).__name__} among its blocks; "
                    "see compress_core.pages"
                )
            found[algorithm.name] = blocks
        return found

    def stage(self, model: nn.Module) -> CompressionStage:
        """Returns the common stage of all algorithms that change the model."""
        return CompressionStage.combine(self.stages(model).values())

    def stages(self, model: nn.Module) -> dict[str, CompressionStage]:
        """Returns the stage of every algorithm that changes the model; one that reports none is fully compressed."""
        members = [algorithm for algorithm in self.algorithms if algorithm.changes_model]
        found = {a.name: self._optional("compress_stage", a, CompressionStage, model=model) for a in members}
        return {name: CompressionStage.FULLY_COMPRESSED if s is None else s for name, s in found.items()}

    def state(self, model: nn.Module) -> dict[str, Mapping[str, Any]]:
        """Returns the state of every algorithm."""
        return {a.name: self._optional("compress_state", a, Mapping, model=model) or {} for a in self.algorithms}

    def load_state(self, model: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores the state of every algorithm that has one here."""
        for algorithm in self.algorithms:
            if algorithm.name in states:
                self._call("compress_load_state", algorithm, model=model, state=states[algorithm.name])

    def strip(self, model: nn.Module) -> None:
        """Lets the algorithms bake their changes, in reverse pipeline order."""
        with self._stripping():
            for algorithm in reversed(self.algorithms):
                self._call("compress_strip", algorithm, model=model)

    @contextlib.contextmanager
    def _stripping(self) -> Iterator[None]:
        """Context manager in which the context knows what the algorithms have removed from one model."""
        self._removing, self.context.removed_so_far = True, Shrinkage()
        try:
            yield
        finally:
            self._removing, self.context.removed_so_far = False, Shrinkage()

    def export(self, model: nn.Module, target: ExportTarget) -> list[GraphRewrite]:
        """Lets the algorithms prepare a copy of the model for an export, in pipeline order.

        For algorithms that do not implement `compress_export`, `compress_strip` is called instead.

        Returns:
            Functions that change the exported graph, in the order in which to call them.
        """
        rewrites = []
        with self._stripping():
            for algorithm in self.algorithms:
                if not self._exports(algorithm):
                    self._call("compress_strip", algorithm, model=model)
                    continue
                rewrite = self._optional("compress_export", algorithm, Callable, model=model, target=target)
                if rewrite is not None:
                    rewrites.append(self._attributed_rewrite(rewrite, algorithm))
        return rewrites

    def strip_unexported(self, model: nn.Module) -> None:
        """Strips a copy of the model as `export` does, and leaves what the other algorithms would export as it is.

        The result computes in torch, with the sizes that the exported graph has.
        """
        with self._stripping():
            for algorithm in self.algorithms:
                if not self._exports(algorithm):
                    self._call("compress_strip", algorithm, model=model)

    def _exports(self, algorithm: Algorithm) -> bool:
        return self.implements("compress_export", algorithm)

    # Initializers.

    def check_initializers(self) -> None:
        """Checks, before the model is changed, that the initializers can run and have their data."""
        for name, initializer in self.initializers.items():
            with self._attributed("check", name):
                initializer.check(self.context)
                if initializer.struct is not None and initializer.needs_data():
                    for path in initializer.paths:
                        self.context.calibration_data(path, initializer.struct)

    def initializer_statistics(self) -> dict[str, Statistics]:
        """Returns the statistics of the initializers that have run, by name."""
        found = {}
        for name, initializer in self.initializers.items():
            with self._attributed("statistics", name):
                statistics = initializer.statistics()
            if statistics is not None:
                found[name] = statistics
        return found

    def load_initializers(self, model: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores the state of every initializer."""
        for name, initializer in self.initializers.items():
            with self._attributed("load_state", name):
                initializer.load_state(states.get(name, {}), model, self.context)

    def run_again(self, name: str, model: nn.Module, loader: Any, options: Mapping[str, Any]) -> None:
        """Runs one initializer again, for `controller.initialize`.

        Raises:
            UsageError: The config does not ask for this initializer.
        """
        initializer = self.initializers.get(name)
        if initializer is None:
            raise UsageError(f"there is no initializer '{name}' in this config; it has {list(self.initializers)}")
        with self._attributed("run_again", name), evaluating(model):
            initializer.run_again(model, self.context, loader, **options)

    def _attributed_rewrite(self, rewrite: GraphRewrite, algorithm: Algorithm) -> GraphRewrite:
        def attributed(graph: Any) -> None:
            with self._attributed("the rewrite of compress_export", algorithm.name):
                rewrite(graph)

        return attributed


def _position(algorithm: Algorithm) -> tuple[int, bool]:
    return algorithm.stage, not algorithm.replaces_modules
