"""Functions from time to compression level that several schedules share.

They are pure functions of the time, so that a resumed run has the same levels as an uninterrupted one.
"""

from __future__ import annotations


def progress(time: float, duration: float) -> float:
    """Returns time / duration, clamped to [0, 1]; 1 if the duration is 0."""
    return min(max(time / duration, 0.0), 1.0) if duration > 0 else 1.0


def polynomial_level(initial: float, target: float, done: float, *, power: float, concave: bool) -> float:
    """Returns the level of a polynomial schedule.

    Args:
        initial: Level at the beginning.
        target: Level at the end.
        done: Progress, 0 to 1.
        power: Exponent.
        concave: True: the level rises fast first (`target - (target - initial) * (1 - done)^power`, Zhu & Gupta 2017,
            equation 1). False: it rises slowly first (`initial + (target - initial) * done^power`).
    """
    if concave:
        return float(target - (target - initial) * (1 - done) ** power)
    return float(initial + (target - initial) * done**power)


def exponential_level(initial: float, target: float, time: float, duration: float) -> float:
    """Returns the level of a schedule whose density decays geometrically from `1 - initial` to `1 - target`."""
    if duration <= 0 or time >= duration:
        return target
    density: float = (1 - initial) * ((1 - target) / (1 - initial)) ** (max(time, 0.0) / duration)
    # Rounding errors must not raise the level above the target.
    return min(1 - density, target)
