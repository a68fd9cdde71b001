"""What the contract costs: hooks in a training step, hooks while a model is created, and importing the package.

Usage: python -m benchmarks.hook_cost [--rounds 15]

CPU time of one thread; medians and quartiles over rounds. The alternatives of a table are run in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import report
from compress_core import Algorithm, Plan, Stage, create_compressed_model, hookimpl
from compress_core.contract.statistics import Table
from compress_core.registry import Registry, use_registry
from compress_core.session.lifecycle import Lifecycle
from compress_core.transforms.snapshot import ModelSnapshot
from examples.common.networks import resnet18

CALLS = 2000


class Ticking(Algorithm):
    """Does nothing but being called."""

    name = "ticking"
    stage = Stage.SPARSITY

    @hookimpl
    def compress_plan(self) -> Plan:
        return Plan(("weight",))

    @hookimpl
    def compress_commit(self) -> None:
        pass

    @hookimpl
    def compress_step(self, clock: Any) -> None:
        pass

    @hookimpl
    def compress_loss(self, model: Any) -> torch.Tensor:
        return self.zero

    zero = torch.zeros((), requires_grad=True)


class Plugin:
    """Contributes algorithms that only tick."""

    def __init__(self, classes: list[type[Algorithm]]) -> None:
        self._classes = classes

    @hookimpl
    def compress_algorithms(self) -> list[type[Algorithm]]:
        return self._classes


@dataclass(frozen=True)
class Spread:
    """Microseconds of one call: median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return report.quartiles(vars(self))


def _interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Spread]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            started = time.process_time()
            for _ in range(CALLS):
                runs[name]()
            if number:
                times[name].append(1e6 * (time.process_time() - started) / CALLS)
    return {name: Spread(*_quartiles(values)) for name, values in times.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def training_step(rounds: int) -> tuple[Table, dict[str, Any]]:
    """Measures `scheduler.step()` and `loss()` with one to four algorithms that do nothing."""
    classes = [type(f"Ticking{number}", (Ticking,), {"name": f"ticking{number}"}) for number in range(4)]
    registry = Registry()
    registry.register(Plugin(classes), "ticking")
    runs: dict[str, Callable[[], object]] = {}
    with use_registry(registry):
        for count in (1, 2, 4):
            config = {"compression": [{"algorithm": cls.name} for cls in classes[:count]]}
            controller, _ = create_compressed_model(nn.Linear(2, 2), config)
            runs[f"step, {count}"] = controller.scheduler.step
            runs[f"loss, {count}"] = controller.loss
    found = _interleaved(runs, rounds)
    rows, results = [], {}
    for name, spread in found.items():
        call, count = name.split(", ")
        each = spread.median / int(count)
        rows.append(("scheduler.step()" if call == "step" else "loss()", int(count), str(spread), f"{each:.2f}"))
        results[name] = {**asdict(spread), "per_algorithm": each}
    return Table("Calls in a training step, us", ("call", "algorithms", "call", "per algorithm"), rows), results


def creation(rounds: int, call: float) -> tuple[Table, dict[str, Any]]:
    """Measures which share of the creation of a ResNet-18 goes into calling hooks, and into holding plugins to rules.

    Args:
        rounds: How many models are created.
        call: Microseconds that calling a hook takes whose implementation does nothing.
    """
    loader = [torch.randn(16, 3, 32, 32)] * 4
    adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 64}}
    sections = [
        {"algorithm": "magnitude_sparsity", "initializer": adapt},
        {"algorithm": "quantization", "initializer": adapt | {"range": {"num_init_samples": 64}}},
    ]
    hooks, guards, totals = [], [], []
    for number in range(rounds + 1):
        with _counted(Lifecycle, "_call") as calls, _timed(ModelSnapshot, "changed_tensors") as guard:
            started = time.process_time()
            create_compressed_model(resnet18(10), {"compression": sections}, init_loader=loader)
            total = time.process_time() - started
        if number:
            hooks.append(100 * 1e-6 * call * len(calls) / total)
            guards.append(100 * sum(guard) / total)
            totals.append(1000 * total)
    shares = {"calling hooks": Spread(*_quartiles(hooks)), "comparing tensors": Spread(*_quartiles(guards))}
    rows = [(name, str(spread)) for name, spread in shares.items()]
    title = f"Creating a ResNet-18 with two algorithms, {statistics.median(totals):.0f} ms"
    results = {name: asdict(spread) for name, spread in shares.items()}
    return Table(title, ("part", "% of it"), rows), {**results, "milliseconds": statistics.median(totals)}


@contextlib.contextmanager
def _counted(cls: type, method: str) -> Iterator[list[None]]:
    """Within the context each call of a method adds an entry to the list."""
    original, calls = getattr(cls, method), list[None]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(cls, method, counted)
    try:
        yield calls
    finally:
        setattr(cls, method, original)


@contextlib.contextmanager
def _timed(cls: type, method: str) -> Iterator[list[float]]:
    """Within the context each call of a method adds its CPU time in seconds to the list."""
    original, seconds = getattr(cls, method), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - started)

    setattr(cls, method, timed)
    try:
        yield seconds
    finally:
        setattr(cls, method, original)


def imports(rounds: int) -> tuple[Table, dict[str, Any]]:
    """Measures what importing the package takes when torch, pydantic, pluggy and numpy are there."""
    code = (
        "import time, torch, pydantic, pluggy, numpy\n"
        "started = time.process_time()\nimport compress_core\nprint(time.process_time() - started)"
    )
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    median, low, high = _quartiles(found)
    row = (f"{median:.3f} [{low:.3f}, {high:.3f}]",)
    return Table("import compress_core, s", ("CPU time",), [row]), {"median": median, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often each is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, step_results = training_step(options.rounds)
    report.show(steps)
    creations, creation_results = creation(options.rounds, step_results["step, 1"]["per_algorithm"])
    report.show(creations)
    importing, import_results = imports(options.rounds)
    report.show(importing)
    report.write("hook_cost", {"step": step_results, "creation": creation_results, "import": import_results})


if __name__ == "__main__":
    main()
