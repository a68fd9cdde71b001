"""In eval mode a weight is transformed once, and again only when something changed.

A cache that is wrong once is worse than none, so it is used only where a change can be seen: dense CPU tensors, no
gradients, nothing that traces or wraps tensors, and transforms that declare `cacheable = True`. Watched are identity,
address, version and strides of every tensor that goes in and of the one that came out, and the attributes of the
transforms. Writes through `.data` bump no version: samples of the values are compared as well, all of them for
small tensors, some 16 of large ones. A write through `.data` to a few elements of a large tensor goes unnoticed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_core.torch_internals import has_forward_hooks, is_plain_execution, version_of
from compress_core.transforms.base import WeightTransform
from compress_core.transforms.chain import TransformChain
from compress_core.transforms.recomputation import note

_SAMPLES = 16
# Attributes of these types may be replaced by equal ones; of others, the object has to be the same.
_SIMPLE = (bool, int, float, str, bytes, torch.dtype, torch.device)
_MEMORY_FORMATS = ((torch.contiguous_format, 0), (torch.channels_last, 4), (torch.channels_last_3d, 5))
_ENTRY = "_entry"
_MISSING = object()
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A module's own bookkeeping, which is looked at elsewhere or has no effect on what it computes.
_BOOKKEEPING = frozenset((*vars(nn.Module()), _ENTRY))


class _Watched:
    """A tensor as it was."""

    __slots__ = ("address", "reference", "sample", "strides", "values", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self.address = tensor.data_ptr()
        self.strides = tensor.stride()
        self.version = version_of(tensor)
        self.sample = _sample(tensor)
        self.values = self.sample.tobytes()

    def is_unchanged(self, tensor: torch.Tensor) -> bool:
        return (
            self.reference() is tensor
            and self.version == version_of(tensor)
            and self.address == tensor.data_ptr()
            and self.strides == tensor.stride()
            # Only now is it sure that the sample still shows the tensor's memory.
            and self.sample.tobytes() == self.values
        )


class _WatchedModule:
    """A chain, or one of the modules in it, as it was."""

    __slots__ = ("attributes", "children", "module", "size", "tensors")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.size = len(module.__dict__)
        self.children = list(module._modules.values())
        self.attributes = [(n, v) for n, v in module.__dict__.items() if n not in _BOOKKEEPING]
        self.tensors = [(tensor, _Watched(tensor)) for tensor in _tensors_of(module)]

    def is_unchanged(self) -> bool:
        module = self.module
        attributes = module.__dict__
        if module.training or has_forward_hooks(module) or len(attributes) != self.size:
            return False
        for name, value in self.attributes:
            now = attributes.get(name, _MISSING)
            if now is not value and not (isinstance(now, _SIMPLE) and now == value):
                return False
        if list(module._modules.values()) != self.children:
            return False
        now_tensors = _tensors_of(module)
        return len(now_tensors) == len(self.tensors) and all(
            now is tensor and watched.is_unchanged(now)
            for now, (tensor, watched) in zip(now_tensors, self.tensors, strict=True)
        )


class _Entry:
    """A transformed weight and all that it was computed from."""

    def __init__(self, chain: nn.Module, tensor: torch.Tensor, result: torch.Tensor) -> None:
        self.result = result
        self.watched_result = _Watched(result)
        self.source = _Watched(tensor)
        self.modules = [_WatchedModule(module) for module in chain.modules()]
        self.surroundings = _surroundings()

    def is_valid(self, tensor: torch.Tensor) -> bool:
        return (
            self.source.is_unchanged(tensor)
            and self.watched_result.is_unchanged(self.result)
            and not self.result.requires_grad
            and self.surroundings == _surroundings()
            and all(module.is_unchanged() for module in self.modules)
        )


class WeightChain(TransformChain):
    """The transforms of a weight; in eval mode their result is kept while nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False  # see `recomputation`
        self.__dict__[_ENTRY] = None

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maps the stored parameter to the tensor that the layer computes with; the shape stays."""
        if torch.compiler.is_compiling():
            return super().forward(tensor)
        if self.training or torch.is_grad_enabled() or self.bypassed:
            result = super().forward(tensor)
            if self.recompute:
                note(self, tensor, result)
            return result
        if not is_plain_execution():
            return super().forward(tensor)
        entry: _Entry | None = self.__dict__[_ENTRY]
        if entry is not None and entry.is_valid(tensor):
            return entry.result
        self.drop_cache()
        inputs = [tensor, *(item for module in self.modules() for item in _tensors_of(module))]
        if not self._is_cacheable() or not all(_can_be_watched(item) for item in inputs):
            return super().forward(tensor)
        return self._renewed(tensor, inputs)

    def _renewed(self, tensor: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode have no version
            result = super().forward(tensor)
        address = result.data_ptr()
        if _can_be_watched(result) and not result.requires_grad and all(i.data_ptr() != address for i in inputs):
            self.__dict__[_ENTRY] = _Entry(self, tensor, result)
        return result

    def _is_cacheable(self) -> bool:
        transforms = self._modules.values()
        return all(isinstance(item, WeightTransform) and item.cacheable for item in transforms) and not any(
            module.training
            or has_forward_hooks(module)
            or any(isinstance(value, torch.Tensor) for value in module.__dict__.values())
            for module in self.modules()
        )

    def drop_cache(self) -> None:
        """Forgets the kept weight."""
        self.__dict__[_ENTRY] = None

    def add(self, key: str, transform: nn.Module, stage: int) -> None:
        """Inserts `transform` behind everything of the same or an earlier stage."""
        self.drop_cache()
        super().add(key, transform, stage)

    def discard(self, key: str) -> None:
        """Takes the transform `key` out of the chain."""
        self.drop_cache()
        super().discard(key)

    def train(self, mode: bool = True) -> WeightChain:
        """Sets the mode; the kept weight is given up."""
        self.drop_cache()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> WeightChain:
        self.drop_cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _ENTRY: None}


def _can_be_watched(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_inference()
        and tensor.element_size() in _INTEGERS
        and tensor.numel() > 0
        and _is_dense(tensor)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    return any(
        tensor.is_contiguous(memory_format=memory_format)
        for memory_format, dimensions in _MEMORY_FORMATS
        if dimensions in (0, tensor.dim())
    )


def _sample(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns a view of some elements, as integers of their size, in the order of memory."""
    count = tensor.numel()
    flat = tensor.detach().as_strided((count,), (1,)).view(_INTEGERS[tensor.element_size()])
    step = 1 if count <= 4 * _SAMPLES else count // _SAMPLES
    sample: np.ndarray[Any, Any] = flat[::step].numpy()
    return sample


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    stored = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in stored if tensor is not None]


def _surroundings() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
