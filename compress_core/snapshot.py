"""A model as it was: what makes `create_compressed_model` all or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.errors import ModelError


@dataclass
class _ModuleRecord:
    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    # Contents of the module's own containers (parameters, buffers, children, hooks): their identity stays, because
    # others, such as a removable hook handle, hold references to them.
    containers: list[tuple[Any, Any]]


@dataclass
class _TensorRecord:
    tensor: torch.Tensor
    storage: torch.Tensor
    values: torch.Tensor
    requires_grad: bool
    gradient: torch.Tensor | None


class ModelSnapshot:
    """Classes, attributes, hooks, flags and tensor contents of a model and its modules.

    It holds one copy of the parameters and buffers until it is dropped.

    Args:
        model: The model; it is not changed.

    Raises:
        ModelError: A parameter or buffer has no values (meta device, lazy and not initialized).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_record_module(module) for module in model.modules()]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._tensors = [_record_tensor(tensor) for tensor in tensors.values()]

    def restore(self) -> None:
        """Puts everything back, bit for bit. A Ctrl-C that arrives meanwhile is held until it is done."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as error:  # each step can be repeated, so begin again
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _restore(self) -> None:
        for record in self._modules:
            record.module.__class__ = record.cls
            record.module.__dict__.clear()
            record.module.__dict__.update(record.attributes)
            for container, contents in record.containers:
                container.clear()
                container.update(contents)
        for saved in self._tensors:
            saved.storage.copy_(saved.values)
            saved.tensor.data = saved.storage
            saved.tensor.requires_grad_(saved.requires_grad)
            saved.tensor.grad = saved.gradient

    def changed_tensors(self, model: nn.Module) -> list[str]:
        """Returns the names of tensors that were replaced, or whose values are not the same bits as before."""
        names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names.setdefault(id(tensor), name)
        changed = []
        for record in self._tensors:
            name = names.get(id(record.tensor), "")
            if not name:
                changed.append("a tensor that is no longer part of the model")
            elif not _same_bits(record.tensor.detach(), record.values):
                changed.append(name)
        return changed


def _record_module(module: nn.Module) -> _ModuleRecord:
    containers = [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, (dict, set))]
    return _ModuleRecord(module, type(module), dict(module.__dict__), containers)


def _record_tensor(tensor: torch.Tensor) -> _TensorRecord:
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        kind = "on the meta device" if tensor.is_meta else "lazy and not initialized"
        raise ModelError(
            f"a parameter of the model is {kind}: it has no values yet. Load its weights (meta: to_empty() and "
            "load_state_dict; lazy: one forward pass) before create_compressed_model"
        )
    storage = tensor.detach()
    return _TensorRecord(tensor, storage, storage.clone(), tensor.requires_grad, tensor.grad)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    # Comparing bytes tells NaN from NaN and -0.0 from 0.0 apart, as equality of floats would not.
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
