"""`create_compressed_model`: the whole lifecycle on one page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from compress_core.accuracy_aware import check_accuracy_aware
from compress_core.config import CompressionConfig
from compress_core.contract.context import Context
from compress_core.data.calibration import (
    AutoQPrecisionInitArgs,
    BNAdaptationInitArgs,
    ForwardFn,
    InitArgs,
    LeGRInitArgs,
    ModelEvaluationArgs,
    QuantizationPrecisionInitArgs,
    QuantizationRangeInitArgs,
)
from compress_core.data.examples import examples_of
from compress_core.data.ranks import settle, together
from compress_core.errors import ModelError, UsageError
from compress_core.registry import default_registry
from compress_core.session.agreement import agree, refuse_sharded, same_start
from compress_core.session.compression_plan import CompressionPlan
from compress_core.session.controller import CompressionController
from compress_core.session.finite import check_finite
from compress_core.session.guard import ModelGuard, all_or_nothing
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.planning import make_plan
from compress_core.session.state import SavedState, check_plan, checked_state
from compress_core.session.uncompressed import UncompressedModel
from compress_core.transforms.model_wide import await_checkpoint, has_transforms
from compress_core.transforms.weight import recompute_weights

logger = logging.getLogger(__name__)


def create_compressed_model(
    model: nn.Module,
    config: CompressionConfig | Mapping[str, Any] | str | Path,
    compression_state: Mapping[str, Any] | None = None,
    *,
    init_loader: Any = None,
    uncompressed_model: nn.Module | None = None,
    observers: Iterable[object] = (),
    example_inputs: Any = None,
) -> tuple[CompressionController, nn.Module]:
    """Prepares a model for training with compression, in place.

    The model stays the same object with the same parameter names, and can be copied, pickled, compiled and exported.
    If anything fails, Ctrl-C included, the model is restored exactly.

    Args:
        model: The model, with the weights that compression starts from.
        config: A config, a dict, or the path of a JSON file.
        compression_state: What `controller.get_compression_state()` returned; builds the same structure without data.
            Load the `state_dict` of the compressed model afterwards, because it holds the masks.
        init_loader: Batches for initialization, unless they were registered with the config; `BNAdaptationInitArgs`
            describes the formats.
        uncompressed_model: The model with its trained weights, for algorithms that need it in training (a teacher). It
            is required when a compression state is resumed; otherwise it defaults to `model` itself. It is copied.
        observers: Plugin objects that are active for this model alone and see the hooks of every algorithm.
        example_inputs: Inputs of the model for tracing it, instead of `input_info`: a tensor, a tuple of arguments, or
            a dict of keyword arguments, on the model's device.

    Returns:
        The controller, and the model that was given.

    Raises:
        ConfigError: The config is wrong, or a value in it can have no effect on this model.
        DataError: Data is needed but missing or unusable.
        ModelError: The model cannot be compressed as it is.
        PluginError: A plugin breaks the contract.
        RankError: Another process of a distributed training failed, or processes differ in config, weights or plan.
        StateError: `compression_state` does not fit.
        UsageError: A compression state is resumed, and an algorithm needs `uncompressed_model`, which was not given.
    """
    with together("create_compressed_model"):
        _check_model(model)
        config = CompressionConfig.load(config)
        registry = default_registry()
        resuming = compression_state is not None
        example = None if example_inputs is None else examples_of(example_inputs)[0]
        context = Context(config, init_loader=init_loader, resuming=resuming, example=example)
        lifecycle = Lifecycle(registry, context, observers)
        if not lifecycle.algorithms:
            logger.warning("the config names no algorithm in 'compression': the model stays uncompressed")
        lifecycle.configure()
        check_accuracy_aware(lifecycle.context, lifecycle.algorithms)
        uncompressed = UncompressedModel(lifecycle, uncompressed_model)
        with same_start(model, lifecycle, compression_state):
            if compression_state is not None:
                state = checked_state(compression_state, lifecycle, registry)
                with all_or_nothing(model, lifecycle) as guard:
                    controller = _resume(model, lifecycle, uncompressed, guard, state)
                    settle()
                    return controller, model
            lifecycle.check_initializers()
            with all_or_nothing(model, lifecycle) as guard:
                controller = _create(model, lifecycle, uncompressed, guard)
                settle()
                return controller, model


def _create(
    model: nn.Module, lifecycle: Lifecycle, uncompressed: UncompressedModel, guard: ModelGuard
) -> CompressionController:
    """Compresses a model stage by stage, then runs all calibrations and initializers."""
    controller = CompressionController(model, lifecycle, uncompressed)
    for number, group in enumerate(lifecycle.pipeline()):
        for algorithm in group:
            with guard.read_only("compress_plan", algorithm):
                lifecycle.plan(model, algorithm)
        if number == 0:
            with guard.without_traces():
                lifecycle.observe(model)
            uncompressed.before_commit(model)
        for algorithm in group:
            with guard.transforms_only("compress_commit", algorithm):
                lifecycle.commit(model, algorithm)
    lifecycle.context.kept_trace.close()
    recompute_weights(model, lifecycle.context.config.root.recompute_weights)
    for algorithm in lifecycle.algorithms:
        with guard.transforms_only("compress_calibrate", algorithm):
            lifecycle.calibrate(model, algorithm)
    guard.close()
    lifecycle.close_ledger()
    with guard.without_traces():
        lifecycle.initialize(model)
        check_finite(model, lifecycle.context)
    agree(model, lifecycle)
    uncompressed.end_of_creation()
    controller.created()
    return controller


def _resume(
    model: nn.Module, lifecycle: Lifecycle, uncompressed: UncompressedModel, guard: ModelGuard, state: SavedState
) -> CompressionController:
    """Builds the structure that a state describes, without data; the user then loads the `state_dict`."""
    lifecycle.context.saved_plans = state.plans()
    controller = CompressionController(model, lifecycle, uncompressed)
    for number, group in enumerate(lifecycle.pipeline()):
        for algorithm in group:
            with guard.read_only("compress_plan", algorithm):
                lifecycle.plan(model, algorithm)
            check_plan(state, algorithm.name, lifecycle.plans[algorithm.name])
        if number == 0:
            uncompressed.before_commit(model)
        for algorithm in group:
            with guard.transforms_only("compress_commit", algorithm):
                lifecycle.commit(model, algorithm)
    recompute_weights(model, lifecycle.context.config.root.recompute_weights)
    await_checkpoint(model)
    controller.resume(state)
    lifecycle.load_state(model, {name: entry.state for name, entry in state.algorithms.items()})
    lifecycle.load_initializers(model, state.initializers)
    lifecycle.close_ledger()
    uncompressed.end_of_creation()
    controller.created()
    return controller


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        _refuse_wrapped(name, module)
    refuse_sharded(model)
    if torch.is_inference_mode_enabled():
        raise ModelError("create_compressed_model was called within torch.inference_mode(); call it outside")
    if has_transforms(model):
        raise ModelError(
            "the model is compressed already. Put all algorithms into one config; to start over, use the model that "
            "controller.strip() returns, or a new one"
        )


def _refuse_wrapped(name: str, module: nn.Module) -> None:
    who = f"the module '{name}'" if name else "the model"
    inner = "give the model without the wrapper" if name else "call create_compressed_model(model.module, ...)"
    if isinstance(module, DistributedDataParallel):
        raise ModelError(f"{who} is wrapped in DistributedDataParallel; {inner} and wrap the result")
    if isinstance(module, DataParallel):
        raise ModelError(
            f"{who} is wrapped in DataParallel, whose copies of it are not compressed with it; {inner} and train with "
            "one process for each GPU: DistributedDataParallel and torchrun"
        )


def register_default_init_args(
    config: CompressionConfig | Mapping[str, Any] | str | Path,
    train_loader: Any,
    *,
    device: torch.device | str | None = None,
    forward_fn: ForwardFn | None = None,
    model_eval_fn: Callable[[nn.Module], Any] | None = None,
    criterion: Any = None,
    criterion_fn: Callable[[Any, Any, Any], Any] | None = None,
    autoq_eval_fn: Callable[[nn.Module, Any], Any] | None = None,
    val_loader: Any = None,
    train_steps_fn: Callable[[Any, nn.Module, torch.optim.Optimizer, Any, int], Any] | None = None,
    validate_fn: Callable[[nn.Module, Any], Any] | None = None,
    legr_train_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> CompressionConfig:
    """Attaches data, losses and metrics for initialization and searches to a config.

    Args:
        config: A config, a dict, or the path of a JSON file. A `CompressionConfig` is changed in place.
        train_loader: Batches, usually the training loader; see `BNAdaptationInitArgs`.
        device: Device that batches are moved to; by default that of the model.
        forward_fn: `forward_fn(model, batch)`, for models that cannot be called with a batch directly.
        model_eval_fn: The metric for `"guard": true`; takes the model and returns a number, larger is better.
        criterion: The loss for `hawq`, `criterion(outputs, target)`; without it no labels are needed.
        criterion_fn: `criterion_fn(outputs, target, criterion)`, if the criterion is called in another way.
        autoq_eval_fn: The metric for `autoq`, `autoq_eval_fn(model, loader)`; larger is better.
        val_loader: The loader that `autoq_eval_fn` and `validate_fn` get; for the first by default `train_loader`.
        train_steps_fn: `train_steps_fn(loader, model, optimizer, controller, steps)`, for searches that train their
            candidates (`learned_ranking`); with `val_loader` and `validate_fn`.
        validate_fn: `validate_fn(model, loader)`, returns accuracy and loss, for searches that measure candidates.
        legr_train_optimizer: Takes parameters and returns the optimizer that `train_steps_fn` gets; by default SGD.

    Raises:
        UsageError: One of the last three arguments lacks another one.

    Returns:
        The config. Calling the function again replaces the data.
    """
    searches = _functions_for_searches(train_loader, train_steps_fn, legr_train_optimizer, val_loader, validate_fn)
    if not searches and val_loader is not None and autoq_eval_fn is None:
        raise UsageError("val_loader: is for validate_fn or autoq_eval_fn, and validate_fn is missing")
    loaded = CompressionConfig.load(config)
    kinds: tuple[type[InitArgs], ...] = (BNAdaptationInitArgs, QuantizationRangeInitArgs)
    loaded.register_extra_structs([kind(train_loader, device, forward_fn) for kind in kinds])
    loss = QuantizationPrecisionInitArgs(train_loader, device, forward_fn, criterion, criterion_fn)
    metric = AutoQPrecisionInitArgs(
        train_loader if val_loader is None else val_loader, device, forward_fn, autoq_eval_fn
    )
    loaded.register_extra_structs([loss, metric])
    loaded.register_extra_structs(searches)
    return loaded.register_extra_structs([] if model_eval_fn is None else [ModelEvaluationArgs(model_eval_fn)])


def _functions_for_searches(
    train_loader: Any, train_steps_fn: Any, legr_train_optimizer: Any, val_loader: Any, validate_fn: Any
) -> list[LeGRInitArgs]:
    given = {
        "train_steps_fn": train_steps_fn,
        "legr_train_optimizer": legr_train_optimizer,
        "validate_fn": validate_fn,
        "val_loader": val_loader,
    }
    if all(value is None for name, value in given.items() if name != "val_loader"):
        return []
    named = [name for name, value in given.items() if value is not None]
    missing = [name for name in ("validate_fn", "val_loader") if name not in named]
    if missing:
        raise UsageError(
            f"{named[0]}: candidates of a search are measured with validate_fn(model, val_loader), and "
            f"{' and '.join(missing)} is missing"
        )
    if legr_train_optimizer is not None and train_steps_fn is None:
        raise UsageError("legr_train_optimizer: is of no use without train_steps_fn; give both, or neither")
    for name in ("train_steps_fn", "legr_train_optimizer", "validate_fn"):
        if name in named and not callable(given[name]):
            raise UsageError(f"{name}: must be a function, got {type(given[name]).__name__}")
    return [LeGRInitArgs(train_loader, train_steps_fn, legr_train_optimizer, val_loader, validate_fn)]


def plan_compression(
    model: nn.Module, config: CompressionConfig | Mapping[str, Any] | str | Path, example_inputs: Any = None
) -> CompressionPlan:
    """Returns what `create_compressed_model` would do to a model: nothing is changed, and no data is needed.

    The algorithms plan and commit on a copy of the model, which is thrown away. Calibration, searches and corrections
    do not run, with or without data: what they will decide is named. The copy takes as much memory as the model, which
    is what `create_compressed_model` takes for its snapshot.

    Args:
        model: The model, with the weights that compression starts from.
        config: A config, a dict, or the path of a JSON file.
        example_inputs: Inputs of the model for tracing it: a tensor, a tuple of arguments, or a dict of keyword
            arguments. By default those that `input_info` of the config describes, else a batch of the data that is
            registered with the config.

    Returns:
        The plan: what each algorithm would change and leave alone, and parameters, operations and bytes before and
        after.

    Raises:
        ConfigError, DataError, ModelError, PluginError: As `create_compressed_model` would raise; `DataError` only
            where an example input is missing.
        ModelError: The model cannot be copied.

    Example:
        ```python
        plan = compress_core.plan_compression(model, "config.json", torch.rand(1, 3, 224, 224))
        print(plan)
        plan.write_html("plan.html")
        ```
    """
    _check_model(model)
    config = CompressionConfig.load(config)
    example = None if example_inputs is None else examples_of(example_inputs)[0]
    lifecycle = Lifecycle(default_registry(), Context(config, planning=True, example=example))
    lifecycle.configure()
    check_accuracy_aware(lifecycle.context, lifecycle.algorithms)
    return make_plan(model, lifecycle)


def check_config(config: CompressionConfig | Mapping[str, Any] | str | Path) -> None:
    """Checks everything about a config that can be checked without a model.

    Raises:
        ConfigError: Lists all problems with their paths and remedies.
    """
    lifecycle = Lifecycle(default_registry(), Context(CompressionConfig.load(config)))
    lifecycle.configure()
    check_accuracy_aware(lifecycle.context, lifecycle.algorithms)
