"""The level functions that schedules share.

They are pure: a level is a function of the time, so that a resumed run cannot drift from the first.
"""

from __future__ import annotations


def progress(time: float, duration: float) -> float:
    """Returns time / duration, held within [0, 1]; with no duration everything is done at once."""
    return min(max(time / duration, 0.0), 1.0) if duration > 0 else 1.0


def polynomial_level(initial: float, target: float, done: float, *, power: float, concave: bool) -> float:
    """Returns the level of a polynomial schedule.

    Args:
        initial: Level at the beginning.
        target: Level at the end.
        done: Progress, 0 to 1.
        power: Exponent.
        concave: Fast first (`target - (target - initial) * (1 - done)^power`, Zhu & Gupta 2017, equation 1) instead of
            slow first (`initial + (target - initial) * done^power`).
    """
    if concave:
        return float(target - (target - initial) * (1 - done) ** power)
    return float(initial + (target - initial) * done**power)


def exponential_level(initial: float, target: float, time: float, duration: float) -> float:
    """Returns the level at which the density decays geometrically from `1 - initial` to `1 - target` in `duration`."""
    if duration <= 0 or time >= duration:
        return target
    density: float = (1 - initial) * ((1 - target) / (1 - initial)) ** (max(time, 0.0) / duration)
    # The density never falls below the target's, nor the level rises above it, whatever floating point does.
    return min(1 - density, target)
