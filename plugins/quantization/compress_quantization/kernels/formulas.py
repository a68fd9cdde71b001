"""What the kernels compute, for each element, in plain torch.

With `step` the distance of two grid values and `low`, `high` the range, all from `FakeQuantize.step_low_high`:

    y = round(clip(x, low, high) / step) * step

which is NNCF's `(round((clip(x) - low) * s - round(-low * s))) / s`, `s = 1 / step`, in the form that runtimes compute:
`low / step` is an integer but for rounding. The gradients are the straight-through ones (Jain et al. 2020,
arXiv:1903.08066, in NNCF's normalization: the rounding error counts in units of the range, not of the scale),

    inside = 1 in the range, its ends included; below, above = 1 outside
    dx     = dy * inside
    drange = sum dy * ((y - x) / range * inside + low / high * below (symmetric only) + above)
    dlow   = sum dy * (below + above)

so that three sums for each channel are enough: of dy * (y - x) / step inside, of dy above, and of dy outside, above or
below. A code of one byte for each element is all that they need: the rounding error in steps, which is within +-0.5,
times 240, or `ABOVE` or `BELOW`. Rounding it to 1/240 moves drange by at most sum |dy| / (480 * number of steps); seen
are 5 % of that, which is 0.1 % of drange over a large tensor and 1 to 3 % of one channel's where terms cancel. Eager
kernels and the operators for `torch.compile` keep x and are exact.

An activation function before the quantizer can be a part of it. Those that clip, "relu" and "relu6", are part of the
code: elements that they do not pass are `BELOW`, those that ReLU6 clips `ABOVE`; `slopes` says what that means for the
range. Smooth ones (`SMOOTH`) need x for their own gradient, so x is kept, and everything computed from it.

Arguments, everywhere: `step`, `low`, `high` in the dtype that is computed in (float32, or float64 for float64
tensors), of a shape that broadcasts against the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compress_core.transforms import ACTIVATION_FUNCTIONS

ERROR_SCALE = 240
LARGEST_ERROR = 120
ABOVE = 127
BELOW = -127
UPPER = 6.0
LARGEST_HALF = torch.finfo(torch.float16).max

Activation = str | None
StepLowHigh = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Number = torch.Tensor | float
Factors = tuple[Number, Number, Number]
Slopes = tuple[Number, tuple[Number, Number], tuple[Number, Number]]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# Their backward operators: (dy, x) -> dx. Not GELU and SiLU: torch's own functions are faster than a compiler's.
SMOOTH: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hardswish": torch.ops.aten.hardswish_backward,
}


def is_clip(activation: Activation) -> bool:
    """Tells whether the activation function only clips, which codes can say."""
    return activation in {"relu", "relu6"}


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Returns `x` behind its activation function."""
    if activation is None:
        return x
    if activation in SMOOTH:
        return ACTIVATION_FUNCTIONS[activation](x)
    return x.clamp_min(0.0) if activation == "relu" else x.clamp(0.0, UPPER)


