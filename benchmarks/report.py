"""What all benchmarks share: where results go, and what they say about the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress_core.contract.statistics import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Returns what a reader has to know to compare figures."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json`; a script that measures for long calls this after each part."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def quartiles(found: Mapping[str, float]) -> str:
    """Returns a median with its quartiles, of the keys `median`, `low` and `high`."""
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def show(*tables: Table) -> None:
    """Prints tables."""
    for table in tables:
        print(table.to_str(), end="\n\n", flush=True)
