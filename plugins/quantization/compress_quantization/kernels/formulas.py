"""What the kernels compute, in plain torch; `compiled` turns these functions into one kernel each.

With `step` the distance of two grid values and `low`, `high` the range, all from `FakeQuantize.ranges`:

    y = round(clip(x, low, high) / step) * step

which is NNCF's `(round((clip(x) - low) * s - round(-low * s))) / s`, `s = 1 / step`, in the form that runtimes compute:
`low / step` is an integer but for rounding. The gradients are the straight-through ones (Jain et al. 2020,
arXiv:1903.08066, in NNCF's normalization: the rounding error counts in units of the range, not of the scale),

    inside = 1 in the range, its ends included; below, above = 1 outside
    dx     = dy * inside
    drange = sum dy * ((y - x) / range * inside + low / high * below (symmetric only) + above)
    dlow   = sum dy * (below + above)

A code of one byte for each element is all that the backward pass needs: the rounding error y - x in steps, which is
within +-0.5, times 240, or `ABOVE` or `BELOW`. Rounding it to 1/240 moves the sum over a tensor by about 0.1 %.

An activation function before the quantizer is a part of it: None, "relu" or "relu6". Elements that it does not pass are
`BELOW`, those that ReLU6 clips `ABOVE`; `ends` says what that means for the range.

Arguments, everywhere: tensors as `Layout.view` gives them; `step`, `low`, `high` of shape (channels,) in the dtype
that is computed in (float32, or float64 for float64 tensors); `kind` of `Layout`. Results go to tensors that are given:
an autograd.Function that returns a view breaks under in-place operations on what it returned.
"""

from __future__ import annotations

import torch

ERROR_SCALE = 240
LARGEST_ERROR = 120
ABOVE = 127
BELOW = -127
UPPER = 6.0

Activation = str | None
Ranges = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Number = torch.Tensor | float
REDUCED = {"flat": (0,), "rows": (1,), "columns": (0,), "planes": (0, 2)}
"""Dimensions of a view of a kind that a sum for each channel runs over."""


def aligned(ranges: Ranges, kind: str) -> Ranges:
    """Returns `step`, `low`, `high` so that they broadcast against a view of this kind."""
    step, low, high = ranges
    if kind in {"flat", "columns"}:
        return step, low, high
    return step.unsqueeze(-1), low.unsqueeze(-1), high.unsqueeze(-1)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Returns `x` behind its activation function."""
    if activation is None:
        return x
    return x.clamp_min(0.0) if activation == "relu" else x.clamp(0.0, UPPER)


def quantize(
    x: torch.Tensor,
    out: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    activation: Activation,
    kind: str,
) -> None:
    """Writes y to `out`."""
    step, low, high = aligned((step, low, high), kind)
    value = activate(x.to(step.dtype), activation)
    out.copy_(torch.round(value.clamp(low, high) / step) * step)


def quantize_and_encode(
    x: torch.Tensor,
    out: torch.Tensor,
    code: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    activation: Activation,
    kind: str,
) -> None:
    """Writes y to `out` and the code of each element to `code` (int8)."""
    step, low, high = aligned((step, low, high), kind)
    x = x.to(step.dtype)
    value = activate(x, activation)
    ratio = value.clamp(low, high) / step
    rounded = torch.round(ratio)
    out.copy_(rounded * step)
    above, below = outside(x, low, high, activation)
    error = torch.round((rounded - ratio) * ERROR_SCALE)
    code.copy_(torch.where(above, ABOVE, torch.where(below, BELOW, error)))


def outside(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where elements get no gradient: above, and below."""
    if activation is None:
        return x > high, x < low
    return (x > high) if activation == "relu" else (x > high) | (x >= UPPER), x <= 0


def ends(ranges: Ranges, activation: Activation, offset: bool) -> tuple[Number, Number, Number, Number]:
    """Returns what elements outside count: above and below for `drange`, above and below for `dlow`.

    With `offset` the range is learned with its low end (asymmetric): `low` does not move with the range.
    """
    step, low, high = ranges
    if activation is None:
        return 1.0, 0.0 if offset else low / high, 1.0, 1.0
    if activation == "relu":
        return 1.0, 0.0, 1.0, 0.0
    # What ReLU6 clips has the value 6, which may be inside the range.
    six = torch.full_like(step, UPPER)
    beyond, ratio = six > high, six / step
    error = (torch.round(ratio) - ratio) * (step / (high - low))
    return torch.where(beyond, 1.0, error), 0.0, beyond.to(step.dtype), 0.0


def decoded(
    code: torch.Tensor, ranges: Ranges, activation: Activation, offset: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns for each element dy/dx (bool), dy/drange and dy/dlow, from its code."""
    step, low, high = ranges
    value = code.to(step.dtype)
    error = value * (step / ((high - low) * ERROR_SCALE))
    return _slopes(error, value == ABOVE, value == BELOW, ends(ranges, activation, offset))


def weighed(x: torch.Tensor, ranges: Ranges, offset: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `decoded` does, from x itself; there is no activation function."""
    step, low, high = ranges
    x = x.to(step.dtype)
    ratio = x.clamp(low, high) / step
    above, below = outside(x, low, high, None)
    error = (torch.round(ratio) - ratio) * (step / (high - low))
    return _slopes(error, above, below, ends(ranges, None, offset))


def _slopes(
    error: torch.Tensor,
    above: torch.Tensor,
    below: torch.Tensor,
    outside: tuple[Number, Number, Number, Number],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_range = torch.where(above, outside[0], torch.where(below, outside[1], error))
    zero = torch.zeros_like(error)
    of_low = torch.where(above, outside[2], torch.where(below, outside[3], zero))
    return ~(above | below), of_range, of_low


def gradients_from_code(
    grad: torch.Tensor,
    code: torch.Tensor,
    grad_x: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    activation: Activation,
    offset: bool,
    kind: str,
) -> tuple[torch.Tensor, ...]:
    """Writes dx to `grad_x`; returns drange and, with `offset`, dlow, for each channel."""
    slopes = decoded(code, aligned((step, low, high), kind), activation, offset)
    return _gradients(grad, slopes, grad_x, offset, kind)


def gradients_from_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    offset: bool,
    kind: str,
) -> tuple[torch.Tensor, ...]:
    """Does what `gradients_from_code` does where x is at hand."""
    return _gradients(grad, weighed(x, aligned((step, low, high), kind), offset), grad_x, offset, kind)


def _gradients(
    grad: torch.Tensor,
    slopes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_x: torch.Tensor,
    offset: bool,
    kind: str,
) -> tuple[torch.Tensor, ...]:
    inside, of_range, of_low = slopes
    grad = grad.to(of_range.dtype)
    grad_x.copy_(torch.where(inside, grad, 0.0))
    total = (grad * of_range).sum(REDUCED[kind])
    return (total, (grad * of_low).sum(REDUCED[kind])) if offset else (total,)
