"""The field's table for filter pruning: the public ResNet-56 on CIFAR-10 with fewer floating point operations.

Usage: python -m benchmarks.resnet56_cifar10 [--ratios 1.5 2.1 2.6] [--epochs 1] [--train-images 5000]

For each ratio: accuracy after pruning, after batch-norm adaptation, and after a short fine-tune of the shrunk network.
Published results at 2.1 times fewer operations come from hundreds of epochs on all 50,000 images; this is a look at
where one starts, on two cores. Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
from torch import nn

from benchmarks import report
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.networks import resnet56_cifar10
from examples.common.training import accuracy, train

COLUMNS = ("FLOPs", "parameters", "pruned", "adapted", "fine-tuned")


def document(ratio: float, samples: int, *, all_weights: bool) -> dict[str, Any]:
    """Returns the config: one ranking over all groups or the same level in each."""
    target = 1 - 1 / ratio
    params = {
        "schedule": "baseline",
        "pruning_flops_target": target,
        "all_weights": all_weights,
        "prune_downsample_convs": True,
        "multiple_of": 1,
    }
    section: dict[str, Any] = {"algorithm": "filter_pruning", "pruning_init": target, "params": params}
    if samples:
        section["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": samples}}
    return {"input_info": {"sample_size": [1, 3, 32, 32]}, "compression": section}


def measure(base: nn.Module, data: Dataset, ratio: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row."""
    test = (data.test[0][: options.test_images], data.test[1][: options.test_images])
    images, labels = data.train[0][: options.train_images], data.train[1][: options.train_images]
    loader = list(zip(images.split(128), labels.split(128), strict=True))
    row: dict[str, Any] = {"ratio": ratio}
    plain = create_compressed_model(copy.deepcopy(base), document(ratio, 0, all_weights=options.all_weights))[1]
    row["pruned"] = accuracy(plain, test)
    settings = document(ratio, 256, all_weights=options.all_weights)
    controller, model = create_compressed_model(copy.deepcopy(base), settings, init_loader=loader)
    row["adapted"] = accuracy(model, test)
    controller.shrink()
    started = time.perf_counter()
    torch.manual_seed(0)
    train(model, _Shuffled(images, labels, 128), epochs=options.epochs, max_lr=0.01, flip=True)
    row["fine-tuned"] = accuracy(model, test)
    row["seconds"] = time.perf_counter() - started
    figures = controller.statistics().filter_pruning
    row["FLOPs"] = figures.full_flops / figures.current_flops
    row["parameters"] = figures.full_parameters / figures.current_parameters
    row["difference"] = figures.certificate.eval_difference
    return row


class _Shuffled:
    """Batches in a new order in each epoch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch)

    def __iter__(self) -> Any:
        for chosen in torch.randperm(len(self.labels)).split(self.batch):
            yield self.images[chosen], self.labels[chosen]


def main() -> None:
    """Measures, prints, and writes results/resnet56_cifar10.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.5, 2.1, 2.6], help="FLOPs / FLOPs left")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--all-weights", action="store_true", help="one ranking over all groups")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, data = resnet56_cifar10().eval(), DATASETS["cifar10"]()
    fp32 = accuracy(base, (data.test[0][: options.test_images], data.test[1][: options.test_images]))
    rows = []
    for ratio in options.ratios:
        rows.append(measure(base, data, ratio, options))
        print(rows[-1], flush=True)
        name = "resnet56_cifar10-all-weights" if options.all_weights else "resnet56_cifar10"
        report.write(name, {"settings": vars(options), "fp32": fp32, "rows": rows})
    cells = [(f"{row['ratio']:.1f}", *(f"{row[key]:.2f}" for key in COLUMNS)) for row in rows]
    headers = ("asked for", "FLOPs / left", "parameters / left", "pruned, %", "adapted, %", "fine-tuned, %")
    tuning = f"{options.epochs} epoch(s) on {options.train_images} images"
    report.show(Table(f"ResNet-56 on CIFAR-10, FP32 {fp32:.2f} %, fine-tuned {tuning}", headers, cells))


if __name__ == "__main__":
    main()
