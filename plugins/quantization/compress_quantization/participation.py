"""Lets the parameters of a quantizer that is off take part in a step of several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_parallel() -> bool:
    """Returns whether there are several processes, as with DistributedDataParallel."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def with_zero_gradients(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Returns `x`, bit for bit, such that a backward pass gives the parameters of a module gradients of zero.

    DistributedDataParallel waits for a gradient of each parameter that it was created with: a quantizer that is turned
    on in a later epoch would otherwise stop it, or need `find_unused_parameters`, which walks the graph in each step.

    Args:
        x: A floating-point tensor.
        module: Its parameters that require gradients.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return x
    result: torch.Tensor = _TakesPart.apply(x, *parameters)  # type: ignore[no-untyped-call]
    return result


class _TakesPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
