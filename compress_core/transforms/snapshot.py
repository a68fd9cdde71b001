"""Snapshots of a model, from which `create_compressed_model` restores it after an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.errors import ModelError
from compress_core.torch_internals import TENSOR_HOOK_ATTRIBUTES, FakeTensor
from compress_core.transforms.containers import SavedContainer, container_base
from compress_core.transforms.interrupts import interrupts_held
from compress_core.transforms.python_state import PythonState

logger = logging.getLogger(__name__)

# What `changed_tensors` calls a tensor that has no name any more.
GONE = "a tensor that is no longer part of the model"


@dataclass
class _ModuleRecord:
    module: nn.Module
    cls: type[nn.Module]
    # The attributes, and the contents of those that are containers (parameters, buffers, children, hooks, lists). The
    # containers themselves must stay the same objects, because for example removable hook handles refer to them.
    containers: list[SavedContainer]


@dataclass
class SavedTensor:
    """The values, storage, gradient and hooks of a tensor; made by `save_tensor`."""

    tensor: torch.Tensor
    storage: torch.Tensor
    values: torch.Tensor
    requires_grad: bool
    gradient: torch.Tensor | None
    gradient_values: torch.Tensor | None
    # The dict of each kind of hooks, None where there has been none, and what was in it: handles refer to the dict.
    hooks: dict[str, tuple[Any, dict[Any, Any]]]

    def restore(self) -> None:
        """Restores all of it; a tensor that has not changed is not written to."""
        _restore_tensor(self)


class StructureSnapshot:
    """A snapshot of classes, attributes, modes and hooks of a model's modules, without values of tensors.

    Args:
        model: The model; it is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_record_module(module) for module in model.modules()]

    def restore(self) -> None:
        """Restores everything."""
        for record in self._modules:
            _attempt(lambda record=record: _restore_module(record))  # type: ignore[misc]


class ModelSnapshot:
    """A snapshot of classes, attributes, hooks, flags and tensor values of a model and its modules.

    Recorded are parameters, buffers, tensors that are plain attributes, gradients and hooks of these; and what else the
    model keeps in Python objects (`PythonState`). It holds one copy of all that until it is dropped.

    Args:
        model: The model; it is not changed.

    Raises:
        ModelError: A parameter or buffer has no values (meta device, fake, lazy and not initialized).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_record_module(module) for module in model.modules()]
        self._state = PythonState(model)
        tensors = {id(t): (name, t) for name, t in _tensors_of(model)}
        self._tensors = [save_tensor(name, tensor) for name, tensor in tensors.values()]

    def restore(self) -> None:
        """Restores everything, bit for bit; a Ctrl-C in the meantime is delayed until it is done."""
        with interrupts_held():
            for record in self._modules:
                _attempt(lambda record=record: _restore_module(record))  # type: ignore[misc]
            _attempt(self._state.restore)
            for saved in self._tensors:
                _attempt(lambda saved=saved: _restore_tensor(saved))  # type: ignore[misc]

    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors of which this is a snapshot."""
        return [saved.tensor for saved in self._tensors]

    def saved_tensor(self, tensor: torch.Tensor) -> SavedTensor | None:
        """Returns the copy of a tensor that belonged to the model, or None."""
        return next((saved for saved in self._tensors if saved.tensor is tensor), None)

    def changed_tensors(self, model: nn.Module) -> list[str]:
        """Returns the names of tensors that were replaced or whose bits have changed."""
        names = {id(tensor): name for name, tensor in reversed(list(_tensors_of(model)))}
        changed = []
        for record in self._tensors:
            name = names.get(id(record.tensor), "")
            if not name:
                changed.append(GONE)
            elif not _same_bits(record.tensor.detach(), record.values):
                changed.append(name)
        return changed


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for prefix, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def _record_module(module: nn.Module) -> _ModuleRecord:
    containers = [module.__dict__, *(value for value in module.__dict__.values() if container_base(value) is not None)]
    return _ModuleRecord(module, type(module), [SavedContainer(container) for container in containers])


