"""Number formats of the solvers: which precision is computed in, and powers of two that scale without rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switches off everything that makes matrix products inexact: autocast, TF32 and bfloat16 passes; and gradients.

    A Gram matrix of bfloat16 products is wrong in the third digit, and then so is every weight that is solved with it.
    Tensors that are made inside are ordinary ones, which can be changed later, even if all is within inference mode.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on the one device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that values of `dtype` are multiplied and summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(values: Tensor) -> Tensor:
    """Returns the smallest power of two above each absolute value, exactly; 0 for 0.

    Multiplying and dividing by it rounds nothing, so results do not depend on the units of inputs and weights.
    """
    mantissa, _ = torch.frexp(values.abs())
    return torch.where(values == 0, torch.zeros_like(values), values.abs() / mantissa)


def unit_of(values: Tensor) -> Tensor:
    """Returns `power_of_two`, with 1 for 0: a divisor that makes values small and cannot be zero."""
    return power_of_two(values).masked_fill_(values == 0, 1.0)


def is_finite(values: Tensor) -> bool:
    """Returns whether no value is infinite or NaN, without a copy of them."""
    if values.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
