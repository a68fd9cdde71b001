"""`create_compressed_model` and the accuracy-aware loop with NNCF's arguments."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from compress_core import api
from compress_core.accuracy_aware import AccuracyAwareTrainingLoop
from compress_core.accuracy_aware import create_accuracy_aware_training_loop as create_loop
from compress_core.config import CompressionConfig
from compress_core.data.examples import Example
from compress_core.errors import StateError, UsageError
from compress_core.nncf.config import NNCFConfig
from compress_core.nncf.controller import NNCFController, with_nncf_methods

logger = logging.getLogger(__name__)

# `load_state` gets the model alone. The model does not know its controller, and keeps neither it nor itself alive.
_controllers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[NNCFController]] = weakref.WeakKeyDictionary()


def create_compressed_model(
    model: nn.Module,
    config: NNCFConfig | Mapping[str, Any],
    compression_state: Mapping[str, Any] | None = None,
    dummy_forward_fn: Callable[[nn.Module], Any] | None = None,
    wrap_inputs_fn: Callable[..., Any] | None = None,
    wrap_outputs_fn: Callable[..., Any] | None = None,
    dump_graphs: bool = True,
    *,
    uncompressed_model: nn.Module | None = None,
) -> tuple[NNCFController, nn.Module]:
    """Prepares a model for training with compression, with NNCF's arguments.

    Args:
        model: The model; it stays the same object.
        config: The config, with the registered data.
        compression_state: What `get_compression_state()` of compress-core returned.
        dummy_forward_fn: `(model)`: calls the model with an example, in place of `input_info`; the arguments of its
            first call of the model, with their values, are the example.
        wrap_inputs_fn: Not needed: the arguments of forward are the inputs. Accepted with a word.
        wrap_outputs_fn: Not needed: what forward returns are the outputs. Accepted with a word.
        dump_graphs: Ignored: no files are written; `compress-core trace` shows the graph.
        uncompressed_model: Not in NNCF: the model with its trained weights, which distillation needs when a training is
            resumed. NNCF takes `model`, and does not say so where that has other weights.

    Returns:
        The controller, and the model.

    Raises:
        StateError: The compression state is one of NNCF; the message says what to do.
        UsageError: `dummy_forward_fn` does not call the model.
    """
    del dump_graphs
    if wrap_inputs_fn is not None or wrap_outputs_fn is not None:
        logger.info("wrap_inputs_fn and wrap_outputs_fn are not needed here: forward's arguments and results count")
    _refuse_nncf_state(compression_state)
    loaded = config.compression_config() if isinstance(config, NNCFConfig) else CompressionConfig.from_dict(config)
    example = None if dummy_forward_fn is None else _first_call(model, dummy_forward_fn)
    controller, model = api.create_compressed_model(
        model, loaded, compression_state, uncompressed_model=uncompressed_model, example_inputs=example
    )
    found = with_nncf_methods(controller)
    _controllers[model] = weakref.ref(found)
    return found, model


def controller_of(model: nn.Module) -> NNCFController | None:
    """Returns the controller of a model that `create_compressed_model` of this module returned, or of its wrapper."""
    for module in model.modules():
        reference = _controllers.get(module)
        found = None if reference is None else reference()
        if found is not None:
            return found
    return None


def create_accuracy_aware_training_loop(
    nncf_config: NNCFConfig | Mapping[str, Any],
    compression_ctrl: NNCFController,
    uncompressed_model_accuracy: float,
    **additional_runner_args: Any,
) -> AccuracyAwareTrainingLoop:
    """Returns the loop that the config's `accuracy_aware_training` asks for; see `docs/accuracy_aware.md`."""
    config = CompressionConfig.from_dict(dict(nncf_config))
    return create_loop(config, compression_ctrl, uncompressed_model_accuracy, **additional_runner_args)


def _refuse_nncf_state(state: Any) -> None:
    if isinstance(state, Mapping) and ("builder_state" in state or "ctrl_state" in state):
        raise StateError(
            "compression_state: this one was saved by NNCF, whose structures are other ones. Create the model without "
            "it, from the same config and data, and take weights, masks and scales from NNCF's state_dict: "
            "load_state(model, checkpoint['state_dict']); then set the clock: "
            "controller.scheduler.epoch_step(next_epoch)"
        )


class _CalledError(Exception):
    """Ends the forward once its arguments are known."""


def _first_call(model: nn.Module, dummy_forward_fn: Callable[[nn.Module], Any]) -> Example:
    """Returns the arguments that `dummy_forward_fn` calls the model with, of whatever types."""
    calls: list[Example] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Example.of(*args, **kwargs))
        raise _CalledError

    if not callable(dummy_forward_fn):
        raise UsageError(f"dummy_forward_fn: must be a function of the model, got {dummy_forward_fn!r}")
    handle = model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        dummy_forward_fn(model)
    except _CalledError:
        pass
    finally:
        handle.remove()
    if not calls:
        raise UsageError("dummy_forward_fn: has to call the model that it is given, and did not")
    return calls[0]
