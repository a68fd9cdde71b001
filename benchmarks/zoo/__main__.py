"""The zoo: models of practitioners, created as a user writes it, trained, stripped, resumed and exported.

Usage: python -m benchmarks.zoo [--short] [--only PATTERN] [--library NAME] [--algorithms quantization,...]
       [--no-export] [--again defect,sentence] [--timeout 300] [--results FILE] [--docs FILE] [--table-only]

Every model and algorithm runs in a process of its own with a time limit, so that a crash is a cell of the table and not
the end. Results are written after every cell; what the file already holds is not run again, unless `--fresh` or
`--again` (statuses to repeat) say so. A library that is not installed is skipped, and said. `--docs` rewrites the table
between the markers of that file.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.torchvision_operators import define_missing_operators
from benchmarks.zoo import libraries, table
from benchmarks.zoo.entries import Entry, entries
from benchmarks.zoo.measure import ALGORITHMS, Outcome, measure, measure_plain

_RESULTS = report.RESULTS / "zoo.json"


def main() -> None:
    """Measures what is asked for, prints the tables, and writes the results."""
    options = _options()
    results = _read(options.results)
    if not options.table_only:
        prepare()
        chosen = list(chosen_entries(options))
        for number, entry in enumerate(chosen):
            print(f"[{number + 1}/{len(chosen)}] {entry.name}", flush=True)
            found = results.setdefault(entry.name, {"library": entry.library, "kind": entry.kind})
            for name, cell in cells(entry, found, options):
                found[name] = cell
                print(f"  {table.line(name, cell)}", flush=True)
                _write(options.results, results)
    report.show(*table.tables(results))
    if options.docs:
        table.write(options.docs, results)


def prepare() -> None:
    """Sets up what all processes share: one thread, quiet libraries, what torchvision lacks, modules that take long."""
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", YOLO_VERBOSE="false", YOLO_OFFLINE="true", TOKENIZERS_PARALLELISM="false")
    # Kernels compute the same as torch's operators, and compiling them for every process would take most of the time.
    os.environ.setdefault("COMPRESS_QUANTIZATION_KERNELS", "eager")
    define_missing_operators()
    for name in ("transformers", "diffusers", "onnxscript", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    libraries.preload()


def chosen_entries(options: argparse.Namespace) -> Iterator[Entry]:
    """Yields the models to run, and says which libraries are missing."""
    missing: dict[str, str] = {}
    for entry in entries():
        if options.short and entry.library != "own":
            continue
        if options.library and entry.library not in options.library.split(","):
            continue
        if not any(fnmatch.fnmatch(entry.name.lower(), pattern.lower()) for pattern in options.only.split(",")):
            continue
        if entry.library not in missing:
            missing[entry.library] = libraries.why_missing(entry.library)
            if missing[entry.library]:
                print(f"{entry.library}: skipped, {missing[entry.library]}", flush=True)
        if not missing[entry.library]:
            yield entry


def cells(entry: Entry, known: dict[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the plain model and its cells, but those that are known."""
    again = set(options.again.split(","))

    def repeat(cell: dict[str, Any] | None) -> bool:
        if cell is None or options.fresh:
            return True
        return any(outcome["status"] in again for outcome in cell["stages"].values())

    plain = known.get("plain")
    if plain is None or options.fresh or "error" in plain or (options.export and "exports" not in plain):
        plain = isolated_plain(entry, options.export, options.timeout)
        yield "plain", plain
    if "error" in plain:
        return
    for algorithm in options.algorithms.split(","):
        unexported = options.export and "not asked for" in json.dumps(known.get(algorithm, ""))
        if repeat(known.get(algorithm)) or unexported:
            yield algorithm, isolated(entry, algorithm, plain, options.export, options.timeout)


def isolated(entry: Entry, algorithm: str, plain: dict[str, Any], export: bool, timeout: float) -> dict[str, Any]:
    """Runs `measure` in a process of its own."""
    found: dict[str, Any] = {}
    started = time.monotonic()
    end = ""
    for message in _messages(_child, (entry, algorithm, plain, export), timeout):
        if isinstance(message, str):
            end = message
        else:
            found[message[0]] = asdict(message[1])
    if end:
        following = [stage for stage in table.STAGES if stage not in found]
        found[following[0] if following else "exported"] = asdict(Outcome("defect", end))
    return {"stages": found, "seconds": round(time.monotonic() - started, 1)}


def isolated_plain(entry: Entry, export: bool, timeout: float) -> dict[str, Any]:
    """Runs `measure_plain` in a process of its own; a failure is the entry `error`."""
    found: dict[str, Any] = {"error": "nothing came back"}
    for message in _messages(_plain_child, (entry, export), timeout):
        found = {"error": message} if isinstance(message, str) else message
    return found


def _messages(target: Any, arguments: tuple[Any, ...], timeout: float) -> Iterator[Any]:
    """Yields what a process sends; last, a string if it ended badly."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    deadline = time.monotonic() + timeout
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            message = receiver.recv()
            if message is None:
                return
            yield message
        yield f"took longer than {timeout:.0f} s"
    except EOFError:
        process.join()
        yield f"the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _child(entry: Entry, algorithm: str, plain: dict[str, Any], export: bool, sender: Connection) -> None:
    try:
        for message in measure(entry, algorithm, plain, export):
            sender.send(message)
        sender.send(None)
    except Exception as error:  # of the zoo itself
        sender.send(f"{type(error).__name__}: {error}")
        sender.send(None)


def _plain_child(entry: Entry, export: bool, sender: Connection) -> None:
    try:
        sender.send(measure_plain(entry, export))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}"[:400])
    sender.send(None)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["models"] if path.exists() else {}
    return found


def _write(path: Path, results: dict[str, Any]) -> None:
    content = {"machine": report.machine(), "versions": libraries.versions(), "models": results}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only the models that need no library")
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--library", default="", help="names of libraries, separated by commas")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--no-export", dest="export", action="store_false")
    parser.add_argument("--again", default="-", help="statuses to repeat: defect, sentence, help")
    parser.add_argument("--fresh", action="store_true", help="repeat everything that is chosen")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model and algorithm")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--docs", type=Path, help="the document whose table is rewritten")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
