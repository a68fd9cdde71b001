"""Provides the model as it was before compression: as a view of the compressed model if possible, else as a copy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.initializer import Initializer
from compress_core.errors import ModelError, PluginError, UsageError
from compress_core.session.lifecycle import Lifecycle
from compress_core.transforms.model_wide import bypass_transforms, has_transforms
from compress_core.transforms.python_state import copied


class UncompressedModel:
    """Implements `compress_core.contract.services.UncompressedService`.

    Args:
        lifecycle: Has the algorithms and initializers that may need the model.
        given: The uncompressed model, if the user passed one.

    Raises:
        ModelError: `given` is not a model, or is compressed itself.
        UsageError: A compression state is resumed, an algorithm needs the model in training, and it was not given.
    """

    def __init__(self, lifecycle: Lifecycle, given: Any = None) -> None:
        if given is not None and not isinstance(given, nn.Module):
            raise ModelError(f"uncompressed_model must be a torch.nn.Module, got {type(given).__name__}")
        if given is not None and has_transforms(given):
            raise ModelError("uncompressed_model is compressed itself; give the model as it was before compression")
        members: list[Algorithm | Initializer] = [*lifecycle.algorithms, *lifecycle.initializers.values()]
        self._needed = {member.name: member.needs_uncompressed for member in members}
        self._lasts = "training" in self._needed.values()
        resuming, self._bypassable = lifecycle.context.resuming, lifecycle.context.bypassable
        if resuming and self._lasts and given is None:
            names = ", ".join(name for name, need in self._needed.items() if need == "training")
            raise UsageError(
                f"{names}: needs the uncompressed model in training, and a compression state does not hold it. Give it "
                "with its trained weights: create_compressed_model(..., compression_state=..., uncompressed_model=...)"
            )
        self._given: nn.Module | None = given
        self._copy: nn.Module | None = None
        self._model: nn.Module | None = None
        self._creating = True

    def __deepcopy__(self, memo: dict[int, Any]) -> UncompressedModel:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._copy)] = self._copy  # it is frozen, so it can serve both
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def before_commit(self, model: nn.Module) -> None:
        """Copies the model, which is still uncompressed, if a copy will be needed."""
        self._model = model
        needed = self._lasts or (not self._bypassable and "creation" in self._needed.values())
        if needed or (self._given is not None and any(need != "no" for need in self._needed.values())):
            source = model if self._given is None else self._given
            self._copy = copied(source).eval().requires_grad_(False)
        self._given = None

    def end_of_creation(self) -> None:
        """Ends the time in which `view` works, and frees the copy unless it is needed in training."""
        self._creating = False
        if not self._lasts:
            self._copy = None

    @contextlib.contextmanager
    def view(self) -> Iterator[nn.Module]:
        """See `Context.uncompressed`."""
        self._check_declared(("creation", "training"))
        if self._copy is not None:
            yield self._copy
            return
        if self._model is None or not self._creating:
            raise PluginError(
                "the uncompressed model is available only while the model is being created; for later, declare "
                'needs_uncompressed = "training" and use context.teacher'
            )
        with bypass_transforms(self._model):
            yield self._model

    def teacher(self) -> nn.Module:
        """See `Context.teacher`."""
        self._check_declared(("training",))
        if self._copy is None:
            raise PluginError("context.teacher is available from compress_commit() on")
        device, own = _device_of(self._model), _device_of(self._copy)
        if device != own and device is not None:
            self._copy.to(device)
        return self._copy

    def _check_declared(self, needs: tuple[str, ...]) -> None:
        if not any(need in needs for need in self._needed.values()):
            raise PluginError(
                f"no algorithm declares that it needs the uncompressed model: set needs_uncompressed = {needs[0]!r} in "
                f"the class that uses it; active here: {', '.join(self._needed)}"
            )


def _device_of(model: nn.Module | None) -> torch.device | None:
    return None if model is None else next((parameter.device for parameter in model.parameters()), None)
