"""Computes transformed weights again in the backward pass, instead of keeping them for it.

For the gradient of its input a layer needs its weight. A transformed weight is a separate tensor, so between forward
and backward each compressed layer would hold its weight twice; for large models and small batches that is most of the
memory that compression costs. Computing it again takes as long as one or two elementwise operators.

This is done on request (`recompute_weights`), if every transform of the weight declares `recomputable = True`, in
layers that only multiply with their weight, and if nothing else controls what is kept for the backward pass
(checkpointing, offloading, compilers).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from compress_core.torch_internals import (
    has_hooks,
    is_any_autocast_enabled,
    is_plain_execution,
    is_view,
    may_set_saved_tensors_hooks,
    storage_identity,
    version_of,
)
from compress_core.transforms.base import WeightTransform
from compress_core.transforms.chain import TransformChain

# Layers whose forward is one operator that keeps only its input and its weight for the backward pass.
_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FORWARDS = [layer.forward for layer in _LAYERS]

# Attributes of these types are compared by value, others by identity.
_SIMPLE = (bool, int, float, str, tuple)


class _LayerOfThread(threading.local):
    """The transformed weights of the layer that runs in this thread; None where none has to be noted."""

    weights: _Weights | None = None


_current_layer = _LayerOfThread()


def layer_forward(base: type[nn.Module]) -> Callable[..., Any] | None:
    """Returns a forward for subclasses of `base` with a transformed weight; None if the weight has to be kept."""
    if all(base.forward is not known for known in _FORWARDS):
        return None
    original: Callable[..., Any] = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_wanted(self) or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _may_hook():
            return original(self, *args, **kwargs)
        weights = _Weights()
        _current_layer.weights = weights
        try:
            with saved_tensors_hooks(weights.pack, unpacked):
                return original(self, *args, **kwargs)
        finally:
            _current_layer.weights = None
            weights.close()

    return forward


def note(chain: TransformChain, weight: torch.Tensor, result: torch.Tensor) -> None:
    """Takes notice of what a chain has made of a weight, for the layer that is running in this thread."""
    weights = _current_layer.weights
    if weights is not None and is_recomputable(chain):
        weights.add(chain, weight, result)


def is_recomputable(chain: TransformChain) -> bool:
    """Returns whether all transforms of a chain declare that they compute the same each time."""
    return not chain.bypassed and all(
        isinstance(transform, WeightTransform) and transform.recomputable and not has_hooks(transform)
        for transform in chain._modules.values()
    )


def _is_wanted(layer: nn.Module) -> bool:
    chains = layer._modules.get("weight_transforms")
    chain = None if chains is None else chains._modules.get("weight")
    return chain is not None and bool(getattr(chain, "recompute", False))


def _may_hook() -> bool:
    return (
        _current_layer.weights is None
        and is_plain_execution()
        # If other hooks are set, they control what is kept. Under autocast, layers keep a copy of their weight.
        and may_set_saved_tensors_hooks()
        and not is_any_autocast_enabled()
    )


class _Kept(NamedTuple):
    """A tensor that is kept, and its version, which torch does not check when hooks are set."""

    tensor: torch.Tensor
    version: int


class _Recipe(NamedTuple):
    """How to compute a transformed weight again, and the memory layout in which the layer kept it."""

    chain: TransformChain
    weight: torch.Tensor
    state: tuple[Any, ...]
    strides: tuple[int, ...]
    view: tuple[tuple[int, ...], tuple[int, ...], int]


class _Weights:
    """The transformed weights of a layer that is running."""

    def __init__(self) -> None:
        # Held until the layer is done, so that no other tensor gets the same memory.
        self._results: dict[int, tuple[TransformChain, torch.Tensor, torch.Tensor]] = {}

    def add(self, chain: TransformChain, weight: torch.Tensor, result: torch.Tensor) -> None:
        if is_view(result) or storage_identity(result) == storage_identity(weight):
            return  # disabled, or observed: there is nothing to save
        self._results[storage_identity(result)] = chain, weight, result

    def close(self) -> None:
        self._results.clear()

    def pack(self, tensor: torch.Tensor) -> _Kept | _Recipe:
        """Called by torch with each tensor that the layer's operators keep."""
        found = self._results.get(storage_identity(tensor))
        if found is None or tensor.dtype != found[2].dtype:
            return _Kept(tensor, version_of(tensor))
        chain, weight, result = found
        view = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return _Recipe(chain, weight, _state(chain, weight), result.stride(), view)


def unpacked(packed: _Kept | _Recipe) -> torch.Tensor:
    """Called by torch in the backward pass with what `_Weights.pack` returned.

    Raises:
        RuntimeError: The weight or a transform has changed since the forward, so gradients would be wrong.
    """
    if isinstance(packed, _Kept):
        if version_of(packed.tensor) != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(packed.tensor.shape)}, kept by a compressed layer, is at version "
                f"{version_of(packed.tensor)}; expected version {packed.version} instead"
            )
        return packed.tensor
    if _state(packed.chain, packed.weight) != packed.state:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified: a weight of shape "
            f"{tuple(packed.weight.shape)}, or what transforms it, was changed between the forward and the backward "
            "pass (an optimizer step, a step of a scheduler, a switch); make it after the backward pass"
        )
    with torch.no_grad():
        result = TransformChain.forward(packed.chain, packed.weight)
        if result.stride() != packed.strides:  # the memory format of the parameter has changed
            result = torch.empty_strided(result.shape, packed.strides, dtype=result.dtype, device=result.device).copy_(
                result
            )
        return result.as_strided(*packed.view)


def _state(chain: TransformChain, weight: torch.Tensor) -> tuple[Any, ...]:
    """Returns everything that the result depends on: versions of tensors, and attributes."""
    state: list[Any] = [id(weight), version_of(weight)]
    for module in chain.modules():
        for stored in (module._parameters, module._buffers):
            state.extend((id(tensor), version_of(tensor)) for tensor in stored.values() if tensor is not None)
        for name, value in module.__dict__.items():
            if name != "training":
                state.append(value if isinstance(value, _SIMPLE) else id(value))
    return tuple(state)
