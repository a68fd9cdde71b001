"""Forwards of the user's model that leave no trace in it.

While a model is compressed, its forward runs on calibration data. What these forwards leave behind (an attention map in
an attribute, a counter, a cached table, computed with half of the quantizers off) must not be in the model that the
user gets: it has to be as if no forward had run.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from compress_core.torch_internals import AnyBatchNorm, FakeTensor, version_of
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.containers import SavedContainer
from compress_core.transforms.interrupts import interrupts_held
from compress_core.transforms.python_state import PythonState
from compress_core.transforms.snapshot import SavedTensor, memory_of, save_tensor
from compress_core.transforms.walk import modules_of

logger = logging.getLogger(__name__)

# Modules that algorithms have put into models in place of the user's: what their forwards keep is the algorithm's.
_of_algorithms: WeakSet[nn.Module] = WeakSet()
# Larger tensors that are neither parameters nor buffers are not copied; usually they are data.
_MOST_BYTES = 1 << 26
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

FindSaved = Callable[[torch.Tensor], "SavedTensor | None"]


def belongs_to_algorithm(module: nn.Module) -> None:
    """Tells that an algorithm has put a module into a model; what its forwards keep is not restored."""
    _of_algorithms.add(module)


class _Writes:
    """Tells writes by forwards from writes by the algorithm between them.

    A write bumps the version of a tensor, except through `.data`, which only its values show. These are compared at the
    first forward: one that writes in this way usually does so each time.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._stored = [tensor for tensor in tensors if memory_of(tensor)[1] is not None]
        self._marks = self._read()
        self._first = True
        self.by_forwards: set[int] = set()
        self.by_others: set[int] = set()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Context manager for one forward."""
        self.start_of_forward()
        sums = [_checksum(tensor) for tensor in self._tensors] if self._first else []
        self._first = False
        try:
            yield
        finally:
            self.end_of_forward()
            for tensor, before in zip(self._tensors, sums, strict=False):
                if _checksum(tensor) != before:
                    self.by_forwards.add(id(tensor))

    def start_of_forward(self) -> None:
        """Notes what was written since the last look: that was not a forward."""
        self._compare(self.by_others)

    def end_of_forward(self) -> None:
        """Notes what was written since the last look: that was a forward."""
        self._compare(self.by_forwards)

    def forget(self) -> None:
        """Takes the present values as given, after some have been restored."""
        self._marks = self._read()

    def _read(self) -> tuple[list[int], list[int]]:
        """Returns what changes when a tensor is written to, other than through `.data`."""
        return list(map(version_of, self._versioned)), list(map(torch.Tensor.data_ptr, self._stored))

    def _compare(self, found: set[int]) -> None:
        now = self._read()
        if now != self._marks:
            for tensors, new, old in zip((self._versioned, self._stored), now, self._marks, strict=True):
                found.update(id(t) for t, new_mark, mark in zip(tensors, new, old, strict=True) if new_mark != mark)
            self._marks = now


class _Scope:
    def __init__(self, model: nn.Module, find_saved: FindSaved | None, *, hooks: bool, parameters: bool) -> None:
        everything = list(modules_of(model))
        self._state = PythonState(model, [m for m in everything if m in _of_algorithms], hooks=hooks)
        inside = {id(m) for owned in everything if _is_foreign(owned) for m in modules_of(owned)}
        modules = [module for module in everything if id(module) not in inside]
        self._structure = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._entries = [dict(entries) for entries in self._structure]
        self._ids = self._read_ids()
        self._replaced: dict[int, SavedContainer] = {}
        buffers = [b for m in modules for name, b in m._buffers.items() if b is not None and not _is_statistic(m, name)]
        weights = [p for m in modules for p in m._parameters.values() if p is not None]
        loose = [(name, tensor) for name, tensor in self._state.tensors if not _has_no_values(tensor)]
        self._names = {id(tensor): name for name, tensor in loose}
        kept = [*buffers, *(t for _, t in loose if t.numel() * t.element_size() <= _MOST_BYTES)]
        self._saved = {id(t): save_tensor("", t) for t in [*kept, *(weights if parameters else [])]}
        self._find_saved = find_saved
        self._tensors = {id(tensor): tensor for tensor in [*weights, *buffers, *(t for _, t in loose)]}
        self.writes = _Writes(list(self._tensors.values()))

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        if self._read_ids() != self._ids:
            self._note_entries()
        try:
            with self.writes.forward():
                yield
        finally:
            if self._read_ids() != self._ids:
                self._note_entries(by_forward=True)

    def _read_ids(self) -> list[int]:
        return [id(value) for entries in self._structure for value in entries.values()]

    def _note_entries(self, by_forward: bool = False) -> None:
        """Takes the present parameters, buffers and children of modules as given; a forward's changes are restored."""
        for entries, old in zip(self._structure, self._entries, strict=True):
            same = len(entries) == len(old) and all(map(operator.is_, entries.values(), old.values()))
            if by_forward and not same and id(entries) not in self._replaced:
                now = dict(entries)
                _set_items(entries, old)
                self._replaced[id(entries)] = SavedContainer(entries)
                _set_items(entries, now)
        self._entries = [dict(entries) for entries in self._structure]
        self._ids = self._read_ids()

    def restore(self) -> None:
        with interrupts_held():
            for entries in self._replaced.values():
                entries.restore()
            self._state.restore()
            for identity in self.writes.by_forwards - self.writes.by_others:
                self._restore_tensor(self._tensors[identity])

    def _restore_tensor(self, tensor: torch.Tensor) -> None:
        saved = self._saved.get(id(tensor))
        if saved is None and self._find_saved is not None:
            saved = self._find_saved(tensor)
        if saved is not None:
            saved.restore()
        elif id(tensor) in self._names:
            logger.warning(
                "the model's forward has written to the tensor in '%s', which is too large to be restored: it now "
                "holds what calibration has left there. Make it a buffer, or create it anew",
                self._names[id(tensor)],
            )


