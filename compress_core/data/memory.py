"""Errors that say that memory ran out."""

from __future__ import annotations

import torch


def refuse_out_of_memory(error: BaseException) -> None:
    """Raises an error again that came because memory ran out: nothing about the model follows from it.

    For code that tries something, and does something else if that fails.
    """
    cause: BaseException | None = error
    while cause is not None:
        # What torch's allocator on CPUs raises has no class of its own.
        is_cpu = isinstance(cause, RuntimeError) and ("allocate memory" in str(cause) or "enough memory" in str(cause))
        if is_cpu or isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            raise error
        cause = cause.__cause__
