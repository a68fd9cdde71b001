"""Protects the model while it is compressed: finds forbidden changes by plugins, and rolls back on failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.data.forwards import belongs_to_algorithm, without_traces
from compress_core.data.rng import RngState
from compress_core.errors import PluginError
from compress_core.session.lifecycle import Lifecycle
from compress_core.torch_internals import version_of
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.snapshot import GONE, ModelSnapshot
from compress_core.transforms.walk import modules_of

_REMEDY = "add transforms instead, or declare changes_in_place = True"


class ModelGuard:
    """Checks that plugins write to a model's own tensors only where they are allowed to.

    Args:
        model: The model, before anything is changed.
        lifecycle: Its algorithms.
    """

    def __init__(self, model: nn.Module, lifecycle: Lifecycle) -> None:
        self._model, self._lifecycle = model, lifecycle
        self.snapshot = ModelSnapshot(model)
        self._users = {id(module) for module in model.modules()}
        # The values that the tensors must have; updated after an algorithm that declares changes_in_place.
        self._reference = self.snapshot

    @contextlib.contextmanager
    def read_only(self, hook: str, algorithm: Algorithm | None = None) -> Iterator[None]:
        """Context manager in which the model's tensors must not change; compares every bit on exit.

        Raises:
            PluginError: A tensor has changed; the message names the algorithm.
        """
        with self.without_traces():
            yield
        changed = self._changed()
        if changed:
            self._refuse(hook, algorithm, changed, f"{hook}() must not change the model")

    @contextlib.contextmanager
    def transforms_only(self, hook: str, algorithm: Algorithm) -> Iterator[None]:
        """Context manager in which the algorithm may write to the model's tensors only if it declares that it does.

        Only tensors whose version has changed are compared. Writes that do not bump the version (`.data`) are found by
        `close`.

        Raises:
            PluginError: The algorithm wrote to a tensor without declaring it.
        """
        before = _versions(self._model)
        # An algorithm that changes modules may change their attributes as well, in its commit others may, too.
        changes_modules = algorithm.changes_in_place or algorithm.replaces_modules
        with contextlib.nullcontext() if changes_modules or hook == "compress_commit" else self.without_traces():
            yield
        if changes_modules:
            if algorithm.replaces_modules:
                self._note_new_modules()
            if _versions(self._model) != before:
                self._reference = ModelSnapshot(self._model)
            return
        after = _versions(self._model)
        # A changed version alone is no error: values may have been restored, such as the statistics of batch norm.
        if any(after.get(name) != version for name, version in before.items()) and (changed := self._changed()):
            self._refuse(hook, algorithm, changed, _REMEDY)

    def without_traces(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager that restores what forwards of the model leave behind in the user's objects."""
        return without_traces(self._model, self._reference.saved_tensor, hooks=True)

    def _note_new_modules(self) -> None:
        for module in self._model.modules():
            if id(module) not in self._users:
                belongs_to_algorithm(module)

    def close(self) -> None:
        """Compares all tensors at the end of calibration, to find writes that did not bump a tensor's version.

        Raises:
            PluginError: A tensor has changed although no algorithm declared it.
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
        if hook == "compress_calibrate":
            remedy += "; call the model with CalibrationData.call, so that writes by its own forward do not count"
        who = f"one of {names}, or an initializer," if algorithm is None else self._lifecycle.who(algorithm)
        raise PluginError(f"{hook}() of {who} has written to the model's tensors, for example {changed[:3]}; {remedy}")


def _transforms_in(model: nn.Module) -> tuple[str, ...]:
    """Returns the prefixes of the names of tensors that belong to transforms."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TransformContainer))


def _versions(model: nn.Module) -> dict[tuple[int, str], tuple[int, int, int]]:
    """Returns the identity, the address and the version of each of a model's own tensors, by its module and name."""
    modules = list(modules_of(model))
    inside = {id(inner) for module in modules if isinstance(module, TransformContainer) for inner in modules_of(module)}
    return {
        (id(module), name): (id(tensor), _address(tensor), version_of(tensor))
        for module in modules
        if id(module) not in inside
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and not tensor.is_inference()
    }


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse, or a subclass without storage
        return 0


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, lifecycle: Lifecycle) -> Iterator[ModelGuard]:
    """Context manager for compressing a model: on any error, Ctrl-C included, the model is restored bit for bit.

    Random generators, also those of data loaders, are always restored, so that initialization does not change the
    random numbers that the following training draws.
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