def save_tensor(name: str, tensor: torch.Tensor) -> SavedTensor:
    """Returns a copy of a tensor from which it can be restored.

    Raises:
        ModelError: The tensor has no values (meta device, fake, lazy and not initialized).
    """
    if torch.nn.parameter.is_lazy(tensor):
        raise ModelError(
            f"the parameter '{name}' is lazy and not initialized: it has no values yet. Do one forward pass before "
            "create_compressed_model"
        )
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise ModelError(
            f"the tensor '{name}' is on the meta device or fake: it has no values. Materialize the model (to_empty()) "
            "and load its weights before create_compressed_model"
        )
    storage = tensor.detach()
    gradient = tensor.grad if tensor.is_leaf else None
    copied = None if gradient is None else gradient.detach().clone()
    found = {kind: getattr(tensor, kind, None) for kind in TENSOR_HOOK_ATTRIBUTES}
    hooks = {kind: (held, dict(held or {})) for kind, held in found.items()}
    return SavedTensor(tensor, storage, storage.clone(), tensor.requires_grad, gradient, copied, hooks)


def _attempt(step: Callable[[], None]) -> None:
    """Runs a step and logs its exception, so that one failure does not keep the rest from being restored."""
    try:
        step()
    except Exception:
        logger.exception("rolling back: a part of the model could not be restored")


def _restore_module(record: _ModuleRecord) -> None:
    # Not by assignment: a module may have a __setattr__ of its own.
    object.__setattr__(record.module, "__class__", record.cls)
    for container in record.containers:
        container.restore()


def _restore_tensor(saved: SavedTensor) -> None:
    with torch.no_grad(), torch.inference_mode(saved.tensor.is_inference()):
        if not _same_bits(saved.storage, saved.values):
            _overwrite(saved.storage, saved.values)
        if memory_of(saved.tensor) != memory_of(saved.storage):
            saved.tensor.data = saved.storage
    if saved.tensor.requires_grad != saved.requires_grad:
        saved.tensor.requires_grad_(saved.requires_grad)
    if saved.gradient is not None and saved.gradient_values is not None:
        if not _same_bits(saved.gradient.detach(), saved.gradient_values):
            _overwrite(saved.gradient.detach(), saved.gradient_values)
        saved.tensor.grad = saved.gradient
    elif saved.tensor.is_leaf and saved.tensor.grad is not None:
        saved.tensor.grad = None
    for kind, (held, contents) in saved.hooks.items():
        if held is not None:
            held.clear()
            held.update(contents)
        if getattr(saved.tensor, kind, None) is not held:
            setattr(saved.tensor, kind, held)


def memory_of(tensor: torch.Tensor) -> tuple[int, torch.Size | None]:
    """Returns the address and the shape of a tensor, which `tensor.data = ...` changes; (0, None) without memory."""
    try:
        return tensor.data_ptr(), tensor.shape
    except RuntimeError:  # sparse, nested, or a subclass without storage
        return 0, None


def _overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        # An expanded tensor cannot be written to as a whole, so only its stored elements are written.
        index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        tensor, values = tensor[index], values[index]
    tensor.copy_(values)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.is_nested or right.is_nested:
        return left is right or all(_same_bits(a, b) for a, b in zip(left.unbind(), right.unbind(), strict=True))
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    if left.is_quantized:
        left, right = left.int_repr(), right.int_repr()
    elif left.layout != torch.strided:
        left, right = left.to_dense(), right.to_dense()
    # Comparing bits tells NaN from NaN and -0.0 from 0.0 apart, as equality of floats would not.
    return all(torch.equal(a, b) for a, b in zip(_words(left), _words(right), strict=True))


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the bits of a tensor in words of eight bytes, which compare five times as fast as bytes, and the rest."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    return flat[:whole].view(torch.int64), flat[whole:]
