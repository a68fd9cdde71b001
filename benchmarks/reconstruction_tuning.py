"""Fine-tuning with and without weight reconstruction: the public ResNet-56 on CIFAR-10 with fewer operations.

Usage: python -m benchmarks.reconstruction_tuning [--ratios 2.1 2.6] [--epochs 1 5 10] [--variants adaptation chosen]

Accuracy on the 10,000 test images after so many epochs over all 50,000 training images, each number of epochs with a
learning rate of its own that rises and falls once. The network is shrunk before, so it trains as the small one that it
is. `adaptation` is filter pruning with its defaults and batch-norm adaptation, `both` also reconstructs weights, and in
`chosen` data chooses the filters as well. A run that was stopped goes on at its last epoch. Published results at
2.1 times fewer operations, 93.5 to 93.8 %, come from hundreds of epochs. Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from benchmarks.reconstruction import samples_of
from benchmarks.reconstruction_cases import CASES, VARIANTS, trained
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.fetch import cache_folder
from examples.common.training import accuracy, augmented

BATCH, SAMPLES = 128, 256
NAME = "reconstruction_tuning"


class Training:
    """A fine-tuning run that can go on after an interruption.

    Args:
        model: The network.
        data: The data set.
        epochs: Number of epochs.
        max_lr: The largest learning rate.
        checkpoint: File that keeps the state after each epoch.
    """

    def __init__(self, model: nn.Module, data: Dataset, epochs: int, max_lr: float, checkpoint: Path) -> None:
        # On CPUs, layers as narrow as these train faster with channels last.
        self.model = model.to(memory_format=torch.channels_last)
        self.data, self.epochs, self.checkpoint = data, epochs, checkpoint
        self.optimizer = torch.optim.SGD(model.parameters(), max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = epochs * math.ceil(len(data.train[1]) / BATCH)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr, steps)
        self.done, self.seconds = 0, 0.0
        torch.manual_seed(0)
        if checkpoint.exists():
            self._load()

    def run(self) -> None:
        """Trains to the end."""
        self.model.train()
        while self.done < self.epochs:
            start = time.perf_counter()
            self._epoch()
            self.done += 1
            self.seconds += time.perf_counter() - start
            self._save()
            print(f"{self.checkpoint.stem}: {self.done} of {self.epochs} epochs, {self.seconds:.0f} s", flush=True)
        self.model.eval()

    def _epoch(self) -> None:
        images, labels = self.data.train
        for chosen in torch.randperm(len(labels)).split(BATCH):
            batch = augmented(images[chosen], flip=True).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.model(batch), labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    def _save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"schedule": self.schedule.state_dict(), "rng": torch.get_rng_state()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "done": self.done, "seconds": self.seconds}, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        self.done, self.seconds = state["done"], state["seconds"]


def measure(ratio: float, variant: str, epochs: int, options: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Returns one row."""
    document = CASES[f"{ratio}x fewer operations"].document(variant, SAMPLES, [3, 32, 32])
    controller, model = create_compressed_model(
        copy.deepcopy(trained("resnet56")), document, init_loader=samples_of(data, SAMPLES, 0)
    )
    row = {"ratio": ratio, "variant": variant, "epochs": epochs, "before": accuracy(model, data.test)}
    controller.shrink()
    figures = controller.statistics().filter_pruning
    row["operations"] = figures.full_flops / figures.current_flops
    checkpoint = cache_folder() / NAME / f"{ratio}x-{variant}-{epochs}-{options.max_lr}.pt"
    training = Training(model, data, epochs, options.max_lr, checkpoint)
    training.run()
    return {**row, "accuracy": accuracy(model, data.test), "seconds": training.seconds, "max_lr": options.max_lr}


def table(content: dict[str, Any]) -> Table:
    """One row for each ratio and variant."""
    epochs = sorted({row["epochs"] for row in content["rows"]})
    rows = []
    for ratio, variant in dict.fromkeys((row["ratio"], row["variant"]) for row in content["rows"]):
        found = {row["epochs"]: row for row in content["rows"] if (row["ratio"], row["variant"]) == (ratio, variant)}
        first = next(iter(found.values()))
        cells = [f"{found[number]['accuracy']:.2f}" if number in found else "" for number in epochs]
        rows.append((f"{first['operations']:.2f}x", variant, f"{first['before']:.2f}", *cells))
    headers = ("fewer operations", "variant", "before", *(f"{number} epochs" for number in epochs))
    return Table(f"ResNet-56 on CIFAR-10, accuracy in %, FP32 {content['fp32']:.2f}", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/reconstruction_tuning.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.1, 2.6], choices=[1.5, 2.1, 2.6])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--variants", nargs="+", default=["adaptation", "chosen"], choices=VARIANTS)
    parser.add_argument("--max-lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = DATASETS["cifar10"]()
    path = report.RESULTS / f"{NAME}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    content.pop("machine", None)
    content["fp32"] = content.get("fp32") or accuracy(trained("resnet56"), data.test)
    for epochs in options.epochs:
        for ratio in options.ratios:
            for variant in options.variants:
                key = {"ratio": ratio, "variant": variant, "epochs": epochs, "max_lr": options.max_lr}
                if any(all(row[name] == value for name, value in key.items()) for row in content["rows"]):
                    continue
                content["rows"].append(measure(ratio, variant, epochs, options, data))
                report.write(NAME, content)
                print(content["rows"][-1], flush=True)
    report.show(table(content))


if __name__ == "__main__":
    main()
