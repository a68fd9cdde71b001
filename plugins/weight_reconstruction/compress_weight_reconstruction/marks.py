"""What several of the modes that follow a forward need: marks on tensors, and the tensors and names of a call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from compress_core.transforms.weight import parameter_places

_Value = TypeVar("_Value")


class Marks(Generic[_Value]):
    """Notes something about tensors, as long as they live."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[torch.Tensor], _Value]] = {}

    def set(self, tensor: torch.Tensor, value: _Value) -> None:
        """Notes a value, in place of the one before."""
        self._entries[id(tensor)] = weakref.ref(tensor), value

    def get(self, tensor: Any) -> _Value | None:
        """Returns what was noted about this very tensor, or None."""
        reference, value = self._entries.get(id(tensor), (None, None))
        return value if reference is not None and reference() is tensor else None


def tensors_in(structure: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in the arguments or the result of a call."""
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from tensors_in(item)
    elif isinstance(structure, dict):
        yield from tensors_in(list(structure.values()))


def first_names(model: nn.Module) -> dict[int, str]:
    """Returns the name under which a parameter is known, that with its first owner, by `id(parameter)`."""
    places = parameter_places(model)
    return {key: f"{owner}.{name}" if owner else name for key, ((owner, _, name), *_) in places.items()}
