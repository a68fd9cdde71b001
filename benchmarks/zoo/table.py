"""The zoo's results as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.zoo.entries import KINDS
from benchmarks.zoo.measure import ALGORITHMS, STAGES
from compress_core.contract.statistics import Table

_BEGIN, _END = "<!-- zoo -->", "<!-- end of zoo -->"
_GOOD = {"ok", "help"}
_HEADERS = ("", "models", "as written", "with help", *STAGES[1:], "works or says why not", "creation, steps")

Cell = Mapping[str, Any]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Returns a table by algorithm, a table by kind, and lists of what was said and of what is wrong."""
    by_algorithm = [
        (name, *_counts([found[name] for found in results.values() if name in found])) for name in ALGORITHMS
    ]
    kinds = [
        (
            kind,
            *_counts(
                [found[n] for found in results.values() for n in ALGORITHMS if found["kind"] == kind and n in found]
            ),
        )
        for kind in KINDS
        if any(found["kind"] == kind for found in results.values())
    ]
    return [
        Table("By algorithm", _HEADERS, by_algorithm),
        Table("By kind, all algorithms", ("kind", "cells", *_HEADERS[2:]), kinds),
        Table("What was said", ("model", "algorithm", "stage", "sentence"), _messages(results, "sentence")),
        Table("Wrong", ("model", "algorithm", "stage", "message"), _messages(results, "defect")),
    ]


def line(name: str, cell: Cell) -> str:
    """Returns a cell as a line of text."""
    if "stages" not in cell:
        known = f"a step takes {cell['step_seconds']:.2f} s" if "step_seconds" in cell else cell.get("error", "")
        return f"{name}: {known}" + (f", exports: {cell['exports']}" if "exports" in cell else "")
    parts = [f"{stage} {outcome['status']}" for stage, outcome in cell["stages"].items()]
    bad = [
        f"\n      {o['status']}: {o['message'][:400]}"
        for o in cell["stages"].values()
        if o["status"] not in {"ok", "skipped"}
    ]
    return f"{name} ({cell['seconds']} s): {', '.join(parts)}" + "".join(bad)


def works(cell: Cell) -> bool:
    """Whether every stage worked, or one of our errors said why not."""
    return all(outcome["status"] != "defect" for outcome in cell["stages"].values())


def _counts(cells: Iterable[Cell]) -> tuple[Any, ...]:
    cells = list(cells)
    created = [cell["stages"].get("created", {"status": "defect"})["status"] for cell in cells]
    done = [
        f"{sum(cell['stages'].get(stage, {}).get('status') == 'ok' for cell in cells)}{_tried(cells, stage)}"
        for stage in STAGES[1:]
    ]
    ratios = [
        cell["stages"]["created"]["figures"]["creation_steps"]
        for cell, status in zip(cells, created, strict=True)
        if status in _GOOD
    ]
    return (
        len(cells),
        created.count("ok"),
        created.count("ok") + created.count("help"),
        *done,
        sum(works(cell) for cell in cells),
        f"{statistics.median(ratios):.1f}" if ratios else "",
    )


def _tried(cells: list[Cell], stage: str) -> str:
    tried = sum(cell["stages"].get(stage, {"status": "skipped"})["status"] != "skipped" for cell in cells)
    return f" of {tried}"


def _messages(results: Mapping[str, Any], status: str) -> list[tuple[str, ...]]:
    return [
        (model, name, stage, outcome["message"][:160])
        for model, found in results.items()
        for name in ALGORITHMS
        for stage, outcome in found.get(name, {"stages": {}})["stages"].items()
        if outcome["status"] == status
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the tables for the documentation, and what each model was."""
    found = tables(results)
    parts = [_markdown(table) for table in found[:2]]
    rows = [
        (model, found["library"], *(_short(found.get(name)) for name in ALGORITHMS))
        for model, found in results.items()
        if "error" not in found.get("plain", {})
    ]
    parts.append(_markdown(Table("By model", ("model", "library", *ALGORITHMS), rows)))
    return "\n\n".join(parts)


def _short(cell: Cell | None) -> str:
    """Returns `ok`, or the stages that did not work."""
    if cell is None:
        return ""
    bad = [f"{stage}: {o['status']}" for stage, o in cell["stages"].items() if o["status"] not in {"ok", "skipped"}]
    return ", ".join(bad).replace("created: help", "forward_fn") or "ok"


def _markdown(table: Table) -> str:
    body = tabulate([[str(c) for c in row] for row in table.rows], table.headers, "github", disable_numparse=True)
    return f"{table.title}:\n\n{body}"


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Rewrites what stands between the markers of a document."""
    text = path.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise SystemExit(f"{path} has no markers {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n\n{markdown(results)}\n\n{_END}{after}")
