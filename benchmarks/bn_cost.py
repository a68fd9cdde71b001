"""What an adaptation pass costs, against a plain forward without gradients over the same samples.

Usage: python -m benchmarks.bn_cost [--rounds 11]

CPU time of one thread. `baseline` is the plain forward against itself: its distance from 1 is the noise.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import report
from benchmarks.clock import Ratio, compare
from benchmarks.compressions import Compression
from compress_core.batchnorm.forward_pass import AdaptationPass
from compress_core.contract.statistics import Table
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_core.transforms import bypass_transforms
from examples.common.networks import mobilenet_v2, resnet18

SAMPLES, BATCH, SIZE = 128, 32, 64


def plain_forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """What every measurement is divided by."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def adapt(model: nn.Module, layers: dict[str, _BatchNorm], batches: list[torch.Tensor], method: str) -> None:
    """One adaptation."""
    data = CalibrationData(InitArgs(batches), "benchmark")
    with AdaptationPass(model, layers, method) as adaptation:
        reference = functools.partial(bypass_transforms, model) if adaptation.needs_reference else None
        adaptation.run(data, data.batches(SAMPLES), reference=reference)
        adaptation.finish(SAMPLES)


def measure(model: nn.Module, layout: torch.memory_format, rounds: int) -> dict[str, Ratio]:
    """Times the estimators on a model in a memory layout."""
    model = model.to(memory_format=layout).eval()
    batches = [torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=layout) for _ in range(SAMPLES // BATCH)]
    model.train()
    with torch.no_grad():
        model(batches[0])  # statistics that are not the initial ones
    model.eval()
    Compression("sparsity", 0.5).apply(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    plain = functools.partial(plain_forward, model, batches)
    methods = {
        method: functools.partial(adapt, model, layers, batches, method) for method in ("exact", "momentum", "paired")
    }
    return compare(plain, methods, rounds)


def main() -> None:
    """Measures, prints, and writes results/bn_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, results = [], {}
    for name, make in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            found: dict[str, Any] = measure(make(), layout, options.rounds)
            label = f"{name}, {str(layout).removeprefix('torch.')}"
            rows.append((label, *(str(ratio) for ratio in found.values())))
            results[label] = {method: asdict(ratio) for method, ratio in found.items()}
            report.write("bn_cost", {"samples": SAMPLES, "batch": BATCH, "size": SIZE, "ratios": results})
    headers = ("model, 50 % sparse", "baseline", "exact", "momentum", "paired")
    report.show(Table("Adaptation / plain forward, CPU time, median [quartiles]", headers, rows))


if __name__ == "__main__":
    main()
