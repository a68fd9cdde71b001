"""Finds the target in a batch, for criteria that compare outputs with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_core import DataError

_NAMES = ("labels", "label", "targets", "target", "y")


def target_of(loader: Any, batch: Any, path: str) -> Any:
    """Returns the target of a batch: the last item of a pair, an entry such as `labels`, or what `get_target` returns.

    Args:
        loader: The user's loader; `get_target` of NNCF's PTInitializingDataLoader is used.
        batch: The batch.
        path: Where it is needed, for messages.

    Raises:
        DataError: The batch has no target that could be told.
    """
    get_target = getattr(loader, "get_target", None)
    if callable(get_target):
        return get_target(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    if isinstance(batch, Mapping):
        names = [name for name in _NAMES if name in batch]
        if names:
            return batch[names[0]]
    raise DataError(
        f"{path}: the criterion needs a target, and a batch of type {type(batch).__name__} has none that could be "
        f"told: give pairs (inputs, target), an entry named {', '.join(_NAMES)}, or a loader with a method "
        "get_target(batch); or register no criterion, then no labels are needed"
    )
