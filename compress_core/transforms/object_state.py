"""Saves and restores what Python objects keep: those of algorithms and of optimizers, for methods that may fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import nn

from compress_core.transforms.containers import SavedContainer, SavedSlots, container_base
from compress_core.transforms.python_state import SavedArray, SavedGenerator
from compress_core.transforms.snapshot import ModelSnapshot, save_tensor

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_CODE = (FunctionType, MethodType, BuiltinFunctionType, ModuleType, type)


class _Saved(Protocol):
    def restore(self) -> None: ...


class ObjectState:
    """Attributes, containers, tensors, arrays and random generators that are reachable from some objects.

    Code is not followed; what the objects refer to is followed if `is_followed` says so, and so are containers. It
    holds a copy of each tensor until it is dropped.

    Args:
        roots: The objects; each is followed, whatever it is.
        is_followed: Whether the attributes of an object are state that may change.
        elsewhere: Modules and tensors that somebody else restores, such as those of a model's snapshot.
        modules: Whether modules that the objects refer to are restored as well.
    """

    def __init__(
        self,
        roots: Iterable[object],
        is_followed: Callable[[object], bool],
        elsewhere: Iterable[nn.Module | torch.Tensor] = (),
        *,
        modules: bool = False,
    ) -> None:
        self._is_followed, self._modules = is_followed, modules
        self._saved: list[_Saved] = []
        # Objects are kept as well, so that no other one gets the id of one that was seen.
        self._seen: dict[int, object] = {id(value): value for value in elsewhere}
        self._waiting: list[object] = []
        for root in roots:
            self._seen[id(root)] = root
            self._save_attributes(root)
        while self._waiting:
            self._visit(self._waiting.pop())
        self._seen.clear()

    def restore(self) -> None:
        """Puts back the same objects and values."""
        for saved in self._saved:
            saved.restore()

    def _visit(self, value: object) -> None:
        if isinstance(value, (*_PLAIN, *_CODE)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._saved.append(save_tensor("a tensor of an algorithm, optimizer or the like", value))
        elif isinstance(value, nn.Module):
            if self._modules:
                self._saved.append(ModelSnapshot(value))
        elif container_base(value) is not None:
            self._save_container(value)
        elif isinstance(value, (tuple, frozenset)):
            self._waiting += value
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self._saved.append(SavedGenerator(value))
        elif isinstance(value, np.ndarray):
            if value.dtype != object:
                self._saved.append(SavedArray(value))
        elif self._is_followed(value):
            self._save_attributes(value)

    def _save_container(self, container: object) -> None:
        saved = SavedContainer(container)
        self._saved.append(saved)
        self._waiting += saved.values

    def _save_attributes(self, value: object) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._seen[id(attributes)] = attributes
            self._save_container(attributes)
        slots = SavedSlots(value)
        if slots.values or not slots.is_same():
            self._saved.append(slots)
            self._waiting += slots.values
