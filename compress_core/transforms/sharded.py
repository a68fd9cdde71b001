"""Parameters of which a process has a part only."""

from __future__ import annotations

import sys

import torch

from compress_core.errors import ModelError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a `DTensor`, of which this process may have a part."""
    if "torch.distributed.tensor" not in sys.modules:
        return False  # nobody can have made one
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - it takes a second, and few need it

    return isinstance(tensor, DTensor)


def sharded_error(name: str) -> ModelError:
    """Returns the error that refuses a sharded parameter.

    Args:
        name: What it is called, for the message.
    """
    return ModelError(
        f"the parameter '{name}' is sharded over processes (fully_shard, tensor parallelism): masks, scales and "
        "their gradients would be those of a part of it. Train the compressed model with DistributedDataParallel, or "
        "shard the model that controller.strip() returns"
    )
