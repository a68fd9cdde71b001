"""`compress-core compare`: measures files in runtimes side by side."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress_core.contract.choices import choices_of
from compress_core.contract.statistics import Table
from compress_core.errors import CompressionError, ExportError, UsageError
from compress_core.export import OnnxExporter, Runtime
from compress_core.export.runtimes.runtime import Array
from compress_core.export.side_by_side import Measured, all_threads, example_feeds, measure

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_SHAPE = re.compile(r"(?P<name>.+)=(?P<sizes>\d{1,18}(?:,\d{1,18})*)")


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("compare", help="measure exported files in runtimes: latency, size, agreement")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".onnx files, or OpenVINO's .xml")
    parser.add_argument(
        "--runtime",
        nargs="+",
        default=["onnxruntime"],
        help="runtimes (default: onnxruntime); what is installed counts",
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=SIZES",
        help="shape of an input whose size varies, such as pixels=1,3,224,224; the batch is 1 by default",
    )
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="real inputs by name, instead of random ones")
    parser.add_argument("--rounds", type=int, default=20, help="number of runs that count (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file as well")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 0, or 1 after one line on stderr that says what is wrong."""
    try:
        _run(options)
    except CompressionError as error:
        sys.stderr.write(f"compress-core compare: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds}: at least one run has to count")
    for file in options.files:
        if not file.is_file():
            raise UsageError(f"'{file}' is no file")
    runtimes = [runtime_of(name) for name in options.runtime]
    feeds = _feeds(options, runtimes[0])
    threads = sorted({1, all_threads()})
    found = measure(options.files, runtimes, feeds, rounds=options.rounds, threads=threads)
    table = _table(found, threads, options.rounds).to_str()
    sys.stdout.write(f"{table}\n{_explanation(found[0], runtimes[0])}\n")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(entry) for entry in found], indent=2) + "\n", encoding="utf-8")


def runtime_of(name: str) -> Runtime:
    """Returns a runtime by the name of its target.

    Raises:
        UsageError: There is no such runtime.
        ExportError: It is not installed.
    """
    exporters = {key: choice.value for key, choice in choices_of("export.target").items()}
    known = {
        key: exporter.runtime
        for key, exporter in exporters.items()
        if isinstance(exporter, OnnxExporter) and exporter.runtime.profiles
    }
    if name not in known:
        raise UsageError(f"--runtime {name}: choose of {', '.join(known)}")
    known[name].check_installed()
    return known[name]


def _feeds(options: argparse.Namespace, runtime: Runtime) -> list[Array]:
    file = options.files[0]
    try:
        ports = runtime.load(file, optimized=False).inputs
    except Exception as error:
        raise ExportError(f"{runtime.label} cannot load '{file}': {str(error).strip()}") from error
    if options.inputs is None:
        return example_feeds(ports, dict(map(_shape, options.shape)))
    try:
        given = dict(np.load(options.inputs))
    except (OSError, ValueError) as error:
        raise UsageError(f"--inputs {options.inputs}: {error}; save arrays by name with numpy.savez") from error
    missing = [port.name for port in ports if port.name not in given]
    if missing:
        raise UsageError(f"--inputs {options.inputs}: '{missing[0]}' is missing; it holds {', '.join(given)}")
    return [given[port.name] for port in ports]


def _shape(text: str) -> tuple[str, list[int]]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise UsageError(f"--shape {text}: write NAME=SIZES, such as pixels=1,3,224,224")
    return found["name"], [int(size) for size in found["sizes"].split(",")]


def _table(found: Sequence[Measured], threads: Sequence[int], rounds: int) -> Table:
    headers = ["file", "runtime", "MB"]
    for count in threads:
        headers += [f"ms, {count} thread{'s' * (count > 1)}", "ratio"]
    headers += ["in integers", "mean difference", "top-1"]
    rows = []
    for entry in found:
        row = [entry.file, entry.runtime, f"{entry.size / 1e6:.2f}"]
        for count in threads:
            (low, median, high), ratio = entry.milliseconds[count], entry.ratios[count]
            row += [f"{median:.3g} [{low:.3g}, {high:.3g}]", f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]"]
        worst = max(entry.agreements, key=lambda agreement: agreement.relative_mean, default=None)
        top1 = [agreement.top1 for agreement in entry.agreements if agreement.top1 is not None]
        row.append("-" if entry.integer_share is None else f"{entry.integer_share:.1%}")
        row.append("other outputs" if worst is None else f"{worst.relative_mean:.2e}")
        row.append(f"{min(top1):.1%}" if top1 else "-")
        rows.append(row)
    return Table(f"Medians and quartiles of {rounds} rounds, interleaved", headers, rows)


def _explanation(first: Measured, runtime: Runtime) -> str:
    return (
        f"Ratios are to {first.file} in {first.runtime}, in the same round. Differences are to {first.file} in "
        f"{runtime.name} without optimizations, as a share of the mean absolute output. 'in integers' is the share of "
        "multiplications, from the runtime's own profile."
    )
