"""`trace`: the graph of a model, from one or more example forwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from compress_core.errors import ModelError
from compress_core.rng import preserved_rng
from compress_core.snapshot import StructureSnapshot
from compress_core.trace.examples import Example, examples_of
from compress_core.trace.graph import ForwardTrace
from compress_core.trace.recorder import Recorder

logger = logging.getLogger(__name__)


class TraceError(ModelError):
    """A model's forward could not be recorded."""


@dataclass
class Trace:
    """The union of several forwards of one model.

    Attributes:
        forwards: In eval mode, one for each example.
        training: In training mode, one for each example; None where that forward failed.
        modules: Dotted name -> class name of every module of the model.
    """

    forwards: list[ForwardTrace]
    training: list[ForwardTrace | None] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> set[str]:
        """Names of the modules whose forward ran in one of the examples, or whose parameters were used without it."""
        forwards = [*self.forwards, *(f for f in self.training if f is not None)]
        ran = {run.module for forward in forwards for run in forward.module_calls}
        used = {value.parameter for forward in forwards for value in forward.values if value.parameter}
        return ran | {name.rpartition(".")[0] for name in used}

    @property
    def unreached(self) -> list[str]:
        """Names of modules that no example has reached, outermost ones only.

        Containers that are only looked into (`nn.ModuleList`) count as reached when something in them is.
        """
        reached = self.reached
        ancestors = {name[:at] for name in reached for at, sign in enumerate(name) if sign == "."}
        missing = [name for name in self.modules if name and name not in reached and name not in ancestors]
        return [name for name in missing if not any(name.startswith(f"{other}.") for other in missing)]


def trace(model: nn.Module, examples: Any, *, training: bool = False) -> Trace:
    """Records what a model computes, without computing it.

    The forward runs on fake tensors (shapes and dtypes, no values); a forward that needs values, for a branch or a
    shape, runs again on real ones. The model is left as it was: modes, hooks, buffers, attributes; so are the random
    generators.

    Args:
        model: The model.
        examples: `Example`s, or what `examples_of` understands: a tensor, a tuple of arguments, a dict of keyword
            arguments, or a list of these.
        training: Whether to record a forward in training mode, too.

    Returns:
        The trace, one forward for each example.

    Raises:
        TraceError: The model fails on an example.
    """
    found = Trace([], modules={name: type(module).__name__ for name, module in model.named_modules()})
    for example in examples_of(examples):
        found.forwards.append(_forward(model, example, training=False))
        if training:
            try:
                found.training.append(_forward(model, example, training=True))
            except TraceError as error:
                # Such as batch norm, which refuses a single value for each channel.
                logger.debug("no trace in training mode: %s", error)
                found.training.append(None)
    return found


def _forward(model: nn.Module, example: Example, *, training: bool) -> ForwardTrace:
    try:
        return _record(model, example, fake=True, training=training)
    except Exception as error:
        logger.debug("tracing %s with real tensors, because fake ones failed: %s", type(model).__name__, error)
    try:
        return _record(model, example, fake=False, training=training)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: its forward fails on {example.source}: {error}. Give example "
            "inputs that the model takes: input_info in the config, or a data loader"
        ) from error


def _record(model: nn.Module, example: Example, *, fake: bool, training: bool) -> ForwardTrace:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_left_alone(model))
        stack.enter_context(preserved_rng())
        model.train(training)
        recorder = Recorder(model, training=training)
        stack.callback(recorder.close)
        stack.enter_context(torch.no_grad())
        batch = example.batch
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            batch = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)
        for recording in recorder.modes():
            stack.enter_context(recording)
        example.run(model, batch)
    recorder.trace.real = not fake
    return recorder.trace


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Undoes what a forward leaves behind in a model: counters, caches (of fake tensors!), running statistics."""
    structure = StructureSnapshot(model)
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        structure.restore()
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)
