"""How much faster networks are without half of their channels, what masks cost in training, how long planning takes.

Usage: python -m benchmarks.pruned_latency [--rounds 15] [--wall 2] [--models resnet18 resnet50 mobilenet_v2]

Latency is CPU time of one thread at 224x224, batch 1, eager float32, in turns with the uncompressed network; with
`--wall N` also wall time of N threads, for which the machine has to be idle. Channels are left in multiples of 8. The
training step with masks is CPU time of one thread against the plain step, at 64x64, batch 32.
Random weights: which channels go does not matter here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.clock import Ratio, compare
from benchmarks.sparsity_cost import SIZE, TrainingStep
from compress_core import CompressionController, create_compressed_model
from compress_core.channels import channel_groups
from compress_core.contract.statistics import Table
from compress_core.trace import Example, trace
from examples.common.networks import mobilenet_v2, resnet18, resnet50

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
}


def pruned(model: nn.Module, size: int, **params: Any) -> CompressionController:
    """Prunes a model in place: half of the channels of everything that can be pruned, or what `params` say."""
    allowed = {"prune_first_conv": True, "prune_downsample_convs": True}
    section = {"algorithm": "filter_pruning", "params": {**allowed, **params}}
    target = params.get("pruning_flops_target", 0.5)
    section["pruning_init"] = target  # type: ignore[assignment]
    document = {"input_info": {"sample_size": [1, 3, size, size]}, "compression": section}
    return create_compressed_model(model, document)[0]


def speed_up(
    full: nn.Module, small: nn.Module, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Returns how many times faster the small one is (quartiles), and the milliseconds of the full one."""
    x = torch.randn(1, 3, 224, 224)
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for number in range(rounds + 2):
            for model, found in zip((full, small), times, strict=True):
                started = clock()
                model(x)
                if number >= 2:
                    found.append(clock() - started)
    low, median, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
    return {"median": median, "low": low, "high": high, "full_ms": 1000 * statistics.median(times[0])}


def measure(make: Callable[[], nn.Module], rounds: int, wall: int) -> dict[str, Any]:
    """Returns the figures of one network."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full = make().eval()
    controller = pruned(copy.deepcopy(full), 224)
    small = controller.strip().eval()
    found: dict[str, Any] = {"speed_up": speed_up(full, small, rounds)}
    if wall:
        torch.set_num_threads(wall)
        found[f"speed_up_wall_{wall}_threads"] = speed_up(full, small, rounds, time.perf_counter)
        torch.set_num_threads(1)
    figures = controller.statistics().filter_pruning
    return {
        **found,
        "flops_ratio": figures.full_flops / figures.current_flops,
        "parameters_ratio": figures.full_parameters / figures.current_parameters,
        "certificate": figures.certificate.to_dict(),
        "step_with_masks": asdict(_step_with_masks(full, rounds)),
        **_planning(full),
    }


def _step_with_masks(full: nn.Module, rounds: int) -> Ratio:
    masked = copy.deepcopy(full)
    pruned(masked, SIZE)
    return compare(TrainingStep(full), {"masks": TrainingStep(masked)}, rounds)["masks"]


def _planning(full: nn.Module) -> dict[str, float]:
    """CPU seconds: trace and groups (the second time), the search for a FLOPs target, and everything together."""
    example = Example.of(torch.randn(1, 3, 224, 224))
    channel_groups(trace(full, example))
    groups = _seconds(lambda: channel_groups(trace(full, example)))
    whole = _seconds(lambda: pruned(copy.deepcopy(full), 64))
    controller = pruned(copy.deepcopy(full), 64, pruning_flops_target=0.5, all_weights=True)
    search = _seconds(lambda: controller.set_pruning_level(0.4))
    return {"groups_seconds": groups, "flops_target_seconds": search, "create_seconds": whole}


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """Returns what was gained, and what it cost."""
    latency = [
        (
            name,
            report.quartiles(found["speed_up"]),
            f"{found['speed_up']['full_ms']:.0f}",
            f"{found['flops_ratio']:.2f}",
            f"{found['parameters_ratio']:.2f}",
            f"{found['certificate']['eval_difference']:.0e}",
        )
        for name, found in results.items()
    ]
    keys = ("groups_seconds", "flops_target_seconds", "create_seconds")
    costs = [
        (name, report.quartiles(found["step_with_masks"]), *(f"{found[key]:.2f}" for key in keys))
        for name, found in results.items()
    ]
    return [
        Table(
            "Half of the channels, 224x224, batch 1, CPU time of one thread",
            ("network", "times faster", "full, ms", "FLOPs / FLOPs left", "parameters / left", "difference"),
            latency,
        ),
        Table(
            "Cost, CPU time of one thread",
            ("network", "step with masks / plain", "trace and groups, s", "FLOPs target, s", "create at 64x64, s"),
            costs,
        ),
    ]


def main() -> None:
    """Measures, prints, and writes results/pruned_latency.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--wall", type=int, default=0, metavar="N", help="measure wall time with N threads, too")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    results = {}
    for name in options.models:
        results[name] = measure(MODELS[name], options.rounds, options.wall)
        report.write("pruned_latency", {"results": results})
    report.show(*tables(results))


if __name__ == "__main__":
    main()
