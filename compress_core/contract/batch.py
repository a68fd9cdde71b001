"""`Batch`: inputs and outputs of the model's last forward in training mode, for losses that need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Batch:
    """Inputs and outputs of one forward of the model.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        outputs: What the model returned, with its autograd graph.
        module_outputs: Dotted name of a module that `context.record_outputs` was called for -> what it returned, with
            the graph, for each of its calls in order. A module that was not called is missing.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
    module_outputs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
