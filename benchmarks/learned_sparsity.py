"""What learned masks are worth: the same training at a high level with magnitude, rb and movement sparsity.

A network is trained on digits, then fine-tuned for the same number of epochs with each algorithm, with Adam. The scores
of learned masks have a learning rate of their own, and no weight decay, as their authors advise. Prints the accuracy on
the test images, and the level that is really there.

Usage: python -m benchmarks.learned_sparsity [--level 0.95] [--epochs 20] [--seeds 3]
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
from examples.common.training import accuracy


def perceptron() -> nn.Module:
    """Three linear layers: what movement sparsity, which is for linear layers, has most of."""
    layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet": lambda: demo_network("digits"), "MLP": perceptron}
SCORE_RATE = {"rb_sparsity": 0.1, "movement_sparsity": 0.01}
# Factor of the loss of movement sparsity with which the perceptron ends near 95 %; it has no target level.
FACTOR = 80.0
# The loss of rb sparsity asks for a little more than what is wanted, because the task pulls against it.
MARGIN = 0.02


def sections(level: float, epochs: int, factor: float) -> dict[str, dict[str, Any]]:
    """Returns the section of each algorithm: the level is asked for after two thirds of the epochs."""
    ramp = 2 * epochs // 3
    scheduled = {"schedule": "polynomial", "sparsity_target": level, "sparsity_target_epoch": ramp}
    gates = scheduled | {"sparsity_target": level + MARGIN, "sparsity_freeze_epoch": epochs - 2}
    warmup = {"warmup_start_epoch": 1, "warmup_end_epoch": epochs - 2, "importance_regularization_factor": factor}
    return {
        "magnitude_sparsity": {"algorithm": "magnitude_sparsity", "params": scheduled},
        "rb_sparsity": {"algorithm": "rb_sparsity", "params": gates},
        "movement_sparsity": {
            "algorithm": "movement_sparsity",
            "params": warmup | {"enable_structured_masking": False},
        },
    }


def fitted(
    model: nn.Module, data: Dataset, epochs: int, seed: int, section: dict[str, Any] | None = None
) -> CompressionController | None:
    """Trains a model for some epochs, with an algorithm if there is a section; returns its controller."""
    torch.manual_seed(seed)
    controller = None
    if section is not None:
        controller, model = create_compressed_model(model, {"compression": section})
    scores = [p for name, p in model.named_parameters() if name.endswith(".scores")]
    weights = [p for name, p in model.named_parameters() if not name.endswith(".scores")]
    loader = data.loader(train=True, batch_size=64, shuffle=True, seed=seed)
    optimizers = [torch.optim.Adam(weights, 2e-3)]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], epochs * len(loader))
    if section is not None and scores:
        optimizers.append(torch.optim.Adam(scores, SCORE_RATE[section["algorithm"]]))
    model.train()
    for _ in range(epochs):
        if controller is not None:
            controller.scheduler.epoch_step()
        for inputs, labels in loader:
            if controller is not None:
                controller.scheduler.step()
            model.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            (loss if controller is None else loss + controller.loss()).backward()
            for optimizer in optimizers:
                optimizer.step()
            decay.step()
    model.eval()
    return controller


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--factor", type=float, default=FACTOR, help="of the loss of movement sparsity")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = digits(), []
    for network, make in NETWORKS.items():
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            start = make()
            fitted(start, data, 15, seed)
            rows.append([network, seed, "uncompressed", 0.0, accuracy(start, data.test)])
            for name, section in sections(options.level, options.epochs, options.factor).items():
                if name == "movement_sparsity" and network != "MLP":
                    continue  # it has a single linear layer
                model = copy.deepcopy(start)
                controller = fitted(model, data, options.epochs, seed, section)
                assert controller is not None
                rows.append([network, seed, name, controller.compression_rate, accuracy(model, data.test)])
    print(tabulate(rows, ["network", "seed", "algorithm", "level", "accuracy, %"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
