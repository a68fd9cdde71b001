"""Calibration of ranges and batch-norm adaptation depend on each other: which order is best?

Usage: python -m benchmarks.calibration_order [--nets ...] [--draws 3] [--train-images 10000] [--test-images 5000]

Sparsity and quantization together, three ways:

* `calibrate, adapt`: ranges are measured behind the statistics of the uncompressed network, which adaptation changes;
* `adapt, calibrate`: the statistics are adapted to masks and quantized weights, then ranges are measured, and nothing
  corrects for the quantized activations;
* `ours`: ranges are measured behind the statistics that adaptation is about to give, then adaptation sees everything.

Accuracy without any training, and after one epoch of it. The calibration samples are drawn anew each time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.bn_adaptation import NETWORKS
from compress_core import CompressionController, create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.training import accuracy, train

SAMPLES = 512
BATCH = 64
CASES = [(level, bits) for level in (0.8, 0.9) for bits in (8, 4)]
Batches = list[torch.Tensor]


def document(level: float, bits: int, adapted: int) -> dict[str, Any]:
    """Returns the config of a case; `adapted` is the number of samples of the adaptation, 0 for none."""
    initializer = {"batchnorm_adaptation": {"num_bn_adaptation_samples": adapted}}
    sparsity = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": level,
        "initializer": initializer,
        "params": {"sparsity_target": level},
    }
    options = {} if bits == 8 else {"bits": bits}
    quantization = {
        "algorithm": "quantization",
        "initializer": {"range": {"num_init_samples": SAMPLES}, **initializer},
        "weights": {**options, **({"per_channel": True} if options else {})},
        "activations": options,
    }
    return {"compression": [sparsity, quantization], **({} if bits == 8 else {"target_device": "TRIAL"})}


def calibrate_then_adapt(model: nn.Module, level: float, bits: int, data: Batches) -> CompressionController:
    controller, _ = create_compressed_model(model, document(level, bits, 0), init_loader=data)
    controller.adapt_batchnorm(num_samples=SAMPLES)
    return controller


def adapt_then_calibrate(model: nn.Module, level: float, bits: int, data: Batches) -> CompressionController:
    controller, _ = create_compressed_model(model, document(level, bits, 0), init_loader=data)
    controller.disable_activation_quantization()
    controller.adapt_batchnorm(num_samples=SAMPLES)
    controller.enable_activation_quantization()
    controller.init_range()
    return controller


def ours(model: nn.Module, level: float, bits: int, data: Batches) -> CompressionController:
    return create_compressed_model(model, document(level, bits, SAMPLES), init_loader=data)[0]


ORDERS: dict[str, Callable[[nn.Module, float, int, Batches], CompressionController]] = {
    "calibrate, adapt": calibrate_then_adapt,
    "adapt, calibrate": adapt_then_calibrate,
    "ours": ours,
}


def drawn(data: Dataset, draw: int) -> Batches:
    """Returns calibration batches."""
    generator = torch.Generator().manual_seed(100 + draw)
    return list(data.train[0][torch.randperm(len(data.train[0]), generator=generator)[:SAMPLES]].split(BATCH))


def measure(base: nn.Module, data: Dataset, options: argparse.Namespace, flip: bool) -> list[dict[str, Any]]:
    """Returns a row for each case and order."""
    test = (data.test[0][: options.test_images], data.test[1][: options.test_images])
    chosen = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(7))[: options.train_images]
    batches = list(zip(*(part[chosen].split(128) for part in data.train), strict=True))
    rows = []
    for level, bits in CASES:
        for name, order in ORDERS.items():
            before, after = [], []
            for draw in range(options.draws):
                model = copy.deepcopy(base)
                controller = order(model, level, bits, drawn(data, draw))
                before.append(accuracy(model, test))
                torch.manual_seed(draw)  # the same augmentation for all
                train(model, batches, epochs=1, max_lr=0.02, flip=flip, controller=controller)
                after.append(accuracy(model, test))
            rows.append({"sparsity": level, "bits": bits, "order": name, "untrained": before, "trained": after})
    return rows


def shown(net: str, base: float, rows: list[dict[str, Any]]) -> Table:
    """Returns the table of a network: mean over the draws, and their spread in brackets."""

    def cell(values: list[float]) -> str:
        return f"{statistics.fmean(values):.2f} ({max(values) - min(values):.2f})"

    return Table(
        f"{net}, {base:.2f} % before compression: accuracy in %, mean over draws (spread)",
        ("sparsity", "bits", "order", "without training", "after one epoch"),
        [(f"{r['sparsity']:.0%}", r["bits"], r["order"], cell(r["untrained"]), cell(r["trained"])) for r in rows],
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["digits", "fashion-resnet"], choices=list(NETWORKS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--train-images", type=int, default=10000, help="images of the one epoch of training")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for net in options.nets:
        network = NETWORKS[net]
        data, base = DATASETS[network.data](), network.make()
        before = accuracy(base, (data.test[0][: options.test_images], data.test[1][: options.test_images]))
        rows = measure(base, data, options, flip=net != "digits")
        found[net] = {"accuracy": before, "rows": rows}
        report.write("calibration_order", {"options": vars(options), "networks": found})
        report.show(shown(net, before, rows))


if __name__ == "__main__":
    main()
