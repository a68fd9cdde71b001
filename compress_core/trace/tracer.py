"""`trace` records the graph of a model from one or more example forwards."""

from __future__ import annotations

import contextlib
import itertools
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from compress_core.data.examples import Example, examples_of
from compress_core.data.memory import refuse_out_of_memory
from compress_core.data.structures import map_tensors
from compress_core.errors import DataError, ModelError
from compress_core.torch_internals import FAKE_TENSOR_LOGGER, FakeTensor, FakeTensorMode
from compress_core.trace import render
from compress_core.trace.fake_results import FakeResults
from compress_core.trace.graph import Forwards, ForwardTrace
from compress_core.trace.isolation import Untouched
from compress_core.trace.recorder import Recorder
from compress_core.transforms.model_wide import evaluating

logger = logging.getLogger(__name__)


class TraceError(ModelError):
    """A model's forward could not be recorded."""


@dataclass
class Trace(Forwards):
    """One or more recorded forwards of a model, with methods to display them."""

    def to_text(self, level: render.Level = "calls") -> str:
        """Returns tables of the forwards: number, module, function, inputs -> outputs; then the modules not reached.

        Args:
            level: `calls` of functions, or ATen `operators`.
        """
        return render.to_text(self, level)

    def to_dot(self, level: render.Level = "calls", forward: int = 0) -> str:
        """Returns one forward as a graph in the language of Graphviz: modules are boxes, tensors are edges.

        Args:
            level: `calls` of functions, or ATen `operators`.
            forward: Index of the forward in `forwards`.
        """
        return render.to_dot(self, level, forward)

    def to_svg(self, level: render.Level = "calls", forward: int = 0) -> str:
        """Returns the graph of `to_dot` as a picture; needs the program `dot` of Graphviz.

        Raises:
            UsageError: Graphviz is not installed, or fails.
        """
        return render.to_svg(self, level, forward)


def trace(model: nn.Module, examples: Any, *, training: bool = False) -> Trace:
    """Records what a model computes, without computing values.

    The forward runs on fake tensors (shapes and dtypes, no values). A forward that needs values, for a branch or a
    shape, runs again on real tensors. Modes, hooks, buffers and attributes of the model and the random generators are
    restored.

    Args:
        model: The model.
        examples: An `Example`, a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these.
        training: Whether to record a forward in training mode as well.

    Returns:
        The trace, one forward for each example; two where the second forward makes other calls than the first, because
        the first one has left something in the model (a cached table, for example).

    Raises:
        TraceError: The model fails on an example.
    """
    _refuse_what_cannot_be_traced(model)
    found = Trace([], modules={name: type(module).__name__ for name, module in model.named_modules()})
    results = FakeResults()
    for example in examples_of(examples):
        found.forwards += _forward(model, example, results, training=False)
        if training:
            try:
                found.training += _forward(model, example, results, training=True)
            except TraceError as error:
                # For example batch norm, which refuses a single value for each channel.
                logger.debug("no trace in training mode: %s", error)
                found.training.append(None)
    if not found.forwards:
        raise TraceError("there is no example input to trace the model with; give at least one")
    return found


def _refuse_what_cannot_be_traced(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise TraceError(f"the model is wrapped in {name}: trace the model inside, its attribute .module")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TraceError(f"the model is a {name}: TorchScript hides its forward; trace the Python model it comes from")
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, got {name}")
    lazy = next((key for key, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise TraceError(f"the parameter '{lazy}' is lazy and not initialized: do one forward before tracing")


def _forward(model: nn.Module, example: Example, results: FakeResults, *, training: bool) -> list[ForwardTrace]:
    try:
        return _record(model, example, results, training=training)
    except Exception as error:
        refuse_out_of_memory(error)
        logger.debug("tracing %s with real tensors, because fake ones failed: %s", type(model).__name__, error)
    try:
        return _record(model, example, None, training=training)
    except Exception as error:
        refuse_out_of_memory(error)
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):  # whose words are the key alone
            reason = f"{type(error).__name__}: {reason}"
        # An error of the data loader says what to write.
        remedy = "Give example inputs that the model takes: input_info in the config, or a data loader"
        raise TraceError(
            f"{type(model).__name__} cannot be traced: its forward fails{_place(model, error)} on {example.source}: "
            + (reason if isinstance(error, DataError) else f"{reason.removesuffix('.')}. {remedy}")
        ) from error


def _place(model: nn.Module, error: BaseException) -> str:
    """Returns which module of the model was running when an exception was raised, for messages."""
    names = {id(module): f"'{name}' ({type(module).__name__})" for name, module in model.named_modules() if name}
    found = ""
    cause: BaseException | None = error
    while cause is not None:  # down to the original exception, which others may wrap
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            found = names.get(id(frame.f_locals.get("self")), found)
        cause = cause.__cause__
    return f" in {found}" if found else ""


def _record(model: nn.Module, example: Example, results: FakeResults | None, *, training: bool) -> list[ForwardTrace]:
    """Records a forward, on fake tensors if the results of operators on these are given."""
    fake = results is not None
    with contextlib.ExitStack() as stack:
        untouched = stack.enter_context(Untouched(model, values=not fake))
        if training:
            model.train()
        else:
            stack.enter_context(evaluating(model))
        mode = _fake_mode_of(model) if fake else None
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        before_write = None if fake else untouched.before_write
        found = [_record_once(model, example, mode, before_write, results, training=training)]
        if untouched.state_has_changed():
            try:
                again = _record_once(model, example, mode, before_write, results, training=training)
            except Exception as error:
                refuse_out_of_memory(error)
                logger.debug("the model does not run twice on %s: %s", example.source, error)
                return found
            if _calls(again) != _calls(found[0]):
                found.append(again)
    return found


def _record_once(
    model: nn.Module,
    example: Example,
    mode: FakeTensorMode | None,
    before_write: Callable[[torch.Tensor], None] | None,
    results: FakeResults | None,
    *,
    training: bool,
) -> ForwardTrace:
    with contextlib.ExitStack() as stack:
        recorder = Recorder(model, training=training, fake=mode, before_write=before_write, results=results)
        stack.callback(recorder.close)
        batch = _batch_for(model, example.batch, mode)
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(_quiet())
        for recording in recorder.modes():
            stack.enter_context(recording)
        example.run(model, batch)
    if not recorder.trace.module_calls:
        raise TraceError("the model was not called: its hooks have not run. Call model(...), not model.forward(...)")
    return recorder.trace


def _calls(forward: ForwardTrace) -> list[tuple[object, ...]]:
    return [(call.function, call.frames, call.location) for call in forward.calls]


def _fake_mode_of(model: nn.Module) -> FakeTensorMode:
    """Returns a new fake mode, or that of the model's parameters if these are fake themselves."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _batch_for(model: nn.Module, batch: Any, mode: FakeTensorMode | None) -> Any:
    """Returns a batch that the forward may write to, on the meta device if the model is on it."""
    parameters = list(model.parameters())
    meta = bool(parameters) and all(parameter.is_meta for parameter in parameters)

    def convert(leaf: torch.Tensor) -> torch.Tensor:
        leaf = leaf.detach().to("meta") if meta else leaf
        if mode is None:
            return leaf.detach().clone()
        return leaf if isinstance(leaf, FakeTensor) else mode.from_tensor(leaf)

    return map_tensors(convert, batch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences torch, which logs a stack trace for each operator that fails on fake tensors."""
    log = logging.getLogger(FAKE_TENSOR_LOGGER)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Context manager: runs compiled parts eagerly, and disables autocast's cache, which would keep fake tensors."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
