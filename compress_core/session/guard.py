"""All or nothing: what happens to a model while it is compressed, who may do what, and how it is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.data.rng import RngState
from compress_core.errors import PluginError
from compress_core.session.lifecycle import Lifecycle
from compress_core.torch_internals import version_of
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.snapshot import GONE, ModelSnapshot

_REMEDY = "add transforms instead, or declare changes_in_place = True"


class ModelGuard:
    """Holds plugins to what they may do to a model's own tensors.

    Args:
        model: The model, before anything is changed.
        lifecycle: Its algorithms.
    """

    def __init__(self, model: nn.Module, lifecycle: Lifecycle) -> None:
        self._model, self._lifecycle = model, lifecycle
        self.snapshot = ModelSnapshot(model)
        # What the tensors have to be: as before compression, until an algorithm changes them that says so.
        self._reference = self.snapshot

    @contextlib.contextmanager
    def read_only(self, hook: str, algorithm: Algorithm | None = None) -> Iterator[None]:
        """Within the context nobody may write to the model's tensors; compares every bit.

        Raises:
            PluginError: Somebody has; the message names the algorithm.
        """
        yield
        changed = self._changed()
        if changed:
            self._refuse(hook, algorithm, changed, f"{hook}() must not change the model")

    @contextlib.contextmanager
    def transforms_only(self, hook: str, algorithm: Algorithm) -> Iterator[None]:
        """Within the context the algorithm may write to the model's tensors if it has declared that it does.

        Only tensors with another version are looked at: what goes past it (`.data`) is found by `close`.

        Raises:
            PluginError: It writes to them all the same.
        """
        before = _versions(self._model)
        yield
        if algorithm.changes_in_place or algorithm.replaces_modules:
            if _versions(self._model) != before:
                self._reference = ModelSnapshot(self._model)
            return
        after = _versions(self._model)
        # What was written to may have been put back, such as the statistics of batch norm.
        if any(after.get(name) != version for name, version in before.items()) and (changed := self._changed()):
            self._refuse(hook, algorithm, changed, _REMEDY)

    def close(self) -> None:
        """At the end of calibration: finds what has been written past the versions of tensors.

        Raises:
            PluginError: The model's tensors have other values than the algorithms have declared.
        """
        changed = self._changed()
        if changed:
            suspects = [a for a in self._lifecycle.algorithms if not (a.changes_in_place or a.replaces_modules)]
            if suspects:
                self._refuse("compress_commit", suspects[0] if len(suspects) == 1 else None, changed, _REMEDY)

    def _changed(self) -> list[str]:
        inside = _transforms_in(self._model)
        return [name for name in self._reference.changed_tensors(self._model) if not name.startswith(inside)]

    def _refuse(self, hook: str, algorithm: Algorithm | None, changed: list[str], remedy: str) -> NoReturn:
        names = ", ".join(a.name for a in self._lifecycle.algorithms)
        if remedy == _REMEDY and GONE in changed:
            remedy = "keep the modules and parameters that there are, or declare replaces_modules = True"
        who = f"one of {names}, or an initializer," if algorithm is None else self._lifecycle.who(algorithm)
        raise PluginError(f"{hook}() of {who} has written to the model's tensors, for example {changed[:3]}; {remedy}")


def _transforms_in(model: nn.Module) -> tuple[str, ...]:
    """Returns how the names of tensors begin that belong to transforms."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TransformContainer))


def _versions(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Returns, for each of a model's own tensors, which object it is, where it lies, and its version."""
    inside = _transforms_in(model)
    return {
        name: (id(tensor), _address(tensor), version_of(tensor))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not name.startswith(inside) and not tensor.is_inference()
    }


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse, or a subclass without storage
        return 0


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, lifecycle: Lifecycle) -> Iterator[ModelGuard]:
    """Within the context a model is compressed; if that fails, Ctrl-C included, it is as before, bit for bit.

    Random generators, those of data loaders too, are as before in any case: whatever initialization draws, the training
    that follows is the one that would have followed without it.
    """
    guard = ModelGuard(model, lifecycle)
    rng = RngState(lifecycle.context.generators())
    try:
        yield guard
        rng.restore()
    except BaseException:
        guard.snapshot.restore()
        rng.restore()
        raise
