"""The tensors in what models and layers return, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from compress_core import ModelError
from compress_core.data.structures import named_entries, tensors_of


def by_path(value: Any) -> dict[str, torch.Tensor]:
    """Returns the floating-point tensors in nested lists, mappings, named tuples, dataclasses and other containers.

    Paths have the names and numbers of the entries, with dots between them: `logits`, `0.hidden.2`; a value that is a
    tensor itself has the empty path.

    Raises:
        ModelError: Two tensors have the same path, because a key has a dot in it.
    """
    found: dict[str, torch.Tensor] = {}
    for path, tensor in _walk(value, ""):
        if path in found:
            raise ModelError(f"two tensors in what a model or layer returns have the path '{path}'; rename one")
        found[path] = tensor
    return {path: tensor for path, tensor in found.items() if tensor.is_floating_point()}


def _walk(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for key, item in _entries(value).items():
        yield from _walk(item, f"{path}.{key}" if path else str(key))


def _entries(value: Any) -> Mapping[Any, Any]:
    named = named_entries(value)
    if named is not None:
        return named
    return dict(enumerate(value if isinstance(value, (list, tuple)) else tensors_of(value)))


def shown(paths: Mapping[str, torch.Tensor] | list[str]) -> str:
    """Returns paths, with the shapes of tensors if these are given, as messages show them."""
    if isinstance(paths, list):
        return ", ".join(repr(path) for path in paths) or "none"
    return ", ".join(f"{path!r} {tuple(tensor.shape)}" for path, tensor in paths.items()) or "none"
