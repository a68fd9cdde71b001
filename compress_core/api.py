"""`create_compressed_model`: the lifecycle from top to bottom on one page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from compress_core.config import CompressionConfig
from compress_core.contract.context import Context
from compress_core.data.calibration import (
    BNAdaptationInitArgs,
    ForwardFn,
    InitArgs,
    ModelEvaluationArgs,
    QuantizationRangeInitArgs,
)
from compress_core.data.rng import RngState
from compress_core.errors import ModelError, PluginError
from compress_core.registry import default_registry
from compress_core.session.controller import CompressionController
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.state import SavedState, check_plans, checked_state
from compress_core.transforms.model_wide import has_transforms
from compress_core.transforms.snapshot import ModelSnapshot
from compress_core.transforms.weight import recompute_weights

logger = logging.getLogger(__name__)


def create_compressed_model(
    model: nn.Module,
    config: CompressionConfig | Mapping[str, Any] | str | Path,
    compression_state: Mapping[str, Any] | None = None,
    *,
    init_loader: Any = None,
    observers: Iterable[object] = (),
) -> tuple[CompressionController, nn.Module]:
    """Prepares a model for training with compression, in place.

    The model stays itself: the same object with the same parameter names, that can be copied, pickled, compiled and
    exported. If anything fails, Ctrl-C included, it is left exactly as it was.

    Args:
        model: The model, with the weights that compression starts from.
        config: A config, a dict, or the path of a JSON file.
        compression_state: What `controller.get_compression_state()` returned: builds the same structure without data.
            Load the `state_dict` of the compressed model afterwards: it holds the masks.
        init_loader: Batches for initialization (`BNAdaptationInitArgs` describes what is understood), unless they were
            registered with the config.
        observers: Plugin objects that are active for this model alone and see the hooks of every algorithm.

    Returns:
        The controller, and the model that was given.

    Raises:
        ConfigError: The config is wrong, or something in it can have no effect on this model.
        DataError: Data is asked for and missing, or unusable.
        ModelError: The model cannot be compressed as it is.
        PluginError: A plugin breaks the contract.
        StateError: `compression_state` does not fit.
    """
    _check_model(model)
    config = CompressionConfig.load(config)
    registry = default_registry()
    context = Context(config, init_loader=init_loader, resuming=compression_state is not None)
    lifecycle = Lifecycle(registry, context, observers)
    if not lifecycle.algorithms:
        logger.warning("the config names no algorithm in 'compression': the model stays uncompressed")
    lifecycle.configure()
    _check_data(lifecycle)
    state = None if compression_state is None else checked_state(compression_state, lifecycle, registry)
    if state is not None:
        context.saved_plans = state.plans()

    snapshot = ModelSnapshot(model)
    rng = RngState(context.generators())
    try:
        controller = CompressionController(model, lifecycle)
        _compress(model, lifecycle, snapshot, state, controller)
        # Whatever initialization drew: the training that follows is the one that would have followed without it.
        rng.restore()
    except BaseException:
        snapshot.restore()
        rng.restore()
        raise
    return controller, model


def _compress(
    model: nn.Module,
    lifecycle: Lifecycle,
    snapshot: ModelSnapshot,
    state: SavedState | None,
    controller: CompressionController,
) -> None:
    context = lifecycle.context
    lifecycle.plan(model)
    _refuse_changes(snapshot, model, "compress_plan() must not change the model")
    if state is not None:
        check_plans(state, lifecycle)
    else:
        context.bypassable = not any(algorithm.changes_in_place for algorithm in lifecycle.algorithms)
        lifecycle.observe(model)
    lifecycle.commit(model)
    recompute_weights(model, context.config.root.recompute_weights)
    if state is not None:
        controller.scheduler.load_state(state.scheduler)
        lifecycle.load_state(model, {name: entry.state for name, entry in state.algorithms.items()})
        for name, initializer in lifecycle.initializers.items():
            initializer.load_state(state.initializers.get(name, {}), model, context)
    else:
        lifecycle.calibrate(model)
    if context.bypassable and state is None:
        _refuse_changes(snapshot, model, "no algorithm of this config declares changes_in_place = True")
    _close_ledger(lifecycle)
    if state is None:
        lifecycle.initialize(model)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ModelError(
            f"the model is wrapped in {type(model).__name__}; call create_compressed_model(model.module, ...) and wrap "
            "the result"
        )
    if torch.is_inference_mode_enabled():
        raise ModelError("create_compressed_model was called within torch.inference_mode(); call it outside")
    if has_transforms(model):
        raise ModelError(
            "the model is compressed already. Put all algorithms into one config; to start again, use the model that "
            "controller.strip() returns, or a fresh one"
        )


def _check_data(lifecycle: Lifecycle) -> None:
    """Data that is asked for has to be there before anything is touched."""
    if lifecycle.context.resuming:
        return
    for initializer in lifecycle.initializers.values():
        initializer.check(lifecycle.context)
        if initializer.struct is not None and initializer.needs_data():
            for path in initializer.paths:
                lifecycle.context.calibration_data(path, initializer.struct)


def _refuse_changes(snapshot: ModelSnapshot, model: nn.Module, why: str) -> None:
    changed = snapshot.changed_tensors(model)
    if changed:
        raise PluginError(f"a plugin has written to the model's tensors, for example {changed[:3]}; {why}")


def _close_ledger(lifecycle: Lifecycle) -> None:
    context = lifecycle.context
    strict = context.config.root.unused_values == "error"
    for algorithm in lifecycle.algorithms:
        path, config = context.section(algorithm)
        targets = lifecycle.plans[algorithm.name].targets
        context.ledger.close_section(path, config, targets, read_later=algorithm.reads_later, strict=strict)
    context.ledger.close_root(context.config.root)


def register_default_init_args(
    config: CompressionConfig | Mapping[str, Any] | str | Path,
    train_loader: Any,
    *,
    device: torch.device | str | None = None,
    forward_fn: ForwardFn | None = None,
    model_eval_fn: Callable[[nn.Module], Any] | None = None,
) -> CompressionConfig:
    """Attaches the data that initializers work with: batch-norm adaptation, quantizer ranges.

    Args:
        config: A config, a dict, or the path of a JSON file. A `CompressionConfig` is changed in place.
        train_loader: Batches, mostly the training loader; see `BNAdaptationInitArgs`.
        device: Where batches are moved; by default to where the model is.
        forward_fn: `forward_fn(model, batch)`, where it is not obvious how the model takes a batch.
        model_eval_fn: The metric, for `"guard": true`; takes the model and returns a number, larger is better.

    Returns:
        The config. Calling this again replaces the data.
    """
    loaded = CompressionConfig.load(config)
    kinds: tuple[type[InitArgs], ...] = (BNAdaptationInitArgs, QuantizationRangeInitArgs)
    loaded.register_extra_structs([kind(train_loader, device, forward_fn) for kind in kinds])
    return loaded.register_extra_structs([] if model_eval_fn is None else [ModelEvaluationArgs(model_eval_fn)])


def check_config(config: CompressionConfig | Mapping[str, Any] | str | Path) -> None:
    """Checks everything about a config that can be checked without a model.

    Raises:
        ConfigError: With all problems, their paths and remedies.
    """
    Lifecycle(default_registry(), Context(CompressionConfig.load(config))).configure()
