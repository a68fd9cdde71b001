"""The plugin contract: which hooks a plugin can implement, when they are called, their arguments and results.

A plugin is an importable object (usually a module) named by an entry point of the group `compress_core.plugins`. It
implements registration hooks with `@compress_core.hookimpl`. The algorithms that it contributes are classes derived
from `compress_core.Algorithm`. Each section of a config gets one instance, whose methods, also marked with
`@compress_core.hookimpl`, implement the lifecycle hooks. An implementation declares only the arguments that it needs.

`create_compressed_model` calls, in this order:

1. `compress_configure` for each algorithm: the last chance to refuse a config;
2. for each stage of the pipeline: first `compress_plan` for each algorithm of the stage, which changes nothing, then
   `compress_commit` for each, the only structural change. Later stages plan on the model that earlier ones changed;
3. `compress_observe` before the first commit, for initializers that have to see the uncompressed model;
4. `compress_calibrate` for each algorithm, after all have committed;
5. `compress_initialize` once for each shared initializer, such as batch-norm adaptation;
6. `compress_load_state` instead of 3, 4 and 5 when a compression state is resumed.

"For each algorithm" means in pipeline order: by `Algorithm.stage`, then by the order in the config. Within a stage,
algorithms that replace modules come first, and each of them commits before the next one plans. An exception from an
implementation keeps its type and gets a note that names hook, algorithm and plugin; the model is restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy
import torch
from torch import nn

if TYPE_CHECKING:
    from compress_core.channels.shrinking import Shrinkage
    from compress_core.config import AlgorithmConfig
    from compress_core.contract.algorithm import Algorithm, Plan
    from compress_core.contract.batch import Batch
    from compress_core.contract.choices import Choice, ChoicePoint
    from compress_core.contract.clock import Clock
    from compress_core.contract.context import Context
    from compress_core.contract.footprint import Footprint
    from compress_core.contract.initializer import Initializer
    from compress_core.contract.stages import CompressionStage
    from compress_core.contract.statistics import Statistics
    from compress_core.export.target import ExportTarget, GraphRewrite
    from compress_core.pages import Block

PROJECT = "compress_core"
ENTRY_POINT_GROUP = "compress_core.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Registration: implemented by the plugin itself.


@hookspec
def compress_algorithms() -> Iterable[type[Algorithm]]:  # type: ignore[empty-body]
    """Returns the algorithms that this plugin contributes.

    Called once, when the plugin is loaded. Names are global: if two installed plugins contribute the same name, a
    config that uses it is refused.

    Example:
        ```python
        @hookimpl
        def compress_algorithms():
            return [RandomSparsity]
        ```
    """


@hookspec
def compress_initializers() -> Iterable[type[Initializer]]:  # type: ignore[empty-body]
    """Returns the shared initializers that this plugin contributes.

    Called once, when the plugin is loaded. Every algorithm's section then accepts `initializer.<name>`; all requests
    for one initializer are merged, and it runs once for all of them.

    Example:
        ```python
        @hookimpl
        def compress_initializers():
            return [BatchNormAdaptation]
        ```
    """


@hookspec
def compress_choices() -> Iterable[Choice]:  # type: ignore[empty-body]
    """Returns named values that this plugin adds to choice points, such as a filter importance or a level schedule.

    `compress-core choices` lists the points and the installed values. Names are unique within a point: a plugin that
    contributes a name that is taken is not loaded, so it cannot silently override a value. A choice for a point that
    nobody declares waits for it: the plugin works without the one that the point belongs to.

    Example:
        ```python
        @hookimpl
        def compress_choices():
            return [Choice("level_schedule", "cosine", cosine_schedule)]
        ```
    """


@hookspec
def compress_choice_points() -> Iterable[ChoicePoint]:  # type: ignore[empty-body]
    """Returns the choice points that this plugin declares, for other plugins to add to.

    Example:
        ```python
        @hookimpl
        def compress_choice_points():
            return [ChoicePoint("my_method.score", "function (weight) -> score of each element", callable_choice)]
        ```
    """


# Lifecycle: implemented by algorithm instances (and initializers, where it says so).


@hookspec
def compress_configure(algorithm: Algorithm, config: AlgorithmConfig, context: Context) -> None:
    """Checks what the schema cannot, for example values that contradict one another or another section.

    Called before all other lifecycle hooks, and by `compress-core check`, in both cases without a model.

    Args:
        algorithm: The algorithm that is configured.
        config: Its section.
        context: The context: the whole config, the data, the ledger.

    Raises:
        ConfigError: With the path below the section, e.g. `ConfigError("...", path="params.multistep_steps")`; the
            core puts the section's own path before it.

    Example:
        ```python
        @hookimpl
        def compress_configure(self, config):
            if config.first > config.last:
                raise ConfigError("must not exceed 'last'", path="first")
        ```
    """


@hookspec
def compress_plan(model: nn.Module, algorithm: Algorithm, context: Context) -> Plan:  # type: ignore[empty-body]
    """Returns what the algorithm will change, and why it skips the rest. Required.

    Called before any algorithm of its stage has changed anything; must not change the model. A plan without a target
    is reported to the user as an error, unless the algorithm declares `changes_model = False`.

    Args:
        model: The model after all earlier stages.
        algorithm: The algorithm that plans.
        context: The context. `context.plan_weights(model, self)` applies the scopes and is enough for most algorithms.

    Returns:
        The plan, JSON-able. It is saved in the compression state and compared with the new plan on resuming.

    Raises:
        ConfigError: With the path below the section, as in `compress_configure`.

    Example:
        ```python
        @hookimpl
        def compress_plan(self, model, context):
            return context.plan_weights(model, self)
        ```
    """


@hookspec
def compress_observe(model: nn.Module, context: Context) -> None:
    """For initializers: sees the uncompressed model, before the first commit.

    Args:
        model: The uncompressed model; must not be changed.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_observe(self, model):
            self.trained = {name: bn.running_mean.clone() for name, bn in batch_norms(model)}
        ```
    """


@hookspec
def compress_commit(model: nn.Module, algorithm: Algorithm, plan: Plan, context: Context) -> None:
    """Changes the model: adds transforms, applies initial levels. Required.

    Called once, in pipeline order, after every algorithm of its stage has planned. Changes should be transforms
    (`compress_core.mask_weight`, `compress_core.transforms`). An algorithm that writes to weights must declare
    `changes_in_place = True`, one that replaces modules `replaces_modules = True`; otherwise it is refused. Transforms
    that earlier algorithms added must stay.

    Args:
        model: The model after the commits of all earlier algorithms.
        algorithm: The algorithm that commits.
        plan: Its plan.
        context: The context; `context.resuming` tells whether a compression state is being resumed.

    Example:
        ```python
        @hookimpl
        def compress_commit(self, model, plan):
            for name in plan.targets:
                mask_weight(model, name, self.mask_of(raw_parameter(model, name)), key=self.name)
        ```
    """


@hookspec
def compress_effect(  # type: ignore[empty-body]
    model: nn.Module, algorithm: Algorithm, footprint: Footprint, at_end: bool, context: Context
) -> Footprint:
    """Says what the algorithm means for the size of the model; optional.

    Called by `plan_compression`, on the committed copy of the model, in pipeline order. A plan names an algorithm
    without this hook as one that says nothing of its effect on size; for one that declares `replaces_modules = True`,
    the model is counted after its commit.

    Args:
        model: The model, after the commit.
        algorithm: The algorithm.
        footprint: What the algorithms before have left: the parameters with their shapes, zeros and bits.
        at_end: Whether the end of the schedule is asked for; otherwise the algorithm as it is now.
        context: The context.

    Returns:
        The footprint with the effect: `with_shapes`, `with_levels`, `with_bits`. What data or training will decide is
        `left_open`, with the reason.

    Example:
        ```python
        @hookimpl
        def compress_effect(self, footprint, at_end):
            level = self.config.target if at_end else self.level
            return footprint.with_levels(dict.fromkeys(self.targets, level))
        ```
    """


@hookspec
def compress_calibrate(model: nn.Module, algorithm: Algorithm, context: Context) -> None:
    """Computes the algorithm's values from data, on the committed model.

    Called once, in pipeline order, after every algorithm has committed, with the model in eval mode and without
    gradients. Not called when a state is resumed.

    Args:
        model: The committed model.
        algorithm: The algorithm that calibrates.
        context: The context. `context.calibration_data(path)` returns the batches or raises an error that names `path`.

    Example:
        ```python
        @hookimpl
        def compress_calibrate(self, model, context):
            path, _ = context.section(self)
            data = context.calibration_data(path)
            for batch, size in data.batches(256, "largest activations"):  # what the progress bar says
                data.call(model, batch)
        ```
    """


@hookspec
def compress_initialize(model: nn.Module, context: Context) -> None:
    """For initializers: runs once on the calibrated model, and again when the user asks for it.

    The model is in eval mode, and no gradients are recorded.

    Args:
        model: The compressed model, after all algorithms have committed and calibrated.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_initialize(self, model):
            self.warm_up(model, self.config.steps)
        ```
    """


@hookspec
def compress_shrunk(model: nn.Module, algorithm: Algorithm, shrinkage: Shrinkage, context: Context) -> None:
    """Updates the algorithm after channels were removed and tensors of the model became smaller.

    Called for each algorithm after `strip` (where `model` is usually a copy) and `shrink`, and when a state of a shrunk
    model is resumed. Transforms have been sliced already, as they declare. The algorithm corrects whatever else it
    stores that depends on sizes or indices.

    Args:
        model: The smaller model.
        algorithm: The algorithm.
        shrinkage: Which indices of which tensors stay.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_shrunk(self, model, shrinkage):
            for name in self.targets:
                if name in shrinkage.kept:
                    self.renew_mask(model, name)
        ```
    """


@hookspec
def compress_step(model: nn.Module, algorithm: Algorithm, clock: Clock, context: Context) -> None:
    """Called when the training loop begins an optimizer step (`controller.scheduler.step()`).

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        clock: The epoch, and the step that begins now.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_step(self, model, clock):
            self.set_level(model, self.level_at(clock.epoch, clock.step_in_epoch))
        ```
    """


@hookspec
def compress_epoch_step(model: nn.Module, algorithm: Algorithm, clock: Clock, context: Context) -> None:
    """Called when the training loop begins an epoch (`controller.scheduler.epoch_step()`).

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        clock: The epoch that begins now; its first step has not begun.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_epoch_step(self, model, clock):
            self.set_level(model, self.level_at(clock.epoch))
        ```
    """


@hookspec
def compress_loss(model: nn.Module, algorithm: Algorithm, batch: Batch | None, context: Context) -> torch.Tensor | None:
    """Returns the term that the algorithm adds to the task's loss, a differentiable scalar, or None.

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        batch: Arguments and outputs of the last forward in training mode, for algorithms that declare
            `needs_batch = True`; None for the others. It holds what modules inside of the model have returned, too,
            if the algorithm has called `context.record_outputs` for them in `compress_commit`.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_loss(self, model):
            return self.config.weight * sum(gate.abs().sum() for gate in self.gates)
        ```
    """


@hookspec
def compress_statistics(model: nn.Module, algorithm: Algorithm, context: Context) -> Statistics:  # type: ignore[empty-body]
    """Returns figures measured on the current model, such as the level reached rather than the level requested.

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_statistics(self, model):
            return TableStatistics({"zeros": self.count_zeros(model)}, title="Random sparsity")
        ```
    """


@hookspec
def compress_report(model: nn.Module, algorithm: Algorithm, context: Context) -> Sequence[Block]:  # type: ignore[empty-body]
    """Returns what a report shows beside the statistics and what has to be measured for it, such as histograms.

    Called by `controller.report` with a copy of the model, and for a copy of the algorithm, in eval mode and without
    gradients. Both are thrown away afterwards, so nothing has to be put back. What needs no measuring belongs to
    `Statistics.blocks`.

    Args:
        model: The copy of the compressed model.
        algorithm: The copy of the algorithm.
        context: The context of the copies. `context.report_data(path)` returns batches, or None.

    Returns:
        Blocks of `compress_core.pages`.

    Example:
        ```python
        @hookimpl
        def compress_report(self, model):
            return [Grid("Norms", ("weight", "norm"), [(name, float(w.norm())) for name, w in weights(model)])]
        ```
    """


@hookspec
def compress_stage(model: nn.Module, algorithm: Algorithm, context: Context) -> CompressionStage:  # type: ignore[empty-body]
    """Returns the progress of this algorithm; an algorithm without this hook counts as fully compressed.

    Not called for algorithms that declare `changes_model = False`: the stage is that of the others.

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_stage(self):
            done = self.level >= self.config.target
            return CompressionStage.FULLY_COMPRESSED if done else CompressionStage.PARTIALLY_COMPRESSED
        ```
    """


@hookspec
def compress_state(model: nn.Module, algorithm: Algorithm, context: Context) -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Returns the part of the algorithm's state that is not in the model's `state_dict`, JSON-able.

    Keep tensors as buffers or parameters of transforms, so that the model's own `state_dict` saves them.

    Args:
        model: The compressed model.
        algorithm: The algorithm.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_state(self):
            return {"level": self.level}
        ```
    """


