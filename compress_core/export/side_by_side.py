"""Measures files in runtimes side by side: latency, size, and how well they agree."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress_core.data.progress import progress
from compress_core.errors import ExportError, UsageError
from compress_core.export.agreement import compared
from compress_core.export.onnx.work import Execution, work_of
from compress_core.export.report import Agreement, integer_share
from compress_core.export.runtimes.runtime import Array, Port, Runtime, RuntimeSession

_WARM_UP = 2
_LARGEST_INDEX = 2  # of random integers: every vocabulary has as many entries


@dataclass(frozen=True)
class Measured:
    """A file in a runtime.

    Attributes:
        file: Name of the file.
        runtime: Name and version of the runtime.
        size: Bytes of the file, and of the file with its weights if there is one.
        milliseconds: Number of threads -> quartiles of the wall time of a run: low, median, high.
        ratios: Number of threads -> quartiles of (its time / that of the first file in the first runtime, in the same
            round).
        integer_share: Share of the multiplications that the runtime computes in integers, from its own profile; None
            for files other than ONNX.
        agreements: The comparison of each output with the first file in the first runtime without optimizations; empty
            if the outputs are others.
    """

    file: str
    runtime: str
    size: int
    milliseconds: Mapping[int, tuple[float, float, float]]
    ratios: Mapping[int, tuple[float, float, float]]
    integer_share: float | None
    agreements: tuple[Agreement, ...]


def all_threads() -> int:
    """Returns the number of threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(
    files: Sequence[Path], runtimes: Sequence[Runtime], feeds: Sequence[Array], *, rounds: int, threads: Sequence[int]
) -> list[Measured]:
    """Runs files in runtimes, all of them once in each round, in alternating order.

    Args:
        files: The files; all of them take the same inputs.
        runtimes: The runtimes.
        feeds: The inputs, in order.
        rounds: Number of rounds that count.
        threads: Numbers of threads to measure with.

    Returns:
        An entry for each file and runtime.

    Raises:
        ExportError: A runtime cannot load or run a file.
    """
    pairs = [(file, runtime) for file in files for runtime in runtimes]
    expected = _outputs(_loaded(files[0], runtimes[0], optimized=False), feeds, runtimes[0])
    times = {count: _times(pairs, feeds, rounds, count) for count in threads}
    found = []
    for number, (file, runtime) in enumerate(pairs):
        session = _loaded(file, runtime)
        outputs = _outputs(session, feeds, runtime)
        found.append(
            Measured(
                file=file.name,
                runtime=runtime.label,
                size=_size(file),
                milliseconds={count: quartiles([1000 * t for t in of[number]]) for count, of in times.items()},
                ratios={
                    count: quartiles([t / first for t, first in zip(of[number], of[0], strict=True)])
                    for count, of in times.items()
                },
                integer_share=_integer_share(file, runtime, feeds),
                agreements=_agreements(session.outputs, outputs, expected, feeds),
            )
        )
    return found


def example_feeds(ports: Sequence[Port], shapes: Mapping[str, Sequence[int]], seed: int = 0) -> list[Array]:
    """Returns random inputs: normally distributed numbers, zeros and ones for integers.

    Args:
        ports: The inputs.
        shapes: Shapes by name, for inputs whose size varies or is to be another one.
        seed: Seed of the random numbers.

    Raises:
        UsageError: A name is no input, or the size of an input varies and is not given.
    """
    unknown = [name for name in shapes if name not in {port.name for port in ports}]
    if unknown:
        known = ", ".join(port.name for port in ports)
        raise UsageError(f"--shape {unknown[0]}: the file has no such input; it has {known}")
    generator = np.random.default_rng(seed)
    found: list[Array] = []
    for number, port in enumerate(ports):
        shape = shapes[port.name] if port.name in shapes else _default(port)
        if not np.issubdtype(port.dtype, np.floating):
            found.append(generator.integers(0, _LARGEST_INDEX, shape).astype(port.dtype))
        else:
            found.append(np.random.default_rng(seed + number).standard_normal(shape).astype(port.dtype))
    return found


