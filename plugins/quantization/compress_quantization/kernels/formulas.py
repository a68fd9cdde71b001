"""What the kernels compute, in plain torch; `compiled` turns these functions into one kernel each.

With `step` the distance of two grid values and `low`, `high` the range, all from `FakeQuantize.ranges`:

    y = round(clip(x, low, high) / step) * step

which is NNCF's `(round((clip(x) - low) * s - round(-low * s))) / s`, `s = 1 / step`, in the form that runtimes compute:
`low / step` is an integer but for rounding. The gradients are the straight-through ones (Jain et al. 2020,
arXiv:1903.08066, in NNCF's normalization: the rounding error counts in units of the range, not of the scale),

    in    = 1 inside the range, boundaries included; below, above = 1 outside
    dx     = dy * in
    drange = sum dy * ((y - x) / (levels - 1) / step * in + low / high * below (symmetric only) + above)
    dlow   = sum dy * (below + above)

A code of one byte for each element is all that the backward pass needs: the rounding error y - x in steps, which is
within +-0.5, times 240, or one of the values below. Rounding it to 1/240 moves the sum over a tensor by about 0.1 %.

Arguments, everywhere: tensors as `Layout.view` gives them; `step`, `low`, `high` broadcast against them and have the
dtype that is computed in (float32, or float64 for float64 tensors); `activation` is None, "relu" or "relu6", what is
applied to x before. These functions write into tensors that they are given: an autograd.Function that returns a view
breaks under in-place operations on what it returned.
"""

from __future__ import annotations

import torch

ERROR_SCALE = 240
LARGEST_ERROR = 120
CUT = 125  # above the upper end of ReLU6: no gradient for x, but for the range that of the value 6
OFF = 126  # not passed by the ReLU
ABOVE = 127
BELOW = -127
UPPER = 6.0

Activation = str | None


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
) -> None:
    """Writes y to `out`."""
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
) -> None:
    """Writes y to `out` and the code of each element to `code` (int8)."""
    x = x.to(step.dtype)
    value = activate(x, activation)
    ratio = value.clamp(low, high) / step
    rounded = torch.round(ratio)
    out.copy_(rounded * step)
    error = torch.round((rounded - ratio) * ERROR_SCALE)
    error = torch.where(value > high, ABOVE, error)
    error = torch.where(value < low, BELOW, error)
    if activation is not None:
        error = torch.where(x <= 0, OFF, error)
    if activation == "relu6":
        error = torch.where(x >= UPPER, CUT, error)
    code.copy_(error)


def decoded(
    code: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, activation: Activation, offset: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns for each element where it is inside (bool), dy/drange, and dy/dlow.

    With `offset` the range is learned with its low end (asymmetric): `low` does not move with it.
    """
    value = code.to(step.dtype)
    inside = value.abs() <= LARGEST_ERROR
    unit = step / (high - low)
    below = 0.0 if offset else low / high
    weight = torch.where(inside, value * (unit / ERROR_SCALE), 0.0)
    weight = torch.where(value == ABOVE, 1.0, weight)
    weight = torch.where(value == BELOW, below, weight)
    outside = (value == ABOVE) | (value == BELOW)
    if activation == "relu6":
        cut, cut_outside = at_cut(step, low, high)
        weight = torch.where(value == CUT, cut, weight)
        outside = outside | ((value == CUT) & cut_outside)
    return inside, weight, outside.to(step.dtype)


def at_cut(step: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dy/drange where ReLU6 clips, and whether that is outside the range."""
    six = torch.full_like(step, UPPER)
    above = six > high
    ratio = six / step
    return torch.where(above, 1.0, (torch.round(ratio) - ratio) * (step / (high - low))), above


def weighed(
    x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, offset: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `decoded` does, from x itself."""
    x = x.to(step.dtype)
    ratio = x.clamp(low, high) / step
    above, below = x > high, x < low
    outside = above | below
    weight = (torch.round(ratio) - ratio) * (step / (high - low))
    weight = torch.where(above, 1.0, weight)
    weight = torch.where(below, 0.0 if offset else low / high, weight)
    return ~outside, weight, outside.to(step.dtype)


def gradients_from_code(
    grad: torch.Tensor,
    code: torch.Tensor,
    grad_x: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    activation: Activation,
    offset: bool,
    reduced: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    """Writes dx to `grad_x`; returns drange and, with `offset`, dlow, each summed over the dimensions `reduced`."""
    inside, weight, outside = decoded(code, step, low, high, activation, offset)
    return _gradients(grad, inside, weight, outside, grad_x, offset, reduced)


def gradients_from_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor,
    step: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    offset: bool,
    reduced: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    """Does what `gradients_from_code` does where x is at hand."""
    inside, weight, outside = weighed(x, step, low, high, offset)
    return _gradients(grad, inside, weight, outside, grad_x, offset, reduced)


def _gradients(
    grad: torch.Tensor,
    inside: torch.Tensor,
    weight: torch.Tensor,
    outside: torch.Tensor,
    grad_x: torch.Tensor,
    offset: bool,
    reduced: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    grad = grad.to(weight.dtype)
    grad_x.copy_(torch.where(inside, grad, 0.0))
    total = (grad * weight).sum(reduced)
    return (total, (grad * outside).sum(reduced)) if offset else (total,)
