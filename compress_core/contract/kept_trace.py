"""Keeps the trace of a model for the algorithms that plan next, as long as nothing has changed that it shows."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.torch_internals import HOOK_ATTRIBUTES, version_of
from compress_core.trace import Trace
from compress_core.trace.weights import WeightUse
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.generated import base_class
from compress_core.transforms.python_state import PythonState
from compress_core.transforms.walk import modules_of


class KeptTrace:
    """A trace of a model without transforms, and what it shows of the layers of a user's own.

    A trace takes as long as several training steps, and each algorithm of a config asks for one. Transforms, which are
    what algorithms add, are left out of it; it stays true as long as everything else is the same object with the same
    contents: modules, classes, hooks, attributes, and what the code of their forwards refers to. Whoever plans or
    commits may change these, so all of them are compared, as far as `PythonState` follows them, and not only what
    plugins declare. Values of tensors are not compared: a forward that has read any is traced again, and a write to a
    tensor counts as a change.

    Copies and pickles hold nothing.

    Args:
        is_closed: Whether nothing is kept.
    """

    def __init__(self, *, is_closed: bool = False) -> None:
        self._marks: _Marks | None = None
        self._trace: Trace | None = None
        self._own: dict[str, WeightUse] | None = None
        self._is_closed = is_closed

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptTrace, ()

    def close(self) -> None:
        """Drops everything, and keeps nothing any more."""
        self.forget()
        self._is_closed = True

    def forget(self) -> None:
        """Drops everything; for changes that are known."""
        self._marks = self._trace = self._own = None

    def trace_of(self, model: nn.Module) -> Trace | None:
        """Returns the trace, if one is kept and is true of the model as it is now."""
        if self._trace is None or not self._is_true_of(model):
            return None
        return Trace(list(self._trace.forwards), list(self._trace.training), dict(self._trace.modules))

    def own_weights_of(self, model: nn.Module) -> dict[str, WeightUse] | None:
        """Returns the weights of layers of a user's own, likewise."""
        return dict(self._own) if self._own is not None and self._is_true_of(model) else None

    def keep_trace(self, model: nn.Module, trace: Trace) -> None:
        """Keeps a trace that has just been made."""
        if self._begin(model, trace):
            self._trace = trace

    def keep_own_weights(self, model: nn.Module, trace: Trace, found: Mapping[str, WeightUse]) -> None:
        """Keeps what a trace that has just been made shows."""
        if self._begin(model, trace):
            self._own = dict(found)

    def _begin(self, model: nn.Module, trace: Trace) -> bool:
        """Returns whether something can be kept; drops what is not true of the model."""
        forwards = [*trace.forwards, *(forward for forward in trace.training if forward is not None)]
        if self._is_closed or any(forward.real for forward in forwards):
            return False
        if not self._is_true_of(model):
            self.forget()
            self._marks = _Marks(model)
        return True

    def _is_true_of(self, model: nn.Module) -> bool:
        return self._marks is not None and self._marks.fit(model)


class _Marks:
    """Everything in a model on which its forward may depend, but for the values of its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = PythonState(model)
        self._objects = list(_objects_of(model))
        self._tensors = [tensor for tensor in self._all_tensors() if not tensor.is_inference()]
        self._layouts = [_layout_of(tensor) for tensor in self._tensors]
        # Writes to these cannot be seen.
        self._can_be_compared = len(self._tensors) == len(self._all_tensors())

    def fit(self, model: nn.Module) -> bool:
        """Returns whether nothing has changed."""
        if model is not self._model or not self._can_be_compared:
            return False
        objects = list(_objects_of(model))
        return (
            len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
            and [_layout_of(tensor) for tensor in self._tensors] == self._layouts
            and self._state.is_same()
        )

    def _all_tensors(self) -> list[torch.Tensor]:
        loose = [tensor for _, tensor in self._state.tensors]
        return [*loose, *(item for item in self._objects if isinstance(item, torch.Tensor))]


def _objects_of(model: nn.Module) -> Iterator[Any]:
    """Yields the modules that are no transforms, with their classes, children, tensors and hooks."""
    found = list(modules_of(model))
    inside = {id(inner) for module in found if isinstance(module, TransformContainer) for inner in modules_of(module)}
    for module in found:
        if id(module) in inside:
            continue
        yield module
        yield base_class(module)
        for kind in ("_parameters", "_buffers", "_modules", *HOOK_ATTRIBUTES):
            for name, item in getattr(module, kind, {}).items():
                if not isinstance(item, TransformContainer):
                    yield name
                    yield item


def _layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # sparse, or a subclass without storage
        address = 0
    place = address, version_of(tensor), tensor.requires_grad
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return *place, tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout
