"""What integers are worth in ONNX Runtime: exported ResNet-18, ResNet-50 and MobileNetV2 against their FP32 files.

Usage: python -m benchmarks.exported_latency [--networks resnet18 resnet50 mobilenet_v2] [--rounds 15]

Networks of torchvision with random weights, 224x224 pixels, batch 1, quantization with the default config, ranges from
noise. Measured twice: CPU time of one thread, which holds on a busy machine too, and wall time of two threads, which
is what a user waits. Both files run one after the other in each round, in alternating order, and the ratio is that of
a round; `FP32 / FP32` is a second session on the same file: the noise. What integers are worth depends on the
instructions of the processor (AVX-512, VNNI), which the results name. Nothing here says anything about accuracy: the
column `agreement` compares runtime and torch on noise, in networks that were never trained.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.clock import Ratio
from benchmarks.torchvision_operators import define_missing_operators
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.export import ExportReport

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
SIZE = 224
# What speeds integers up on x86 and ARM, as the kernel calls it.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def instructions() -> list[str]:
    """Returns which of `INSTRUCTIONS` the processor has; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    return [name for name in INSTRUCTIONS if name in flags]


def network(name: str) -> nn.Module:
    """Returns a network in eval mode, with running statistics that fit noise."""
    define_missing_operators()
    model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over batches
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def exported(name: str, folder: Path) -> dict[str, ExportReport]:
    """Writes both files of a network."""
    torch.manual_seed(0)
    model, noise = network(name), torch.randn(8, 3, SIZE, SIZE)
    document: dict[str, Any] = {"input_info": {"sample_size": [1, 3, SIZE, SIZE]}, "compression": []}
    plain, _ = create_compressed_model(model, document)
    reports = {"FP32": plain.export_onnx(folder / f"{name}.fp32.onnx", noise[:2], verify=False)}
    document["compression"] = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
    quantized, _ = create_compressed_model(model, document, init_loader=[noise])
    # Networks that were not trained amplify every rounding: the tolerance is not what is measured here.
    reports["8 bits"] = quantized.export_onnx(folder / f"{name}.int8.onnx", noise[:2], tolerance=float("inf"))
    return reports


# Name -> (threads, clock).
MEASURES: dict[str, tuple[int, Callable[[], float]]] = {
    "1 thread, CPU": (1, time.process_time),
    "2 threads, wall": (2, time.perf_counter),
}


def runner(path: str, threads: int) -> Callable[[], object]:
    """Returns a function that runs a file on one image."""
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait actively would take the processor from the session that is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: torch.randn(1, 3, SIZE, SIZE).numpy()}
    return lambda: session.run(None, feed)


def compared(
    runs: dict[str, Callable[[], object]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, Ratio]:
    """Returns how many times faster each run is than the first one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            single = []
            for _ in range(repeats):
                started = clock()
                runs[name]()
                single.append(clock() - started)
            if number:  # the first round warms up
                times[name].append(statistics.median(single))
    base = times[next(iter(runs))]
    found = {}
    for name, measured in times.items():
        low, median, high = statistics.quantiles([b / t for b, t in zip(base, measured, strict=True)], n=4)
        found[name] = Ratio(median, low, high, 1000 * statistics.median(measured))
    return found


def measure(name: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Measures one network."""
    with tempfile.TemporaryDirectory() as folder:
        reports = exported(name, Path(folder))
        fp32, int8 = reports["FP32"], reports["8 bits"]
        paths = {"FP32": fp32.path, "FP32 again": fp32.path, "8 bits": int8.path}
        faster = {
            measure: compared({key: runner(path, threads) for key, path in paths.items()}, rounds, repeats, clock)
            for measure, (threads, clock) in MEASURES.items()
        }
    agreements = {str(optimized): int8.worst(optimized=optimized) for optimized in (False, True)}
    return {
        "faster": {key: {run: asdict(ratio) for run, ratio in found.items()} for key, found in faster.items()},
        "bytes": {"FP32": fp32.size, "8 bits": int8.size},
        "size_ratio": int8.size / fp32.size,
        "operators": dict(int8.operators),
        "runtime": int8.runtime,
        "runtime_operators": dict(int8.runtime_operators),
        "worst_agreement": {key: None if found is None else asdict(found) for key, found in agreements.items()},
    }


def table(results: dict[str, Any]) -> Table:
    """Shows what the goals are about."""
    rows = []
    for name, result in results.items():
        for measure, faster in result["faster"].items():
            fp32, again, int8 = (faster[key] for key in ("FP32", "FP32 again", "8 bits"))
            rows.append(
                (
                    name,
                    measure,
                    f"{fp32['milliseconds']:.1f}",
                    f"{int8['milliseconds']:.1f}",
                    report.quartiles(int8),
                    report.quartiles(again),
                    f"{result['bytes']['FP32'] / 1e6:.1f} -> {result['bytes']['8 bits'] / 1e6:.1f}",
                    f"{result['size_ratio']:.3f}",
                    f"{result['worst_agreement']['False']['relative_mean']:.1e}",
                )
            )
    headers = ("network", "clock", "FP32 ms", "8 bits ms", "times faster", "FP32 / FP32", "MB", "size", "agreement")
    return Table("ONNX Runtime, 224x224, batch 1, median [quartiles] of the rounds", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/exported_latency.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each file in a round")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.networks:
        results[name] = measure(name, options.rounds, options.repeats)
        report.show(table({name: results[name]}))
        found = {"instructions": instructions(), "options": vars(options), "networks": results}
        report.write("exported_latency", found)
    print("instructions of the processor:", ", ".join(instructions()) or "unknown")


if __name__ == "__main__":
    main()
