"""Records inputs and outputs of the last forward in training mode, for losses that need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress_core.contract.batch import Batch
from compress_core.torch_internals import remove_forward_hooks


class BatchRecorder:
    """A forward hook that remembers the last forward in training mode.

    It is one of the model's hooks, so it is copied and pickled with the model. A copy starts empty and inactive, so
    that it does not keep tensors alive that nobody uses; a controller that is copied with it activates it.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active
        self._seen: tuple[Any, ...] | None = None

    def attach(self, model: nn.Module) -> None:
        """Adds this hook to a model."""
        model.register_forward_hook(self, with_kwargs=True)

    def activate(self) -> None:
        """Starts to record."""
        self._active = True

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
    """Removes recorders, and the inactive ones of copies, from the hooks of a model."""
    remove_forward_hooks(model, BatchRecorder)