_open: ContextVar[tuple[_Scope, ...]] = ContextVar("_open", default=())


@contextlib.contextmanager
def without_traces(
    model: nn.Module, find_saved: FindSaved | None = None, *, hooks: bool = False, parameters: bool = True
) -> Iterator[None]:
    """Context manager that restores on exit what forwards of the model have changed in the user's objects.

    That is: attributes of modules, containers and objects in them, class attributes, closures, global variables,
    caches, and values of buffers and parameters. Running statistics of batch norm are not touched, and neither are
    transforms and tensors that are written to between the forwards.

    Args:
        model: The model.
        find_saved: Returns the copy of a parameter that exists already, so that none is made.
        hooks: Whether to restore what hooks of the model keep; only where no algorithm has set hooks before.
        parameters: Whether to restore parameters. Within another context it has no effect: the outer one does.
    """
    outer = _open.get()
    scope = _Scope(model, find_saved, hooks=hooks, parameters=parameters and not outer and find_saved is None)
    token = _open.set((*outer, scope))
    try:
        yield
    finally:
        _open.reset(token)
        scope.restore()
        for other in outer:
            other.writes.forget()


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Context manager for one forward of a model; it leaves no trace, within `without_traces` or by itself."""
    with contextlib.ExitStack() as stack:
        if not _open.get():
            stack.enter_context(without_traces(model, parameters=False))
        for scope in _open.get():
            stack.enter_context(scope.forward())
        yield


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Context manager for writes to the model's tensors by an algorithm while a forward is waiting; they stay."""
    scopes = _open.get()
    for scope in scopes:
        scope.writes.end_of_forward()
    try:
        yield
    finally:
        for scope in scopes:
            scope.writes.start_of_forward()


def _is_foreign(module: nn.Module) -> bool:
    return isinstance(module, TransformContainer) or module in _of_algorithms


def _is_statistic(module: nn.Module, name: str) -> bool:
    return isinstance(module, AnyBatchNorm) and name in _STATISTICS


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor) or torch.nn.parameter.is_lazy(tensor)


def _set_items(entries: dict[str, Any], items: dict[str, Any]) -> None:
    entries.clear()
    entries.update(items)


def _checksum(tensor: torch.Tensor) -> int:
    """Returns a number that changes when a bit of a tensor changes; 0 for tensors whose bits cannot be read."""
    try:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = flat.view(torch.int64) if len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0 else flat
        return int(words.sum(dtype=torch.int64))
    except (RuntimeError, NotImplementedError):  # sparse, nested, quantized
        return 0
