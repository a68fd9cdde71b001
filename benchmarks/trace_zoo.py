"""Which public networks can be traced, and what that costs against one plain forward of the same inputs.

Usage: python -m benchmarks.trace_zoo [--only torchvision|pytorchcv|transformers] [--name PART] [--rounds 3]

Takes what is installed of torchvision (all classifiers), pytorchcv (one of each family) and transformers (tiny
configs), with random weights. CPU time of one thread; the first trace of a network does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.networks import SOURCES, Network
from benchmarks.torchvision_operators import define_missing_operators
from compress_core.contract.statistics import Table
from compress_core.trace import trace


@dataclass
class Result:
    """What became of one network; times in seconds of CPU."""

    network: str
    error: str = ""
    first: float = 0.0
    seconds: float = 0.0
    forward: float = 0.0
    calls: int = 0
    operators: int = 0
    values: str = "fake"
    unreached: tuple[str, ...] = ()


def measure(network: Network, rounds: int) -> Result:
    """Traces a network and times it."""
    result = Result(network.name)
    try:
        model = network.make().eval()
        example = network.example(model)
        started = time.process_time()
        found = trace(model, example)
        result.first = time.process_time() - started
        seconds = [_cpu_time(lambda: trace(model, example)) for _ in range(rounds)]
        with torch.no_grad():
            forwards = [_cpu_time(lambda: example.run(model, example.batch)) for _ in range(rounds)]
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"[:300]
        return result
    forward = found.forwards[0]
    result.seconds, result.forward = statistics.median(seconds), statistics.median(forwards)
    result.calls, result.operators = len(forward.calls), len(forward.operators)
    result.values, result.unreached = "real" if forward.real else "fake", tuple(found.unreached)
    return result


def _cpu_time(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def summary(source: str, results: list[Result]) -> tuple[Any, ...]:
    """Returns a row of the table."""
    traced = [result for result in results if not result.error]
    seconds = [result.seconds for result in traced] or [0.0]
    return (
        source,
        f"{len(traced)} of {len(results)}",
        sum(result.values == "real" for result in traced),
        sum(bool(result.unreached) for result in traced),
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
        f"{statistics.median([r.seconds / r.forward for r in traced] or [0.0]):.1f}",
    )


def main() -> None:
    """Measures, prints, and writes results/trace_zoo.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SOURCES))
    parser.add_argument("--name", default="", help="only networks whose name contains this; nothing is written then")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    define_missing_operators()
    rows, everything = [], {}
    for source in [options.only] if options.only else SOURCES:
        try:
            networks = [network for network in SOURCES[source]() if options.name in network.name]
        except ImportError as error:
            print(f"{source}: skipped, {error}", flush=True)
            continue
        results = []
        for network in networks:
            torch.manual_seed(0)
            results.append(measure(network, options.rounds))
            print(results[-1], flush=True)
        rows.append(summary(source, results))
        everything[source] = [asdict(result) for result in results]
        if not options.name and not options.only:
            report.write("trace_zoo", {"input": "(1, 3, 224, 224), or the network's own size", "networks": everything})
    headers = (
        "networks",
        "traced",
        "on real values",
        "with unreached modules",
        "median s",
        "most s",
        "trace / forward",
    )
    report.show(Table("One trace in eval mode, CPU time of one thread", headers, rows))


if __name__ == "__main__":
    main()
