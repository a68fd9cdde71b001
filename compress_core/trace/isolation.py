"""Runs a forward without side effects: everything that it changes in a model is restored afterwards."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from compress_core.data.rng import preserved_rng
from compress_core.torch_internals import storage_identity, version_of
from compress_core.transforms.containers import SavedContainer
from compress_core.transforms.python_state import PythonState
from compress_core.transforms.snapshot import StructureSnapshot


class Untouched:
    """Context manager that restores attributes, modes, hooks, buffers and caches of a model, and random generators.

    Args:
        model: The model.
        values: Whether the forward computes on real tensors, so that it may write to parameters as well. The caller
            announces each write with `before_write`, which copies the parameter first.
    """

    def __init__(self, model: nn.Module, *, values: bool) -> None:
        self._model = model
        self._values = values
        self._kept: list[PythonState | SavedContainer] = []
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor, int | None]] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Untouched:
        with self._stack as stack:
            stack.enter_context(preserved_rng())
            structure = StructureSnapshot(self._model)
            state = PythonState(self._model)
            self._kept = [state, *(SavedContainer(module._buffers) for module in self._model.modules())]
            modes = [(m, m.training) for m in self._model.modules() if isinstance(m, torch.jit.ScriptModule)]
            data = self._watch([tensor for _, tensor in state.tensors])
            for buffer in self._model.buffers():
                self._save(buffer)  # because writes by batch norm are not announced
            stack.callback(self._restore_values, data)
            stack.callback(_restore_modes, modes)
            stack.callback(state.restore)
            stack.callback(structure.restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._copies.clear()
        self._by_storage.clear()

    def state_has_changed(self) -> bool:
        """Returns whether the forward has left something in the user's objects, on which the next one may depend."""
        return not all(kept.is_same() for kept in self._kept)

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
