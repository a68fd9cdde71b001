"""What learned masks are worth: the same training at a high level with magnitude, rb and movement sparsity.

A network is trained on digits, then fine-tuned for the same number of epochs with each algorithm, with Adam. The scores
of learned masks have a learning rate of their own, and no weight decay, as their authors advise. Prints the accuracy on
the test images, and the level that is really there.

Usage: python -m benchmarks.learned_sparsity [--level 0.95] [--epochs 12] [--seeds 3]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from compress_core import CompressionController, create_compressed_model
from examples.common.datasets import Dataset, digits
from examples.common.networks import demo_network
from examples.common.training import accuracy, train


def perceptron() -> nn.Module:
    """Three linear layers: what movement sparsity, which is for linear layers, has most of."""
    layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet": lambda: demo_network("digits"), "MLP": perceptron}
SCORE_RATE = {"rb_sparsity": 0.1, "movement_sparsity": 0.01}


def sections(level: float, epochs: int) -> dict[str, dict[str, Any]]:
    """Returns the section of each algorithm: the level is asked for after two thirds of the epochs."""
    ramp = 2 * epochs // 3
    scheduled = {"schedule": "polynomial", "sparsity_target": level, "sparsity_target_epoch": ramp}
    return {
        "magnitude_sparsity": {"algorithm": "magnitude_sparsity", "params": scheduled},
        "rb_sparsity": {"algorithm": "rb_sparsity", "params": scheduled | {"sparsity_freeze_epoch": epochs - 2}},
    }


def fine_tuned(
    model: nn.Module, data: Dataset, section: dict[str, Any], epochs: int, seed: int
) -> tuple[CompressionController, nn.Module]:
    """Returns the model after `epochs` of training with an algorithm."""
    torch.manual_seed(seed)
    controller, model = create_compressed_model(model, {"compression": section})
    scores = [p for name, p in model.named_parameters() if name.endswith(".scores")]
    weights = [p for name, p in model.named_parameters() if not name.endswith(".scores")]
    groups = [{"params": weights, "lr": 2e-3}]
    if scores:
        groups.append({"params": scores, "lr": SCORE_RATE[section["algorithm"]]})
    optimizer = torch.optim.Adam(groups)
    loader = data.loader(train=True, batch_size=64, shuffle=True, seed=seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for inputs, labels in loader:
            controller.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + controller.loss()).backward()
            optimizer.step()
            decay.step()
    return controller, model.eval()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = digits(), []
    for network, make in NETWORKS.items():
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            start = make()
            train(start, data.loader(train=True, batch_size=128, shuffle=True), epochs=15, max_lr=0.2)
            rows.append([network, seed, "uncompressed", 0.0, accuracy(start, data.test)])
            for name, section in sections(options.level, options.epochs).items():
                controller, model = fine_tuned(copy.deepcopy(start), data, section, options.epochs, seed)
                rows.append([network, seed, name, controller.compression_rate, accuracy(model, data.test)])
    print(tabulate(rows, ["network", "seed", "algorithm", "level", "accuracy, %"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
