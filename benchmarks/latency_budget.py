"""A budget in measured time, and one in operations: the public ResNet-56 on CIFAR-10, pruned, adapted, not trained.

Usage: python -m benchmarks.latency_budget [--share 0.5] [--candidates 12] [--samples 128] [--test-images 1000]

For the same level in each group and for `adapted_ranking`: a share of the operations, that share of the time, and the
share of the time that the first one has removed. All get the same batch-norm adaptation. The stripped network is
measured against the full one in turns, apart from what the budget has measured: CPU time of one thread, a batch of 16.
Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.clock import compare
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.networks import resnet56_cifar10
from examples.common.training import accuracy

BATCH = 16
KINDS = ("the same level", "adapted_ranking")


def document(kind: str, key: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the config for a target."""
    params: dict[str, Any] = {
        "schedule": "baseline",
        key: share,
        "prune_first_conv": False,
        "prune_downsample_convs": True,
        "multiple_of": 4,
    }
    if kind == "adapted_ranking":
        params["interlayer_ranking_type"] = kind
        params["adapted_params"] = {"candidates": options.candidates, "calibration_samples": options.samples}
    adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 256}}
    section = {"algorithm": "filter_pruning", "pruning_init": share, "params": params, "initializer": adaptation}
    return {"input_info": {"sample_size": [BATCH, 3, 32, 32]}, "compression": section}


def measure(
    base: nn.Module, data: Dataset, kind: str, key: str, share: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns one row."""
    images = data.train[0][:512]
    settings = document(kind, key, share, options)
    started = time.process_time()
    controller, _ = create_compressed_model(copy.deepcopy(base), settings, init_loader=list(images.split(128)))
    seconds = time.process_time() - started
    small = controller.strip().eval()
    test = (data.test[0][: options.test_images], data.test[1][: options.test_images])
    figures, x = controller.statistics().filter_pruning, images[:BATCH]
    with torch.no_grad():
        ratio = compare(lambda: base(x), {"small": lambda: small(x)}, options.rounds)["small"]
    planned = figures.planned_latency
    return {
        "kind": kind,
        "target": key,
        "asked for": share,
        "FLOPs removed": figures.flops_pruning_level,
        "time removed": 1 - ratio.median,
        "quartiles": [1 - ratio.high, 1 - ratio.low],
        "predicted": None if planned is None else planned.predicted,
        "accuracy": accuracy(small, test),
        "seconds": seconds,
    }


def table(fp32: float, rows: list[dict[str, Any]]) -> Table:
    """Returns the rows as they are printed."""
    cells = [
        (
            row["kind"],
            row["target"],
            f"{row['asked for']:.2f}",
            f"{row['FLOPs removed']:.3f}",
            "" if row["predicted"] is None else f"{row['predicted']:.3f}",
            "{:.3f} [{:.3f}, {:.3f}]".format(row["time removed"], *row["quartiles"]),
            f"{row['accuracy']:.1f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    headers = ("ranking", "target", "asked for", "FLOPs removed", "predicted", "time removed", "accuracy, %", "CPU s")
    return Table(f"ResNet-56 on CIFAR-10, FP32 {fp32:.2f} %, pruned and adapted", headers, cells)


def main() -> None:
    """Measures, prints, and writes results/latency_budget.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, data = resnet56_cifar10().eval(), DATASETS["cifar10"]()
    fp32 = accuracy(base, (data.test[0][: options.test_images], data.test[1][: options.test_images]))
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        first = measure(base, data, kind, "pruning_flops_target", options.share, options)
        rows.append(first)
        for share in (options.share, round(first["time removed"], 2)):
            rows.append(measure(base, data, kind, "pruning_latency_target", share, options))
            report.write("latency_budget", {"settings": vars(options), "fp32": fp32, "rows": rows})
    report.show(table(fp32, rows))


if __name__ == "__main__":
    main()
