"""What the importance `geometric_median` costs: products of matrices against the differences of all pairs.

Usage: python -m benchmarks.geometric_median [--rounds 3]

CPU time of one thread. Both are computed in float64 in the same run, and the sums are compared. `unchanged` is what a
weight takes whose values are those of the epoch before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import report
from compress_core.contract.statistics import Table
from compress_filter_pruning.cached import Importances
from compress_filter_pruning.distances import sums_of_distances

SHAPES = ((64, 64, 3, 3), (256, 256, 3, 3), (512, 512, 3, 3), (1024, 1024, 3, 3), (2048, 512, 1, 1))


def differences(filters: torch.Tensor) -> torch.Tensor:
    """Returns the sums of distances from the differences of all pairs."""
    wide = filters.double()
    rows = torch.split(wide, 256)
    return torch.cat([torch.cdist(r, wide, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for r in rows])


def _seconds(function: Callable[[], torch.Tensor], rounds: int) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(rounds):
        started = time.process_time()
        found = function()
        times.append(time.process_time() - started)
    return min(times), found


def measured(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Returns the times for a weight of random values, in seconds, and how far the sums are apart."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    filters, kept = weight.flatten(1), Importances("geometric_median")
    kept.of("weight", weight, 0)
    slow, expected = _seconds(lambda: differences(filters), 1)
    fast, found = _seconds(lambda: sums_of_distances(filters), rounds)
    same, _ = _seconds(lambda: kept.of("weight", weight, 0), rounds)
    worst = float(((found - expected).abs() / expected).max())
    ranked = bool(torch.equal(found.argsort(stable=True), expected.argsort(stable=True)))
    return {"differences": slow, "products": fast, "unchanged": same, "apart": worst, "same_ranking": ranked}


def main() -> None:
    """Measures, prints a table and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results = {"x".join(map(str, shape)): measured(shape, rounds) for shape in SHAPES}
    rows = [
        (name, r["differences"], r["products"], r["differences"] / r["products"], r["unchanged"], f"{r['apart']:.0e}")
        for name, r in results.items()
    ]
    headers = ("weight", "differences, s", "products, s", "times faster", "unchanged, s", "sums differ by")
    report.show(Table("geometric_median, CPU time of one thread", headers, rows))
    report.write("geometric_median", results)


if __name__ == "__main__":
    main()
