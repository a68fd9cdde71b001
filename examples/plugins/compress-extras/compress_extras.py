"""Choices for compress-core: a filter importance, a schedule, and a custom operator whose channels can be pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_core import Choice, hookimpl
from compress_core.channels import Dims, Step


def hoyer(filters: torch.Tensor) -> torch.Tensor:
    """The number of weights that count, (sum |w|)^2 / sum w^2: filters of few large weights go first."""
    wide = filters.double().abs()
    return wide.sum(1).square() / wide.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)


def cosine(initial: float, target: float, duration: float) -> Callable[[float], float]:
    """Half a cosine: slow at both ends."""

    def level(time: float) -> float:
        done = min(max(time / duration, 0.0), 1.0) if duration > 0 else 1.0
        return initial + (target - initial) * (1 - math.cos(math.pi * done)) / 2

    return level


@torch.library.custom_op("compress_extras::scale_shift", mutates_args=())
def scale_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Returns `x * scale + shift`, a scale and a shift for each channel.

    Args:
        x: Of shape (samples, channels, ...).
        scale: Of shape (channels,).
        shift: Of shape (channels,).
    """
    return torch.addcmul(_along(x, shift), x, _along(x, scale))


def _along(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return vector.view(-1, *[1] * (x.ndim - 2))


@scale_shift.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, scale = ctx.saved_tensors
    others = [dim for dim in range(x.ndim) if dim != 1]
    return gradient * _along(x, scale), (gradient * x).sum(others), gradient.sum(others)


scale_shift.register_autograd(_backward, setup_context=_keep)


class ScaleShift(nn.Module):
    """The operator with parameters of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x * scale + shift`."""
        result: torch.Tensor = scale_shift(x, self.scale, self.shift)
        return result


def scale_shift_channels(step: Step) -> list[Dims]:
    """Channels of the operator: those of the input, of the scale and of the shift go together."""
    x, scale, shift = (step.dims(step.argument(position)) for position in range(3))
    x[1] = step.met([x[1], scale[0], shift[0]])
    return step.same(x)


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns all three."""
    return [
        Choice("filter_pruning.importance", "hoyer", hoyer),
        Choice("level_schedule", "cosine", cosine),
        Choice("channels.rule", "compress_extras.scale_shift", scale_shift_channels),
    ]
