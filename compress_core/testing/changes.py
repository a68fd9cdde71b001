"""What compression has changed in a model, by name, and whether a plan says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.contract.algorithm import Plan
from compress_core.session.controller import CompressionController
from compress_core.transforms.activation import activation_transforms
from compress_core.transforms.chain import TransformChain, TransformContainer

# What names of targets end with: `conv1|WEIGHT`, `model/relu#0|OUTPUT`, `lstm 0|OUTPUT`, `bn1: output`.
_BEHIND_THE_NAME = re.compile(r"[|/: ]")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OTHER_VALUES = "has other values"


def transform_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Returns how the names of what belongs to transforms begin."""
    names = (name for name, module in model.named_modules() if isinstance(module, TransformContainer))
    return tuple(f"{name}." for name in names)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers that belong to no transform, under all their names."""
    inside = transform_prefixes(model)
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in found.items() if not name.startswith(inside)}


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that belong to no transform."""
    inside = transform_prefixes(model)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not f"{name}.".startswith(inside)
    }


def plans_of(controller: CompressionController) -> dict[str, Plan]:
    """Returns the plans by algorithm."""
    return controller._lifecycle.plans


def initializers_change_in_place(controller: CompressionController) -> bool:
    """Returns whether a shared initializer of the model declares that it writes to the model's own parameters."""
    return any(initializer.changes_in_place for initializer in controller._lifecycle.initializers.values())


class Changes:
    """Compares a model with what it was when this was made.

    Args:
        model: The uncompressed model.
        adapted: Whether the statistics of batch norm may change.
    """

    def __init__(self, model: nn.Module, *, adapted: bool = False) -> None:
        self._modules = own_modules(model)
        self._tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in own_tensors(model).items()}
        self._adapted = adapted

    def found(self, model: nn.Module) -> dict[str, str]:
        """Returns the name of everything that has changed -> what has happened to it."""
        found = dict(self._replaced(model)) | dict(self._written(model))
        for name, chain in model.named_modules(remove_duplicate=False):
            owner, marker, parameter = name.rpartition("weight_transforms.")
            if isinstance(chain, TransformChain) and marker and owner[-1:] in ("", "."):
                found[f"{owner}{parameter}"] = "has a transform"
        for handle in activation_transforms(model):
            found[f"{handle.place.module}:{handle.place}"] = "has a transform"
        return found

    def _replaced(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        now = own_modules(model)
        for name in {**self._modules, **now}:
            if self._modules.get(name) is not now.get(name):
                yield name, "is another module" if name in self._modules and name in now else "is new, or gone"

    def _written(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        now = own_tensors(model)
        for name in {**self._tensors, **now}:
            if self._adapted and name.rpartition(".")[2] in _STATISTICS:
                continue
            if name not in self._tensors or name not in now:
                yield name, "is new, or gone"
            elif now[name] is not self._tensors[name][0]:
                yield name, "is another tensor"
            elif not same_bits(now[name], self._tensors[name][1]):
                yield name, OTHER_VALUES

    def aliases(self) -> dict[str, set[str]]:
        """Returns, for each name of a tensor, all names of that tensor."""
        names: dict[int, set[str]] = {}
        for name, (tensor, _) in self._tensors.items():
            names.setdefault(id(tensor), set()).add(name)
        return {name: names[id(tensor)] for name, (tensor, _) in self._tensors.items()}


def heads(target: str) -> set[str]:
    """Returns the dotted names that the name of a target may mean; the model itself is the empty one."""
    head = _BEHIND_THE_NAME.split(target)[0]
    return {head, ""} if head == "model" else {head}


def covers(target: str, change: str) -> bool:
    """Tells whether a change belongs to a target: the same tensor, its module, or what stands in its place."""
    module, _, place = change.partition(":")
    if place:
        return module in heads(target)
    return any(
        change == head or (head and (f"{change}.".startswith(f"{head}.") or f"{head}.".startswith(f"{change}.")))
        for head in heads(target)
    )


def strings_in(value: Any) -> set[str]:
    """Returns every string in JSON-able values: a plan's details name what is changed together with a target."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return {text for part in value.values() for text in strings_in(part)} | {str(key) for key in value}
    if isinstance(value, Iterable):
        return {text for part in value for text in strings_in(part)}
    return set()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tells whether two tensors hold the same bits."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
