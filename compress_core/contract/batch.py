"""The last forward of the model in training, for losses that need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """What the model was called with, and what it returned.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments.
        outputs: What the model returned, with its graph.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