def _default(port: Port) -> tuple[int, ...]:
    sizes = [1 if position == 0 and size is None else size for position, size in enumerate(port.shape)]
    varying = [position for position, size in enumerate(sizes) if size is None]
    if varying:
        shown = ",".join("?" if size is None else str(size) for size in sizes)
        raise UsageError(
            f"the size of dimension {varying[0]} of input '{port.name}' varies; give one: --shape {port.name}={shown}"
        )
    return tuple(size for size in sizes if size is not None)


def _times(
    pairs: Sequence[tuple[Path, Runtime]], feeds: Sequence[Array], rounds: int, threads: int
) -> list[list[float]]:
    sessions = [_loaded(file, runtime, threads=threads) for file, runtime in pairs]
    named = [_named(session, feeds) for session in sessions]
    runs = [partial(session.run, own) for session, own in zip(sessions, named, strict=True)]
    return interleaved(runs, rounds, f"timing {len(runs)} files, {threads} thread{'s' * (threads > 1)}")


def interleaved(runs: Sequence[Callable[[], object]], rounds: int, what: str = "timing") -> list[list[float]]:
    """Returns the wall times of runs in seconds, all of them once in each round, in alternating order.

    Args:
        runs: What is timed.
        rounds: Number of rounds that count.
        what: What is running, for the progress bar.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in progress(range(_WARM_UP + rounds), what, unit="round"):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for index in order:
            started = time.perf_counter()
            runs[index]()
            took = time.perf_counter() - started
            if number >= _WARM_UP:
                times[index].append(took)
    return times


def _integer_share(file: Path, runtime: Runtime, feeds: Sequence[Array]) -> float | None:
    if file.suffix != ".onnx":
        return None
    return integer_share(work_of(Execution.of(file, runtime, lambda session: _named(session, feeds)), {}))


def _loaded(file: Path, runtime: Runtime, **options: Any) -> RuntimeSession:
    try:
        return runtime.load(file, **options)
    except Exception as error:
        raise ExportError(f"{runtime.label} cannot load '{file}': {str(error).strip()}") from error


def _named(session: RuntimeSession, feeds: Sequence[Array]) -> dict[str, Array]:
    if len(session.inputs) != len(feeds):
        raise UsageError(
            f"one file has {len(feeds)} inputs, another one {len(session.inputs)}; compare them separately"
        )
    return {port.name: array.astype(port.dtype) for port, array in zip(session.inputs, feeds, strict=True)}


def _outputs(session: RuntimeSession, feeds: Sequence[Array], runtime: Runtime) -> list[Array]:
    try:
        return session.run(_named(session, feeds))
    except UsageError:
        raise
    except Exception as error:
        raise ExportError(f"{runtime.label} cannot run the file on these inputs: {str(error).strip()}") from error


def _agreements(
    names: Sequence[str], outputs: Sequence[Array], expected: Sequence[Array], feeds: Sequence[Array]
) -> tuple[Agreement, ...]:
    if [array.shape for array in outputs] != [array.shape for array in expected]:
        return ()
    tensors = [torch.from_numpy(np.array(array)) for array in expected]
    size = next((array.shape[0] for array in feeds if array.ndim), 0)
    return tuple(compared(names, outputs, tensors, size, True))


def _size(file: Path) -> int:
    weights = [file.with_suffix(".bin")] if file.suffix == ".xml" else _external(file)
    return sum(entry.stat().st_size for entry in [file, *weights] if entry.exists())


def _external(file: Path) -> list[Path]:
    if file.suffix != ".onnx":
        return []
    import onnx  # noqa: PLC0415 - an extra

    tensors = onnx.load(file, load_external_data=False).graph.initializer
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [file.parent / name for name in sorted(names)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the quartiles of values: low, median, high."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high
