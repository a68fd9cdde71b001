"""What 8 bits are worth in each runtime, beside what other tools make of the same network.

Usage: python -m benchmarks.runtimes [--networks resnet18 vit ...] [--peer PYTHON] [--rounds 15]

Each network has random weights, batch 1, and is quantized without training: with `target_device` of the runtime by
compress-core, by NNCF 3 (in the environment of `--peer`, made with `pip install nncf openvino onnx onnxruntime`; left
out without one), and by ONNX Runtime's static quantization; for XNNPACK by torch's own (PT2E, XNNPACKQuantizer). All
files of a runtime run one after the other in each round, with one thread; a ratio is that to the FP32 file in the same
round (below 1 is faster). `again` is the FP32 file a second time: the noise. `in integers` is the share of
multiplications that the runtime's own profile reports. Differences are to FP32, on random inputs in networks that were
never trained: they tell a broken file from a whole one, and say nothing about accuracy (see
benchmarks.exported_accuracy for that).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.exported_latency import instructions
from benchmarks.runtime_networks import CASES, Case, network
from benchmarks.runtime_programs import PEER, measured_programs
from compress_core import create_compressed_model
from compress_core.cli.compare import runtime_of
from compress_core.contract.statistics import Table
from compress_core.export.report import ExportReport
from compress_core.export.side_by_side import Measured, measure

RUNTIMES = {"onnxruntime": "onnxruntime-cpu", "openvino": "openvino-cpu", "xnnpack": "xnnpack"}
CALIBRATION = 16
PEERS = {
    "onnxruntime": {"NNCF 3": ("nncf-onnx", ".onnx"), "ORT static": ("onnxruntime", ".onnx")},
    "openvino": {"NNCF 3": ("nncf-openvino", ".xml"), "ORT static": ("onnxruntime", ".onnx")},
}


def exported(name: str, device: str | None, path: Path) -> ExportReport:
    """Writes the file of a network: FP32, or quantized for a device."""
    case, model = CASES[name], network(name)
    size = {"sample_size": [1, *case.shape], "type": "long" if case.vocabulary else "float"}
    document: dict[str, Any] = {"input_info": size, "compression": []}
    batch = case.batch(CALIBRATION, 2)
    if device is not None:
        document["target_device"] = device
        section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": CALIBRATION}}}
        document["compression"] = section
    controller, _ = create_compressed_model(
        model, document, init_loader=[(sample, 0) for sample in torch.split(batch, 4)]
    )
    names = None if path.suffix == ".pte" else ["x"]
    return controller.export(path, case.batch(2, 3), verify=False, input_names=names)


def peer(tool: str, python: str, source: Path, case: Case, result: Path) -> str:
    """Lets another tool quantize a file; returns what went wrong."""
    data = result.with_suffix(".npz")
    np.savez(data, x=case.batch(CALIBRATION, 2).numpy())
    script = Path(__file__).with_name("runtime_peers.py")
    found = subprocess.run([python, script, tool, source, data, result], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 and result.exists() else (found.stderr.strip().splitlines() or ["no file"])[-1]


def refused(runtime: str, path: Path) -> str:
    """Returns why a runtime does not take a file; empty if it does."""
    try:
        runtime_of(runtime).load(path)
    except Exception as error:
        return str(error).strip().splitlines()[-1]
    return ""


def measured(name: str, runtime: str, python: str | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Measures all files of a network in a runtime."""
    if runtime == "xnnpack":
        programs, failures = measured_programs(name, rounds, folder, exported)
        return {"files": {label: asdict(entry) for label, entry in programs.items()}, "failures": failures}
    case = CASES[name]
    files = {"FP32": folder / "fp32.onnx", "FP32 again": folder / "again.onnx", "ours": folder / "ours.onnx"}
    exported(name, None, files["FP32"])
    shutil.copy(files["FP32"], files["FP32 again"])
    exported(name, RUNTIMES[runtime], files["ours"])
    failures = {}
    for label, (tool, suffix) in PEERS[runtime].items():
        interpreter = sys.executable if tool == "onnxruntime" else python
        if interpreter is None:
            continue
        result = folder / f"{tool}{suffix}"
        failure = peer(tool, interpreter, files["FP32"], case, result) or refused(runtime, result)
        if failure:
            failures[label] = failure
        else:
            files[label] = result
    feeds = [case.batch(1, 4).numpy()]
    found = measure(list(files.values()), [runtime_of(runtime)], feeds, rounds=rounds, threads=[1])
    return {
        "files": {label: asdict(entry) for label, entry in zip(files, found, strict=True)},
        "failures": failures,
    }


def rows_of(name: str, runtime: str, result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Returns the rows of a table."""
    rows: list[tuple[Any, ...]] = []
    for label, values in result["files"].items():
        entry = Measured(**values)
        low, median, high = entry.ratios[1]
        share = "-" if entry.integer_share is None else f"{entry.integer_share:.0%}"
        worst = max((a["relative_mean"] for a in values["agreements"]), default=float("nan"))
        rows.append(
            (
                name,
                runtime,
                label,
                f"{entry.milliseconds[1][1]:.1f}",
                f"{median:.2f} [{low:.2f}, {high:.2f}]",
                f"{entry.size / 1e6:.1f}",
                share,
                f"{worst:.3f}",
            )
        )
    rows += [(name, runtime, label, "-", "-", "-", "-", failure[:40]) for label, failure in result["failures"].items()]
    return rows


def summary(results: dict[str, Any]) -> Table:
    """Returns the time of each 8-bit file as a share of FP32's: a row for each network and runtime."""
    columns = ("ours", "NNCF 3", "ORT static", PEER)
    rows = []
    for name, runtimes in results.items():
        for runtime, result in runtimes.items():
            cells = []
            for label in columns:
                entry, failed = result["files"].get(label), label in result["failures"]
                if entry is None:
                    cells.append("no file" if failed else "-")
                    continue
                median = entry["ratios"].get("1", entry["ratios"].get(1))[1]
                worst = max((a["relative_mean"] for a in entry["agreements"]), default=float("nan"))
                cells.append(f"{median:.2f} ({worst:.2f})")
            rows.append((name, runtime, *cells))
    return Table("time / FP32 (difference to FP32)", ("network", "runtime", *columns), rows)


def earlier() -> dict[str, Any]:
    """Returns the results of an earlier call on a processor with the same instructions."""
    path = report.RESULTS / "runtimes.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = found.get("instructions") == instructions()
    networks: dict[str, Any] = found["networks"] if same else {}
    return networks


def main() -> None:
    """Measures, prints, and writes results/runtimes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--peer", metavar="PYTHON", help="the Python of an environment with NNCF 3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", action="store_true", help="keep the results of other networks and runtimes")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = earlier() if options.keep else {}
    headers = ("network", "runtime", "file", "ms", "time / FP32", "MB", "in integers", "difference")
    for name in options.networks:
        for runtime in options.runtimes:
            with tempfile.TemporaryDirectory() as folder:
                result = measured(name, runtime, options.peer, options.rounds, Path(folder))
            results.setdefault(name, {})[runtime] = {"rounds": options.rounds, **result}
            title = f"{name}, batch 1, one thread, {options.rounds} rounds, median [quartiles]"
            report.show(Table(title, headers, rows_of(name, runtime, result)))
            report.write("runtimes", {"instructions": instructions(), "networks": results})
    report.show(summary(results))
    print("instructions of the processor:", ", ".join(instructions()) or "unknown")


if __name__ == "__main__":
    main()
