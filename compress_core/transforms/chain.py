"""Chains: the transforms of one tensor, applied one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.torch_internals import has_hooks
from compress_core.transforms.base import ActivationTransform, WeightTransform
from compress_core.transforms.checkpoints import (
    Awaited,
    awaits_checkpoint,
    count_chains,
    loading_of,
    may_be_shared,
    saved_before,
)


class TransformChain(nn.Module):
    """The transforms of one tensor, applied in the order of their stages.

    Children are named by key (normally the algorithm's name), so that the names of their buffers in a checkpoint do
    not depend on what else is in the chain.

    Attributes:
        bypassed: Whether tensors are returned as they are.
        places: Number of places of the chain: layers with tied weights share one.
        awaited: While a resumed model waits for its checkpoint, what it waits for.
        computes: Name of the activation function in whose place the first transform stands; empty if in none's.
    """

    awaited: Awaited | None = None
    computes: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.bypassed = False
        self.places = 0
        self._stages: dict[str, int] = {}

    def add(self, key: str, transform: nn.Module, stage: int) -> None:
        """Inserts `transform` after all transforms of the same or an earlier stage.

        One that stands in the place of an activation function becomes the first.
        """
        # Not add_module: it refuses names that the chain has as attributes, such as "add" or "training".
        self._modules[key] = transform
        count_chains(transform, 1)
        self._stages[key] = stage
        self._order()

    def discard(self, key: str) -> None:
        """Removes the transform `key` from the chain."""
        count_chains(self.get_submodule(key), -1)
        del self._modules[key]
        del self._stages[key]
        self._order()

    def replace(self, key: str, transform: nn.Module) -> None:
        """Puts another transform in the place of the transform `key`."""
        count_chains(self.get_submodule(key), -1)
        self._modules[key] = transform.train(self.training)
        count_chains(transform, 1)
        self._order()

    def _order(self) -> None:
        computing = {name: computed_activation(transform) for name, transform in self._modules.items()}
        in_order = sorted(self._modules, key=lambda name: (not computing[name], self._stages[name]))  # it is stable
        for name in in_order:
            self._modules[name] = self._modules.pop(name)
        self.computes = computing[in_order[0]] if in_order else ""

    def stage_of(self, key: str) -> int:
        """Returns the stage of the transform `key`."""
        return self._stages[key]

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maps the tensor of the uncompressed model to the tensor that the compressed model computes with."""
        if self.awaited is not None:
            self._check_awaited()
        if self.bypassed:
            return tensor
        self._check_called()
        for transform in self._modules.values():
            tensor = transform(tensor)  # type: ignore[misc]
        return tensor

    def computed(self, argument: torch.Tensor) -> torch.Tensor:
        """Maps the argument of the activation function `computes` to what takes the place of its result."""
        if self.awaited is not None:
            self._check_awaited()
        for transform in self._modules.values():
            argument = transform(argument)  # type: ignore[misc]
        return argument

    def up_to(self, tensor: torch.Tensor, stage: int | None) -> torch.Tensor:
        """Applies the transforms of stages before `stage` (None for all stages), even if the chain is bypassed."""
        for key, transform in self._modules.items():
            if stage is None or self._stages[key] < stage:
                tensor = transform(tensor)  # type: ignore[misc]
        return tensor

    def forward_owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Does what `forward` does, for a tensor without other readers, which transforms may therefore overwrite."""
        if self.awaited is not None:
            self._check_awaited()
        if self.bypassed:
            return tensor
        self._check_called()
        for transform in self._modules.values():
            if isinstance(transform, ActivationTransform) and transform.owns_input and not has_hooks(transform):
                tensor = transform.forward_owned(tensor)
            else:
                tensor = transform(tensor)  # type: ignore[misc]
        return tensor

    def fuses(self, activation: str, *, in_place: bool) -> bool:
        """Returns whether the first transform can also compute the activation function before it.

        Args:
            activation: Name of the activation function.
            in_place: Whether the function works in place; then the chain must have no other transform.
        """
        if self.bypassed or self.computes:
            return False
        for first in self._modules.values():  # not next(iter(...)), which torch.compile of 2.8 cannot follow
            if not isinstance(first, ActivationTransform) or has_hooks(first):
                return False
            if in_place and not (len(self._modules) == 1 and first.fuses_in_place):
                return False
            return activation in first.fused_activations
        return False

    def forward_fused(self, tensor: torch.Tensor, activation: str, in_place: bool) -> torch.Tensor:
        """Returns `forward` of the activated tensor; the first transform computes both in one pass."""
        if self.awaited is not None:
            self._check_awaited()
        first = True
        for transform in self._modules.values():
            if first and isinstance(transform, ActivationTransform):
                fused = transform.fused_in_place if in_place else transform.fused
                tensor = fused(tensor, activation)
            else:
                tensor = transform(tensor)  # type: ignore[misc]
            first = False
        return tensor

    @property
    def first_name(self) -> str:
        """The name under which users know the first transform, or its key."""
        return next((getattr(transform, "label", "") or key for key, transform in self._modules.items()), "")

    def _check_called(self) -> None:
        if self.computes:
            raise TransformError(
                f"'{self.first_name}' computes the activation function '{self.computes}' itself and was given its "
                "result: here no transform can take the place of the function; name this one in ignored_scopes"
            )

    def _check_awaited(self) -> None:
        if not torch.compiler.is_compiling() and self.awaited is not None:
            self.awaited.say()
            if not any(awaits_checkpoint(transform) for transform in self.children()):
                self.awaited = None

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Returns or fills a `state_dict`, as torch does, except for transforms that it has from another place."""
        result = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, transform in self.named_children() if destination is not None else ():
            shared = self.places > 1 or may_be_shared(transform)
            if shared and saved_before(destination, transform):
                for name in transform.state_dict():
                    del destination[f"{prefix}{key}.{name}"]
        return result


def computed_activation(transform: nn.Module | None) -> str:
    """Returns the activation function in whose place a transform stands, or the empty string."""
    return transform.computes_activation if isinstance(transform, ActivationTransform) else ""


class TransformContainer(nn.Module):
    """The chains of one module, by name.

    A `state_dict` without any key of any transform (that of the plain FP32 model) loads strictly and does not change
    the transforms. One that has only some of the transforms, or some keys of one, is incomplete, and torch refuses
    it as usual. A transform that is at several places needs to be there for one of them.
    """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        loading = loading_of(missing_keys)
        for name, chain in self.named_children():
            for key, transform in chain.named_children():
                own_prefix = f"{prefix}{name}.{key}."
                _adopt(state_dict, f"{prefix}{name}.", chain, key, transform)
                if any(entry.startswith(own_prefix) for entry in state_dict):
                    loading.note_found(transform, missing_keys)
                elif own := transform.state_dict(prefix=own_prefix):
                    loading.note_absent(transform, list(own))
                    # This dict belongs to this call alone, so entries added here are seen only by our children.
                    state_dict.update(own)
        loading.report(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)


def _adopt(state_dict: dict[str, Any], prefix: str, chain: nn.Module, key: str, transform: nn.Module) -> None:
    """Replaces entries of transforms that a chain does not have by those that one of its own makes of them.

    Args:
        state_dict: The entries for the chain's container; it belongs to the caller.
        prefix: The chain's prefix in it.
        chain: The chain.
        key: Key of the transform.
        transform: The transform.
    """
    if not isinstance(transform, WeightTransform):
        return
    others: dict[str, dict[str, torch.Tensor]] = {}
    for entry, value in state_dict.items():
        owner, _, name = entry.removeprefix(prefix).partition(".")
        if entry.startswith(prefix) and owner == key:
            return
        if entry.startswith(prefix) and owner not in chain._modules and isinstance(value, torch.Tensor):
            others.setdefault(owner, {})[name] = value
    found = transform.adopted(others) if others else None
    if found is None:
        return
    used, entries = found
    for owner in used:
        for name in others[owner]:
            del state_dict[f"{prefix}{owner}.{name}"]
    state_dict.update({f"{prefix}{key}.{name}": value for name, value in entries.items()})
