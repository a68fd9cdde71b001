"""What the model was called with last in training, for losses that need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress_core.contract.batch import Batch
from compress_core.torch_internals import remove_forward_hooks


class BatchRecorder:
    """A forward hook that remembers the last forward in training mode.

    It stands in the hooks of the model, so it goes wherever that is copied or pickled to; a copy remembers nothing,
    lest it hold tensors that nobody asks for.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active
        self._seen: tuple[Any, ...] | None = None

    def attach(self, model: nn.Module) -> None:
        """Begins to watch a model."""
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        """Called by torch after each forward of the model."""
        if self._active and module.training and torch.is_grad_enabled():
            self._seen = (args, kwargs, outputs)

    @property
    def batch(self) -> Batch | None:
        """The last forward in training mode; None before the first."""
        return None if self._seen is None else Batch(*self._seen)

    def __deepcopy__(self, memo: Any) -> BatchRecorder:
        return BatchRecorder(active=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchRecorder, (False,)


def remove_recorders(model: nn.Module) -> None:
    """Takes recorders, and what copies have left of them, out of the hooks of a model."""
    remove_forward_hooks(model, BatchRecorder)
