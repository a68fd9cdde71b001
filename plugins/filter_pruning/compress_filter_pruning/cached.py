"""Importances of filters that are computed again only when the values of their weight have changed."""

from __future__ import annotations

import hashlib

import torch

from compress_filter_pruning.importance import filter_importance, is_cheap


class Importances:
    """Importances of the filters of weights, kept until a value of the weight is another one.

    Versions of tensors do not show what is written through `.data`, by a fused optimizer or by loading, so the values
    themselves decide: their digest takes milliseconds where distances between filters take seconds.

    Args:
        kind: Name of a choice of `filter_pruning.importance`.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._found: dict[str, tuple[str, torch.Tensor]] = {}

    def of(self, name: str, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the importance of each filter of a weight, see `filter_importance`; do not write to it.

        Args:
            name: Dotted name of the weight.
            weight: The weight, any floating dtype.
            dim: Dimension of the filters.
        """
        if is_cheap(self._kind):
            return filter_importance(weight, dim, self._kind)
        digest, key = _digest(weight, dim), f"{dim}:{name}"
        known = self._found.get(key)
        if known is None or known[0] != digest:
            known = self._found[key] = digest, filter_importance(weight, dim, self._kind).cpu()
        return known[1]


def _digest(weight: torch.Tensor, dim: int) -> str:
    values = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    label = f"{dim} {tuple(weight.shape)} {weight.dtype}"
    return hashlib.sha256(values.data).hexdigest() + label
