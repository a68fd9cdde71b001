"""Measures how much memory a forward holds at its stops."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from compress_core.torch_internals import storage_identity


class HeldMemory:
    """The memory of the tensors that a forward has made and not freed yet.

    Attributes:
        at: Key of a stop -> the most that was held there, in bytes.
    """

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        # Identity of a storage -> its size, and the tensors that use it.
        self._storages: dict[int, tuple[int, list[weakref.ref[torch.Tensor]]]] = {}

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Adds tensors of the forward."""
        for tensor in tensors:
            try:
                identity, size = storage_identity(tensor), tensor.untyped_storage().nbytes()
            except (RuntimeError, NotImplementedError):
                continue
            known = self._storages.get(identity)
            users = [] if known is None or known[0] != size else known[1]
            self._storages[identity] = size, [*(user for user in users if user() is not None), weakref.ref(tensor)]

    def measure(self, key: str) -> None:
        """Notes what is held now, at a stop."""
        alive = {key: entry for key, entry in self._storages.items() if any(user() is not None for user in entry[1])}
        self._storages = alive
        self.at[key] = max(self.at.get(key, 0), sum(size for size, _ in alive.values()))