@hookspec
def compress_load_state(model: nn.Module, algorithm: Algorithm, state: Mapping[str, Any], context: Context) -> None:
    """Restores the state that `compress_state` returned; called on the committed model instead of calibration.

    Args:
        model: The committed model; the user loads its `state_dict`, usually afterwards.
        algorithm: The algorithm.
        state: What `compress_state` returned, after a round trip through JSON.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_load_state(self, state):
            self.level = state["level"]
        ```
    """


@hookspec
def compress_strip(model: nn.Module, algorithm: Algorithm, context: Context) -> None:
    """Bakes the algorithm's changes into a plain model and removes its helpers.

    Called in reverse pipeline order by `controller.strip()`, usually on a copy. Afterwards the core bakes the weight
    transforms that are left, so an algorithm that only masks needs no implementation.

    Args:
        model: The model to strip.
        algorithm: The algorithm.
        context: The context.

    Example:
        ```python
        @hookimpl
        def compress_strip(self, model):
            for name in self.targets:
                replace_by_standard_operators(model, name)
        ```
    """


@hookspec
def compress_export(
    model: nn.Module, algorithm: Algorithm, context: Context, target: ExportTarget
) -> GraphRewrite | None:
    """Prepares a copy of the model for an export: replaces helpers by operators that the format has.

    Called in pipeline order by `controller.export_onnx()`, on a copy in eval mode on the CPU, so masks and pruned
    filters are final before quantization is exported. For an algorithm without this hook, `compress_strip` is called
    instead. Afterwards the core bakes the weight transforms that are left. Before the file is written, the core checks
    that it computes the same as the compressed model.

    Args:
        model: The copy; it is discarded after the export.
        algorithm: The algorithm.
        context: The context.
        target: The format and its version.

    Returns:
        None, or a function that changes the exported graph in place (for the format `onnx` an `onnx_ir.Model`, for
        `executorch` a `torch.fx.GraphModule` with functional ATen operators). These functions are called in pipeline
        order before the graph is checked.

    Example:
        ```python
        @hookimpl
        def compress_export(self, model, target):
            for name in self.targets:
                replace_by_symbolic_operator(model, name, target.opset)
            return fold_scales
        ```
    """
