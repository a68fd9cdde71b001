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
from compress_core.errors import ModelError
from compress_core.registry import default_registry
from compress_core.session.controller import CompressionController
from compress_core.session.guard import ModelGuard, all_or_nothing
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.state import SavedState, check_plan, checked_state
from compress_core.session.uncompressed import UncompressedModel
from compress_core.transforms.model_wide import has_transforms
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
        uncompressed_model: The model with its trained weights, for algorithms that need it in training (a teacher): has
            to be given when a compression state is resumed, and may be another model otherwise. It is copied.
        observers: Plugin objects that are active for this model alone and see the hooks of every algorithm.

    Returns:
        The controller, and the model that was given.

    Raises:
        ConfigError: The config is wrong, or something in it can have no effect on this model.
        DataError: Data is asked for and missing, or unusable.
        ModelError: The model cannot be compressed as it is.
        PluginError: A plugin breaks the contract.
        StateError: `compression_state` does not fit.
        UsageError: A compression state is resumed, and an algorithm needs the uncompressed model.
    """
    _check_model(model)
    config = CompressionConfig.load(config)
    registry = default_registry()
    resuming = compression_state is not None
    lifecycle = Lifecycle(registry, Context(config, init_loader=init_loader, resuming=resuming), observers)
    if not lifecycle.algorithms:
        logger.warning("the config names no algorithm in 'compression': the model stays uncompressed")
    lifecycle.configure()
    uncompressed = UncompressedModel(lifecycle, uncompressed_model)
    if compression_state is not None:
        state = checked_state(compression_state, lifecycle, registry)
        with all_or_nothing(model, lifecycle) as guard:
            return _resume(model, lifecycle, uncompressed, guard, state), model
    lifecycle.check_initializers()
    with all_or_nothing(model, lifecycle) as guard:
        return _create(model, lifecycle, uncompressed, guard), model


def _create(
    model: nn.Module, lifecycle: Lifecycle, uncompressed: UncompressedModel, guard: ModelGuard
) -> CompressionController:
    """Compresses a model: stage by stage, then calibration and initialization on the whole."""
    controller = CompressionController(model, lifecycle, uncompressed)
    for number, group in enumerate(lifecycle.pipeline()):
        for algorithm in group:
            with guard.read_only("compress_plan", algorithm):
                lifecycle.plan(model, algorithm)
        if number == 0:
            lifecycle.observe(model)
            uncompressed.before_commit(model)
        for algorithm in group:
            with guard.transforms_only("compress_commit", algorithm):
                lifecycle.commit(model, algorithm)
    recompute_weights(model, lifecycle.context.config.root.recompute_weights)
    for algorithm in lifecycle.algorithms:
        with guard.transforms_only("compress_calibrate", algorithm):
            lifecycle.calibrate(model, algorithm)
    guard.close()
    lifecycle.close_ledger()
    lifecycle.initialize(model)
    uncompressed.end_of_creation()
    return controller


def _resume(
    model: nn.Module, lifecycle: Lifecycle, uncompressed: UncompressedModel, guard: ModelGuard, state: SavedState
) -> CompressionController:
    """Builds the structure that a state describes, without data; its `state_dict` is the user's to load."""
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
    controller.scheduler.load_state(state.scheduler)
    lifecycle.load_state(model, {name: entry.state for name, entry in state.algorithms.items()})
    lifecycle.load_initializers(model, state.initializers)
    lifecycle.close_ledger()
    uncompressed.end_of_creation()
    return controller


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