def _clipped(value: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    # What clamp with tensors does, but compilers take that apart into many steps.
    return torch.minimum(torch.maximum(value, low), high)


def quantized(x: torch.Tensor, ranges: StepLowHigh, activation: Activation) -> torch.Tensor:
    """Returns y."""
    step, low, high = ranges
    value = activate(x.to(step.dtype), activation)
    return torch.round(_clipped(value, low, high) / step) * step


def representable(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns y, where an end of the grid above the largest float16 becomes that for tensors of this dtype."""
    return y.clamp(-LARGEST_HALF, LARGEST_HALF) if dtype == torch.float16 else y


def encoded(x: torch.Tensor, ranges: StepLowHigh, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y, and the code of each element in the dtype that is computed in."""
    step, low, high = ranges
    x = x.to(step.dtype)
    value = activate(x, activation)
    ratio = _clipped(value, low, high) / step
    rounded = torch.round(ratio)
    # One `where` inside the other: masks that are combined make slower loops.
    code = torch.where(value > high, ABOVE, torch.round((rounded - ratio) * ERROR_SCALE))
    if activation == "relu6":
        code = torch.where(x >= UPPER, ABOVE, code)
    return rounded * step, torch.where(x <= 0 if is_clip(activation) else value < low, BELOW, code)


def from_code(grad: torch.Tensor, code: torch.Tensor) -> Parts:
    """Returns dx, and what the three sums run over; the code has the dtype that is computed in."""
    # Codes between LARGEST_ERROR and the marks do not occur.
    return _split(grad.to(code.dtype), code.abs() > ABOVE - 2, code > ABOVE - 2, code * (1.0 / ERROR_SCALE))


def from_input(grad: torch.Tensor, x: torch.Tensor, ranges: StepLowHigh, activation: Activation) -> Parts:
    """Does what `from_code` does where x is at hand; the activation function is None or smooth."""
    step, low, high = ranges
    x = x.to(step.dtype)
    value = activate(x, activation)
    clipped = _clipped(value, low, high)
    ratio = clipped / step
    inside, error, above, outside = _split(
        grad.to(step.dtype), value != clipped, value > high, torch.round(ratio) - ratio
    )
    return (inside if activation is None else SMOOTH[activation](inside, x)), error, above, outside


def _split(grad: torch.Tensor, outside: torch.Tensor, above: torch.Tensor, error: torch.Tensor) -> Parts:
    inside = torch.where(outside, 0.0, grad)
    return inside, inside * error, torch.where(above, grad, 0.0), torch.where(outside, grad, 0.0)


def factors_of(levels: tuple[int, int], activation: Activation, offset: bool) -> tuple[float, float, float]:
    """Returns what an error of a step counts in drange, and what an element below counts in drange and in dlow.

    Args:
        levels: Smallest and largest integer of the grid.
        activation: Function before the quantizer; one that clips passes nothing below.
        offset: Whether the range is learned with its low end (asymmetric): `low` does not move with the range.
    """
    smallest, largest = levels
    of_error = 1.0 / (largest - smallest)
    return (of_error, 0.0, 0.0) if is_clip(activation) else (of_error, 0.0 if offset else smallest / largest, 1.0)


def slopes(ranges: StepLowHigh, factors: Factors, activation: Activation) -> Slopes:
    """Returns what the sums count.

    Args:
        ranges: Of the shape of the sums.
        factors: See `factors_of`; numbers, or tensors of no dimension.
        activation: "relu6", or anything else.

    Returns:
        For the error: its factor in drange. For what is above and what is below: the factors in drange and in dlow.
    """
    of_error, *of_below = factors
    if activation != "relu6":
        return of_error, (1.0, 1.0), (of_below[0], of_below[1])
    # What ReLU6 clips has the value 6, which may be inside the range.
    step, _, high = ranges
    six = torch.full_like(step, UPPER)
    beyond, steps = six > high, six / step
    error = (torch.round(steps) - steps) * of_error
    return of_error, (torch.where(beyond, 1.0, error), beyond.to(step.dtype)), (0.0, 0.0)


def weighed(parts: Sequence[torch.Tensor], slopes: Slopes, offset: bool) -> list[torch.Tensor]:
    """Returns drange and, with `offset`, dlow, from the three sums (or from what they run over)."""
    error, above, outside = parts
    of_error, of_above, of_below = slopes
    results = []
    for end in range(2 if offset else 1):
        total = above if _is(1.0, of_above[end]) else above * of_above[end]
        if not _is(0.0, of_below[end]):
            total = total + (outside - above) * of_below[end]
        results.append(total + error * of_error if end == 0 else total)
    return results


def _is(number: float, factor: Number) -> bool:
    return isinstance(factor, float) and factor == number


def derivatives_from_code(
    code: torch.Tensor, ranges: StepLowHigh, factors: Factors, activation: Activation, offset: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns for each element dy/dx (0 or 1), and a list of dy/drange and, with `offset`, dy/dlow.

    Args:
        code: Codes of the elements, of any dtype.
        ranges: Ranges that broadcast against them.
        factors: See `slopes`.
        activation: See `slopes`.
        offset: See `slopes`.
    """
    code = code.to(ranges[0].dtype)
    inside, *parts = from_code(torch.ones_like(code), code)
    return inside, weighed(parts, slopes(ranges, factors, activation), offset)


def derivatives_from_input(
    x: torch.Tensor, ranges: StepLowHigh, factors: Factors, offset: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns what `derivatives_from_code` does, from what the quantizer itself takes, without activation function."""
    inside, *parts = from_input(torch.ones_like(x, dtype=ranges[0].dtype), x, ranges, None)
    return inside, weighed(parts, slopes(ranges, factors, None), offset)
