"""Runs a forward without side effects: everything that it changes in a model is restored afterwards."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from compress_core.data.rng import preserved_rng
from compress_core.torch_internals import storage_identity, version_of
from compress_core.transforms.snapshot import StructureSnapshot

# Objects that hold no state of a forward, or whose state is restored elsewhere.
_OPAQUE = (nn.Module, type, FunctionType, MethodType, ModuleType, torch.Generator)
_PLAIN = (str, bytes, int, float, complex)
# Enough for caches; limited, so that a module that refers to its trainer does not make us copy a data set.
_DEEPEST, _MOST_ITEMS = 5, 1000


class Untouched:
    """Context manager that restores attributes, modes, hooks, caches and buffers of a model, and random generators.

    Args:
        model: The model.
        values: Whether the forward computes on real tensors, so that it may write to parameters as well. The caller
            announces each write with `before_write`, which copies the parameter first.
    """

    def __init__(self, model: nn.Module, *, values: bool) -> None:
        self._model = model
        self._values = values
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor, int | None]] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Untouched:
        with self._stack as stack:
            stack.enter_context(preserved_rng())
            structure = StructureSnapshot(self._model)
            nested = _Nested(self._model)
            modes = [(m, m.training) for m in self._model.modules() if isinstance(m, torch.jit.ScriptModule)]
            data = self._watch(nested.tensors) if self._values else []
            for buffer in self._model.buffers():
                self._save(buffer)  # because writes by batch norm are not announced
            stack.callback(self._restore_values, data)
            stack.callback(_restore_modes, modes)
            stack.callback(nested.restore)
            stack.callback(structure.restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._copies.clear()
        self._by_storage.clear()

    def before_write(self, tensor: torch.Tensor) -> None:
        """Keeps a copy of a tensor that is about to be written to, if it belongs to the model."""
        for owner in self._by_storage.get(_storage(tensor), ()):
            self._save(owner)

    def _watch(self, loose: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = [*self._model.parameters(), *self._model.buffers(), *loose]
        for tensor in found:
            self._by_storage.setdefault(_storage(tensor), []).append(tensor)
        return [(tensor, tensor.detach()) for tensor in found]

    def _save(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._copies and not tensor.is_meta:
            self._copies[id(tensor)] = tensor, tensor.detach().clone(), _version(tensor)

    def _restore_values(self, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensor, original in data:
            if _storage(tensor) != _storage(original) or tensor.shape != original.shape:
                tensor.data = original  # `weight.data = ...` in a forward
        for tensor, values, version in self._copies.values():
            # Restoring an unchanged tensor would bump its version, and a later backward pass would fail.
            if version is None or version != _version(tensor):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.detach().copy_(values)
            elif not _equal(tensor, values):
                tensor.data.copy_(values)  # the write did not bump the version (batch norm), and neither does this


def _restore_modes(modes: list[tuple[torch.jit.ScriptModule, bool]]) -> None:
    for module, training in modes:
        module.training = training  # a script module does not keep it among its attributes


class _Nested:
    """Containers and plain objects inside the attributes of a model's modules, where forwards keep caches.

    Attributes:
        tensors: The tensors found there, which are neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[torch.Tensor] = []
        self._contents: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for module in model.modules():
            attributes = module.__dict__
            for name, value in attributes.items():
                if name not in {"_parameters", "_buffers", "_modules"} and not name.endswith("_hooks"):
                    self._visit(value, 0)

    def restore(self) -> None:
        """Restores the contents."""
        for container, contents in self._contents:
            if not _same_items(container, contents):
                container.clear()
                container.extend(contents) if isinstance(container, (list, deque)) else container.update(contents)

    def _visit(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, (dict, list, set, deque)):
            self._contents.append((value, value.copy()))
            self._visit_all(value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, tuple):
            self._visit_all(value, depth)
        elif not isinstance(value, _OPAQUE) and type(value).__module__.partition(".")[0] != "torch":
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self._visit(attributes, depth)

    def _visit_all(self, items: Collection[Any], depth: int) -> None:
        if len(items) <= _MOST_ITEMS:
            for item in items:
                self._visit(item, depth + 1)


def _same_items(left: Any, right: Any) -> bool:
    if len(left) != len(right):
        return False
    if isinstance(left, set):
        return bool(left == right)
    if isinstance(left, dict):
        return all(name in left and left[name] is value for name, value in right.items())
    return all(a is b for a, b in zip(left, right, strict=True))


def _equal(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    try:
        return torch.equal(tensor, values)
    except (RuntimeError, NotImplementedError):
        return True  # sparse: all writes to these bump the version


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else version_of(tensor)


def _storage(tensor: torch.Tensor) -> int:
    try:
        return storage_identity(tensor)
    except (RuntimeError, NotImplementedError):
        return -1  # sparse: all of these are treated as one storage
