"""Records inputs and outputs of the last forward in training mode, for losses that need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compress_core.contract.batch import Batch
from compress_core.data.structures import tensors_of
from compress_core.errors import UsageError
from compress_core.torch_internals import remove_forward_hooks, tree_map, version_of


class _Recording:
    """Base class of the hooks: a part of the model that is copied and pickled with it."""


class BatchRecorder(_Recording):
    """A forward hook that remembers the last forward in training mode.

    It is one of the model's hooks, so it is copied and pickled with the model. A copy starts empty and inactive, so
    that it does not keep tensors alive that nobody uses; a controller that is copied with it activates it.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active
        self._seen: tuple[Any, ...] | None = None
        # What the modules have returned in the forward that is running; None outside of a forward that counts.
        self._running: dict[str, list[Any]] | None = None
        # Tensors of the last forward, and their versions; only in eager mode, where the code that runs is the user's.
        self._arguments: list[tuple[torch.Tensor, int]] = []
        self._results: list[tuple[torch.Tensor, int]] = []

    def attach(self, model: nn.Module) -> None:
        """Adds this hook, and one that runs before the forward, to a model."""
        model.register_forward_pre_hook(_Beginning(self), with_kwargs=True)
        model.register_forward_hook(self, with_kwargs=True)

    def attach_outputs(self, model: nn.Module, names: Iterable[str]) -> None:
        """Records what modules of the model return, too.

        Args:
            model: The model.
            names: Dotted names of modules.
        """
        for name in names:
            model.get_submodule(name).register_forward_hook(_OutputOf(self, name))

    def activate(self) -> None:
        """Starts to record."""
        self._active = True

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begins a forward of the model."""
        self._running = {} if self._records(module) else None
        if self._running is not None:
            self._arguments, self._results = _versions((args, kwargs)), []

    def note(self, name: str, outputs: Any) -> None:
        """Notes what a module has returned; a recomputation in the backward pass belongs to no forward.

        It is copied, because what comes behind the module may write to it: an activation function in place.
        """
        if self._running is not None:
            self._running.setdefault(name, []).append(tree_map(_copy, outputs))

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        """Called by torch after each forward of the model."""
        if self._records(module):
            self._seen = (args, kwargs, outputs, {} if self._running is None else self._running)
            self._results = _versions(outputs)
        self._running = None

    def _records(self, module: nn.Module) -> bool:
        return self._active and module.training and torch.is_grad_enabled()

    @property
    def batch(self) -> Batch | None:
        """The last forward in training mode; None before the first.

        Raises:
            UsageError: Inputs or outputs have been written to since, so that they are not those of the forward.
        """
        if self._seen is None:
            return None
        for what, tensors in (("an argument", self._arguments), ("an output", self._results)):
            changed = next((tensor for tensor, version in tensors if version_of(tensor) != version), None)
            if changed is not None:
                raise UsageError(
                    f"{what} of the model, of shape {tuple(changed.shape)}, has been written to in place during or "
                    "after the forward, and the loss needs it as it was: write to a copy (clone()), or pass "
                    "unchanged ones: controller.loss(outputs, *inputs)"
                )
        args, kwargs, outputs, _ = self._seen
        return Batch(args, kwargs, outputs, self.module_outputs)

    @property
    def module_outputs(self) -> dict[str, tuple[Any, ...]]:
        """What modules have returned in the last forward in training mode, by name, for each of their calls."""
        return {} if self._seen is None else {name: tuple(calls) for name, calls in self._seen[3].items()}

    def __deepcopy__(self, memo: Any) -> BatchRecorder:
        return BatchRecorder(active=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchRecorder, (False,)


class _Beginning(_Recording):
    """A forward pre-hook of the model: what was recorded of a forward that failed does not count."""

    def __init__(self, recorder: BatchRecorder) -> None:
        self._recorder = recorder

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._recorder.begin(module, args, kwargs)


class _OutputOf(_Recording):
    """A forward hook of a module inside the model."""

    def __init__(self, recorder: BatchRecorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> None:
        self._recorder.note(self._name, outputs)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _versions(value: Any) -> list[tuple[torch.Tensor, int]]:
    if torch.compiler.is_compiling():
        return []
    return [(tensor, version_of(tensor)) for tensor in tensors_of(value) if not tensor.is_inference()]


def remove_recorders(model: nn.Module) -> None:
    """Removes recorders, and the inactive ones of copies, from the hooks of a model."""
    for module in model.modules():
        remove_forward_hooks(module, _Recording)


def is_recording(hook: object) -> bool:
    """Returns whether a hook of a module is one that records for a loss."""
    return isinstance(hook, _Recording)
