"""Ratios that can be trusted on a busy machine: CPU time of one thread, alternatives interleaved, medians of pairs.

On a GPU the time between two events in its queue counts instead: what the host does meanwhile is hidden unless the GPU
waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import report

# On a GPU one step takes less than what surrounds it, so that several are timed together.
_REPEATS = 10


@dataclass(frozen=True)
class Ratio:
    """How long something takes, as a multiple of the baseline.

    Attributes:
        median: Median over rounds of (its time / the baseline's time in the same round).
        low: First quartile.
        high: Third quartile.
        milliseconds: Its median time: of the CPU, or of the GPU's queue.
    """

    median: float
    low: float
    high: float
    milliseconds: float

    def __str__(self) -> str:
        return report.quartiles(vars(self))


def compare(
    baseline: Callable[[], object],
    others: dict[str, Callable[[], object]],
    rounds: int = 11,
    device: torch.device | str = "cpu",
) -> dict[str, Ratio]:
    """Times alternatives against a baseline.

    Args:
        baseline: What everything is divided by; it appears in the result as `baseline` against a second run of itself.
        others: The alternatives by name.
        rounds: How often all of them are run, in alternating order, after one round that does not count.
        device: Where the work is done.
    """
    timed = _gpu_time if torch.device(device).type == "cuda" else _cpu_time
    runs = {"baseline": baseline, **others}
    times: dict[str, list[float]] = {name: [] for name in runs}
    base: list[float] = []
    for number in range(rounds + 1):
        order = list(runs) if number % 2 else list(reversed(runs))
        first = timed(baseline)
        measured = {name: timed(runs[name]) for name in order}
        if number:
            base.append((first + measured["baseline"]) / 2)
            for name in runs:
                times[name].append(measured[name])
    return {name: _ratio(times[name], base) for name in runs}


def _ratio(times: list[float], base: list[float]) -> Ratio:
    low, median, high = statistics.quantiles([t / b for t, b in zip(times, base, strict=True)], n=4)
    return Ratio(median, low, high, 1000 * statistics.median(times))


def _cpu_time(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _gpu_time(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(_REPEATS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / _REPEATS
