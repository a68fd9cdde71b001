"""`Batch`: inputs and outputs of the model's last forward in training mode, for losses that need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """Inputs and outputs of one forward of the model.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        outputs: What the model returned, with its autograd graph.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
