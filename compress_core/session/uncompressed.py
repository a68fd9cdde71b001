"""Provides the model as it was before compression: as a view of the compressed model if possible, else as a copy."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.initializer import Initializer
from compress_core.data.calibration import TeacherArgs
from compress_core.errors import ModelError, PluginError, UsageError
from compress_core.session.batch_recorder import remove_recorders
from compress_core.session.lifecycle import Lifecycle
from compress_core.transforms.model_wide import bypass_transforms, has_transforms
from compress_core.transforms.python_state import copied

logger = logging.getLogger(__name__)


class UncompressedModel:
    """Implements `compress_core.contract.services.UncompressedService`.

    The teacher is what the user has registered as `TeacherArgs`, else the copy of the uncompressed model.

    Args:
        lifecycle: Has the algorithms and initializers that may need the model.
        given: The uncompressed model, if the user passed one.

    Attributes:
        shapes: Shapes of the model's parameters before it was compressed, by name.

    Raises:
        ModelError: `given` is not a model, or is compressed itself; or the registered teacher is not a model.
        UsageError: A compression state is resumed, an algorithm needs the model in training, and it was not given; or a
            teacher that is not to be copied is not frozen.
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
        registered = lifecycle.context.config.get_extra_struct(TeacherArgs)
        if registered is not None and not self._lasts:
            logger.warning("a teacher is registered (TeacherArgs), and no algorithm of this config learns from one")
        self._teacher = _teacher_of(registered) if registered is not None and self._lasts else None
        self._is_own = registered is None or registered.copy
        if resuming and self._lasts and given is None and self._teacher is None:
            names = ", ".join(name for name, need in self._needed.items() if need == "training")
            raise UsageError(
                f"{names}: needs the uncompressed model in training, and a compression state does not hold it. Give it "
                "with its trained weights: create_compressed_model(..., compression_state=..., uncompressed_model=...)"
                ", or register the teacher: config.register_extra_structs([TeacherArgs(teacher)])"
            )
        self._given: nn.Module | None = given
        self._copy: nn.Module | None = None
        self._model: nn.Module | None = None
        self._creating = True
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> UncompressedModel:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for frozen in (self._copy, self._teacher):
            memo[id(frozen)] = frozen  # so it can serve both
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def before_commit(self, model: nn.Module) -> None:
        """Copies the model, which is still uncompressed, if a copy will be needed."""
        self._model = model
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        learns = self._lasts and self._teacher is None
        needed = learns or (not self._bypassable and any(need != "no" for need in self._needed.values()))
        if needed or (self._given is not None and any(need != "no" for need in self._needed.values())):
            source = model if self._given is None else self._given
            self._copy = copied(source).eval().requires_grad_(False)
            remove_recorders(self._copy)
        self._given = None

    @property
    def kept(self) -> nn.Module | None:
        """The frozen copy of the uncompressed model, if one is kept."""
        return self._copy

    def end_of_creation(self) -> None:
        """Ends the time in which `view` works, and frees the copy unless it is needed in training."""
        self._creating = False
        if not self._lasts or self._teacher is not None:
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
        teacher = self._copy if self._teacher is None else self._teacher
        if teacher is None:
            raise PluginError("context.teacher is available from compress_commit() on")
        if not self._is_own:
            _require_frozen(teacher)
        device, own = _device_of(self._model), _device_of(teacher)
        if device != own and None not in (device, own):
            if not self._is_own:
                raise UsageError(
                    f"the teacher (TeacherArgs) is on {own}, the compressed model on {device}; move it there"
                )
            teacher.to(device)
        return teacher

    def _check_declared(self, needs: tuple[str, ...]) -> None:
        if not any(need in needs for need in self._needed.values()):
            raise PluginError(
                f"no algorithm declares that it needs the uncompressed model: set needs_uncompressed = {needs[0]!r} in "
                f"the class that uses it; active here: {', '.join(self._needed)}"
            )


def _teacher_of(given: TeacherArgs) -> nn.Module:
    """Returns the model of a registered teacher, or a frozen copy of it."""
    if not isinstance(given.model, nn.Module):
        raise ModelError(f"TeacherArgs takes a torch.nn.Module, got {type(given.model).__name__}")
    if given.copy:
        return copied(given.model).eval().requires_grad_(False)
    _require_frozen(given.model)
    return given.model


def _require_frozen(teacher: nn.Module) -> None:
    training = next((name for name, module in teacher.named_modules() if module.training), None)
    learning = next((name for name, parameter in teacher.named_parameters() if parameter.requires_grad), None)
    if training is not None or learning is not None:
        what = f"its parameter '{learning}' requires a gradient" if training is None else "it is in training mode"
        raise UsageError(
            f"the teacher is used as it is, TeacherArgs(copy=False), and {what}: call "
            "teacher.eval().requires_grad_(False)"
        )


def _device_of(model: nn.Module | None) -> torch.device | None:
    return None if model is None else next((parameter.device for parameter in model.parameters()), None)
