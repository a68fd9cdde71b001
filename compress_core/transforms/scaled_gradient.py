"""`scaled_gradient`: a tensor whose gradient is multiplied, for parameters that learn faster or slower than others."""

from __future__ import annotations

from typing import Any

import torch


class _Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns the same values, with the gradient that reaches `x` multiplied by a factor.

    For transforms of algorithms that declare `applies_lr_multiplier`: `scaled_gradient(self.scores,
    self.lr_multiplier)` in `forward`. Other than a hook of the parameter, it is there in copies and pickles too.

    Args:
        x: A tensor, usually a parameter of the transform.
        factor: The factor; with 1 `x` itself is returned.
    """
    if factor == 1.0 or not torch.is_grad_enabled():
        return x
    result: torch.Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return result
