"""What distillation adds to the fine-tuning of a sparse network: the same runs with and without, on the digits.

Usage: python -m benchmarks.distillation [--seeds 5]

A network is trained on all training images. Then it is made 95 % sparse and fine-tuned, on all images or on 100 of
them, and distilled or not; everything else is the same. Accuracy on the test images, mean and range over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import Dataset, digits
from examples.common.networks import demo_network
from examples.common.training import accuracy, train

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]

SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.95,
    "params": {"sparsity_target": 0.95},
}
EPOCHS, FEW, LR = 40, 100, 0.05
LOSSES: dict[str, dict[str, Any]] = {
    "mse": {"type": "mse"},
    "softmax, T = 4": {"type": "softmax", "temperature": 4.0},
    "cosine": {"type": "cosine", "scale": 10.0},
    "softmax and attention": {
        "type": "softmax",
        "temperature": 4.0,
        "features": [{"student": "layer?", "type": "attention", "scale": 10.0}],
    },
}


def few_labels(data: Dataset, count: int = FEW, batch_size: int = 50) -> Batches:
    """Returns batches of the first training images."""
    inputs, labels = (part[:count] for part in data.train)
    return list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))


def student_after(
    model: nn.Module,
    batches: Batches,
    test: tuple[torch.Tensor, torch.Tensor],
    distill: dict[str, Any] | bool,
    seed: int,
    epochs: int = EPOCHS,
) -> float:
    """Returns the accuracy of a sparse network after fine-tuning.

    Args:
        model: The trained network.
        batches: What it is fine-tuned on.
        test: What it is tested on.
        distill: The settings of the distillation; False for none, True for softmax.
        seed: Of the order of batches, and of the shifts of the images.
        epochs: How often all batches are seen.
    """
    values = LOSSES["softmax, T = 4"] if distill is True else distill
    sections = [SPARSITY, *([{"algorithm": "knowledge_distillation", **values}] if values else [])]
    controller, model = create_compressed_model(model.train(), {"compression": sections})
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for index in torch.randperm(len(batches), generator=generator).tolist():
            inputs, labels = batches[index]
            controller.scheduler.step()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels) + controller.loss()
            loss.backward()
            optimizer.step()
            rate.step()
    return accuracy(model, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    data = digits()
    torch.manual_seed(0)
    teacher = demo_network("digits")
    train(teacher, data.loader(train=True, batch_size=128, shuffle=True), epochs=15, max_lr=0.2)
    print(f"teacher: {accuracy(teacher, data.test):.1f} %")
    rows = []
    for what, batches, epochs in (
        (f"{FEW} images", few_labels(data), EPOCHS),
        (f"{len(data.train[0])} images", few_labels(data, len(data.train[0]), 128), 5),
    ):
        for name, values in {"labels alone": False, **LOSSES}.items():
            found = [student_after(copy.deepcopy(teacher), batches, data.test, values, seed, epochs) for seed in seeds]
            rows.append((what, name, statistics.fmean(found), min(found), max(found)))
    headers = ("fine-tuned on", "loss besides the labels", "accuracy %", "lowest", "highest")
    print(Table("Sparsity of 95 %, digits", headers, rows).to_str())


if __name__ == "__main__":
    main()
