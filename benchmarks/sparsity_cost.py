"""What magnitude sparsity costs: the training step with masks, and setting a global level on 100 million weights.

Usage: python -m benchmarks.sparsity_cost [--rounds 11] [--weights 100] [--device cuda]

CPU time of one thread. The training steps are ratios to the plain model's; `baseline` is that against itself. With
`--device cuda` the steps alone are timed, on the GPU, and nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from benchmarks.clock import compare
from benchmarks.compressions import Compression
from compress_core import Stage, create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.transforms import add_weight_transform
from examples.common.networks import mobilenet_v2, resnet18

BATCH, SIZE = 32, 64


class FloatMask(nn.Module):
    """The alternative that was not taken, because averages of models average it: a mask of the weight's dtype."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


class TrainingStep:
    """Forward, backward and an SGD step on random data."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        device = next(model.parameters()).device
        self.inputs = torch.randn(BATCH, 3, SIZE, SIZE).to(device)
        self.labels = torch.randint(0, 10, (BATCH,)).to(device)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.labels).backward()
        self.optimizer.step()


def training_steps(rounds: int, device: str = "cpu") -> tuple[Table, dict[str, Any]]:
    """Compares training steps with boolean masks (ours), with float masks, and without."""
    rows, results = [], {}
    for name, make in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
        torch.manual_seed(0)
        plain = make().to(device)
        masked, floats = copy.deepcopy(plain), copy.deepcopy(plain)
        Compression("sparsity", 0.5).apply(masked)
        for key, parameter in list(floats.named_parameters()):
            if parameter.ndim > 1:
                mask = FloatMask((torch.rand_like(parameter) < 0.5).to(parameter.dtype))
                add_weight_transform(floats, key, mask, stage=Stage.SPARSITY)
        steps = {"bool": TrainingStep(masked), "float": TrainingStep(floats)}
        found = compare(TrainingStep(plain), steps, rounds, device)
        rows.append((name, *(str(ratio) for ratio in found.values())))
        results[name] = {key: asdict(ratio) for key, ratio in found.items()}
    headers = ("model", "baseline", "boolean masks", "masks in the weight's dtype")
    return Table(f"Training step / plain, time on {device}, median [quartiles]", headers, rows), results


class PeakMemory:
    """Largest resident size of this process since this was made, beyond what it was then; Linux only."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = self._read("VmRSS")

    def megabytes(self) -> float:
        return max(self._read("VmHWM") - self.before, 0) / 1024

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


def global_level(millions: int) -> tuple[Table, list[dict[str, Any]]]:
    """Times `set_sparsity_level` on dense weights, and on those of which most are zero already."""
    results = []
    for importance in ("abs", "normed_abs"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
        section = {"algorithm": "magnitude_sparsity", "params": {"weight_importance": importance}}
        controller, _ = create_compressed_model(model, {"compression": section})
        for state in ("dense", "70 % zeros"):
            if state != "dense":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(torch.rand_like(parameter) < 0.3)
            for level in (0.5, 0.9):
                peak, started = PeakMemory(), time.process_time()
                controller.set_sparsity_level(level)
                seconds = time.process_time() - started
                results.append(
                    {
                        "importance": importance,
                        "weights": state,
                        "level": level,
                        "cpu_seconds": seconds,
                        "extra_peak_mb": peak.megabytes(),
                        "reached": controller.sparsity_level,
                    }
                )
        del controller, model
    headers = ("importance", "weights", "level", "CPU seconds", "extra peak memory, MB", "level reached")
    title = f"Setting a global level on {millions} million weights (float32, 4 MB a million)"
    return Table(title, headers, [tuple(result.values()) for result in results]), results


def main() -> None:
    """Measures, prints, and writes results/sparsity_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--weights", type=int, default=100, help="in millions")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device != "cpu":
        report.show(training_steps(options.rounds, options.device)[0])
        return
    level_table, levels = global_level(options.weights)
    report.show(level_table)
    step_table, steps = training_steps(options.rounds)
    report.show(step_table)
    report.write("sparsity_cost", {"training_steps": steps, "global_level": levels, "millions": options.weights})


if __name__ == "__main__":
    main()
