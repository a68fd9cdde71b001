"""What a search for a ranking over all groups gains: the public ResNet-56 on CIFAR-10, pruned and adapted, not trained.

Usage: python -m benchmarks.ranking_search [--ratios 1.5 2.1] [--candidates 32] [--samples 128] [--test-images 1000]

For each ratio of floating point operations: the same level in each group, one ranking of normalized weights, and the
ranking that `adapted_ranking` finds on images of the training set without their labels. All get the same batch-norm
adaptation and are measured on the same test images. Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import nn

from benchmarks import report
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.networks import resnet56_cifar10
from examples.common.training import accuracy

KINDS = ("the same level", "unweighted_ranking", "adapted_ranking")


def document(kind: str, ratio: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the config for one of `KINDS`."""
    target = 1 - 1 / ratio
    params: dict[str, Any] = {
        "schedule": "baseline",
        "pruning_flops_target": target,
        "prune_first_conv": False,
        "prune_downsample_convs": True,
        "multiple_of": 1,
    }
    if kind == "adapted_ranking":
        params["interlayer_ranking_type"] = kind
        params["adapted_params"] = {"candidates": options.candidates, "calibration_samples": options.samples}
    else:
        params["all_weights"] = kind == "unweighted_ranking"
    adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 256}}
    section = {"algorithm": "filter_pruning", "pruning_init": target, "params": params, "initializer": adaptation}
    return {"input_info": {"sample_size": [1, 3, 32, 32]}, "compression": section}


def measure(base: nn.Module, data: Dataset, kind: str, ratio: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row."""
    images = data.train[0][:512]
    started = time.process_time()
    settings = document(kind, ratio, options)
    controller, model = create_compressed_model(copy.deepcopy(base), settings, init_loader=list(images.split(128)))
    seconds = time.process_time() - started
    figures = controller.statistics().filter_pruning
    test = (data.test[0][: options.test_images], data.test[1][: options.test_images])
    return {
        "kind": kind,
        "ratio": ratio,
        "FLOPs": figures.full_flops / figures.current_flops,
        "parameters": figures.full_parameters / figures.current_parameters,
        "accuracy": accuracy(model, test),
        "seconds": seconds,
        "error": None if figures.ranking is None else [figures.ranking.unweighted, figures.ranking.value],
    }


def main() -> None:
    """Measures, prints, and writes results/ranking_search.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.5, 2.1], help="FLOPs / FLOPs left")
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, data = resnet56_cifar10().eval(), DATASETS["cifar10"]()
    fp32 = accuracy(base, (data.test[0][: options.test_images], data.test[1][: options.test_images]))
    rows = []
    for ratio in options.ratios:
        for kind in KINDS:
            rows.append(measure(base, data, kind, ratio, options))
            report.write("ranking_search", {"settings": vars(options), "fp32": fp32, "rows": rows})
    cells = [
        (f"{r['ratio']:.1f}", r["kind"], *(f"{r[key]:.2f}" for key in ("FLOPs", "parameters", "accuracy", "seconds")))
        for r in rows
    ]
    headers = ("asked for", "ranking", "FLOPs / left", "parameters / left", "accuracy, %", "CPU s")
    report.show(Table(f"ResNet-56 on CIFAR-10, FP32 {fp32:.2f} %, pruned and adapted", headers, cells))


if __name__ == "__main__":
    main()
