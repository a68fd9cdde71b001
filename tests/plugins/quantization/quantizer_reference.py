"""Fake-quantizers in NumPy in float64, written down from the formulas that NNCF 2.16 computes."""

import numpy as np
from hypothesis import strategies as st


def tuned(low, width, n):
    """Moves a range so that zero is on its grid."""
    high = low + width
    low, high = min(low, 0.0), max(high, 0.0)
    zero_point = np.round(-low * n / (high - low))
    first = (zero_point / (zero_point - n) * high, high) if zero_point < n else (low, high)
    second = (low, (zero_point - n) / zero_point * low) if zero_point > 0 else (low, high)
    low, high = first if first[1] - first[0] > second[1] - second[0] else second
    return low, high - low


def is_tuned(low, width, n):
    """Tells whether zero is a multiple of the step away from the low end; see the test of the nearest value."""
    low, width = tuned(low, width, n)
    return abs(low / width * n - np.round(low / width * n)) < 1e-6


class Reference:
    """One grid in float64: values and gradients."""

    def __init__(self, low, width, n, slope_below):
        self.low, self.width, self.n, self.slope_below = low, width, n, slope_below
        self.s = n / width

    @classmethod
    def symmetric(cls, scale, smallest, largest):
        scale = abs(scale)
        low = scale * smallest / largest
        return cls(low, scale - low, largest - smallest, smallest / largest)

    @classmethod
    def asymmetric(cls, low, width, n):
        return cls(*tuned(low, abs(width), n), n, 0.0)

    def values(self, x):
        clipped = np.clip(x, self.low, self.low + self.width)
        return np.round((clipped - self.low) * self.s - np.round(-self.low * self.s)) / self.s

    def gradients(self, x, grad):
        """Returns what x, the width (the scale) and the low end get."""
        below, above = x < self.low, x > self.low + self.width
        inside = ~below & ~above
        error = (self.values(x) - x) / self.width
        return (
            grad * inside,
            (grad * (error * inside + self.slope_below * below + above)).sum(),
            (grad * (below | above)).sum(),
        )

    def clear_of_ties(self, x, margin):
        """Tells where x is not within `margin` steps of the middle between two grid values, or of an end."""
        position = (x - self.low) * self.s
        ends = np.minimum(abs(position), abs(position - self.n))
        return (abs(position - np.floor(position) - 0.5) > margin) & (ends > margin)


def inputs(draw, reference, dtype):
    """Values in and around the range, with the awkward ones among them; none so near to a tie that rounding decides."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = generator.uniform(-1.5, 1.5, 200) * (reference.width + abs(reference.low))
    x = np.concatenate([x, [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(dtype)
    clear = reference.clear_of_ties(x.astype(np.float64), 1e-9 if dtype == np.float64 else 1e-3)
    return x[clear | (abs(x) < 1e-20)]
