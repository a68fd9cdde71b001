"""The main job on real data: train, compress, adapt, fine-tune, and see what each step was worth.

Usage: python -m examples.demo [--data digits|fashion-mnist] [--runs FOLDER]

A second run loads the network that the first has trained.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core import CompressionConfig, CompressionController, create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import DATASETS, Dataset
from examples.common.networks import demo_network
from examples.common.training import accuracy, train
from examples.demo_pruning import prune
from examples.demo_quantization import export, quantize

CONFIGS = Path(__file__).parent / "configs"
SEED = 0
# Samples of training data, without labels, with which weights are reconstructed.
RECONSTRUCTION = 256
# data set -> (epochs of training, epochs of fine-tuning, mirror images)
RECIPES = {"digits": (20, 10, False), "fashion-mnist": (3, 2, True)}


@dataclass
class Steps:
    """What was done, how long it took, and what the accuracy was after it."""

    test: tuple[torch.Tensor, torch.Tensor]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a step; the accuracy of the model that it leaves in `row["model"]` is measured afterwards."""
        row: dict[str, Any] = {"step": name}
        started = time.perf_counter()
        yield row
        row["seconds"] = time.perf_counter() - started
        model = row.pop("model")
        row["accuracy"] = accuracy(model, self.test)
        row["sparsity"] = 100 * share_of_zeros(model)
        self.rows.append(row)


def share_of_zeros(model: nn.Module) -> float:
    """Returns how much of the weights that the layers compute with is zero; biases and norms aside."""
    weights = [w for m in model.modules() if isinstance(w := getattr(m, "weight", None), torch.Tensor) and w.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def trained_network(data: Dataset, folder: Path, epochs: int, flip: bool) -> tuple[nn.Module, str]:
    """Returns the network of an earlier run, or trains one."""
    model, checkpoint = demo_network(data.name), folder / "fp32.pt"
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval(), "FP32 (trained by an earlier run)"
    train(model, data.loader(train=True, batch_size=128, shuffle=True), epochs=epochs, max_lr=0.2, flip=flip)
    torch.save(model.state_dict(), checkpoint)
    return model, f"FP32, {epochs} epochs of training"


def run(data: Dataset, folder: Path) -> tuple[Steps, CompressionController, list[Table]]:
    """Does everything and returns what was measured: the steps, the sparse network, small and exported networks."""
    epochs, tuning_epochs, flip = RECIPES[data.name]
    config = CompressionConfig.from_json(CONFIGS / f"{data.name}.json").source
    loader = data.loader(train=True, batch_size=64, shuffle=True)
    steps = Steps(data.test)

    with steps.step("") as row:
        row["model"], row["step"] = trained_network(data, folder, epochs, flip)
        fp32 = row["model"]

    unadapted = copy.deepcopy(config)
    del unadapted["compression"]["initializer"]
    with steps.step("compressed, no adaptation") as row:
        _, row["model"] = create_compressed_model(copy.deepcopy(fp32), unadapted)

    for samples in (32, 2048):
        config["compression"]["initializer"]["batchnorm_adaptation"]["num_bn_adaptation_samples"] = samples
        with steps.step("") as row:
            controller, row["model"] = create_compressed_model(copy.deepcopy(fp32), config, init_loader=loader)
            used = controller.statistics().to_dict()["batchnorm_adaptation"]["samples"]
            row["step"] = f"compressed and adapted, {samples} samples" + (
                f" ({used} there are)" if used < samples else ""
            )
    config["compression"]["initializer"]["weight_reconstruction"] = {"num_samples": RECONSTRUCTION}
    with steps.step(f"the same, weights reconstructed with {RECONSTRUCTION} samples") as row:
        controller, row["model"] = create_compressed_model(copy.deepcopy(fp32), config, init_loader=loader)

    torch.manual_seed(SEED)  # the same fine-tuning, whether the network was trained or loaded
    with steps.step(f"fine-tuned, {tuning_epochs} epochs with the schedule") as row:
        tuning = data.loader(train=True, batch_size=128, shuffle=True, seed=1)
        train(controller.model, tuning, epochs=tuning_epochs, max_lr=0.05, flip=flip, controller=controller)
        row["model"] = controller.model

    with steps.step("stripped: a plain model with the zeros in it") as row:
        row["model"] = controller.strip()
        torch.save(row["model"].state_dict(), folder / "stripped.pt")

    del config["compression"]["initializer"]["weight_reconstruction"]
    quantized = quantize(steps.step, fp32, data, config["compression"], flip=flip)
    small = prune(steps.step, fp32, data, flip=flip)
    return steps, controller, [small, export(quantized, fp32, data, folder)]


def save(folder: Path, steps: Steps, controller: CompressionController) -> None:
    """Writes checkpoint, statistics, report and picture."""
    torch.save(
        {"state_dict": controller.model.state_dict(), "compression_state": controller.get_compression_state()},
        folder / "compressed.pt",
    )
    report = {"steps": steps.rows, "statistics": controller.statistics().to_dict()}
    (folder / "statistics.json").write_text(json.dumps(report, indent=2))
    # The rows of the sparse network; those that follow are of others.
    own = itertools.takewhile(lambda row: not row["step"].startswith("stripped"), steps.rows)
    accuracies = {row["step"]: row["accuracy"] for row in own}
    controller.report(folder / "report.html", title=f"The sparse network, {folder.name}", accuracy=accuracies)
    plot(folder / "demo.png", steps, controller)


def plot(path: Path, steps: Steps, controller: CompressionController) -> None:
    """Draws the accuracy after each step, and the sparsity of each layer."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    layers = controller.statistics().to_dict()["magnitude_sparsity"]["layers"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 10), layout="constrained")
    names = [row["step"].split(":")[0].replace(", ", ",\n", 1) for row in steps.rows]
    names = [f"{name}\n({row['sparsity']:.0f} % zeros)" for name, row in zip(names, steps.rows, strict=True)]
    values = [row["accuracy"] for row in steps.rows]
    # By what was done last: trained, damaged, adapted, trained again.
    kinds = {"FP32": "#4c72b0", "no adaptation": "#c44e52", "calibrated": "#dd8452", "adapted": "#dd8452"}
    kinds["reconstructed"] = "#937860"
    colors = [next((color for kind, color in kinds.items() if kind in row["step"]), "#55a868") for row in steps.rows]
    bars = left.barh(names, values, color=colors)
    left.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
    left.invert_yaxis()
    left.set(xlim=(0, 112), xlabel="accuracy on the test set, %", title="After each step")
    bars = right.barh([layer["name"] for layer in layers], [100 * layer["level"] for layer in layers], color="#8172b3")
    right.bar_label(bars, [f"{100 * layer['level']:.0f}" for layer in layers], padding=3)
    right.invert_yaxis()
    right.set(xlim=(0, 112), xlabel="zeros, %", title="Sparsity of each layer")
    figure.suptitle(f"Sparsity, quantization and filter pruning, {path.parent.name}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs the demo and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(RECIPES), default="digits")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where results go")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    torch.manual_seed(SEED)
    folder = options.runs / options.data
    folder.mkdir(parents=True, exist_ok=True)
    steps, controller, tables = run(DATASETS[options.data](), folder)
    save(folder, steps, controller)
    rows = [(row["step"], round(row["sparsity"], 1), row["accuracy"], row["seconds"]) for row in steps.rows]
    print(
        Table(f"{options.data}: what each step is worth", ("step", "zeros, %", "accuracy, %", "seconds"), rows).to_str()
    )
    for table in tables:
        print(f"\n{table.to_str()}")
    print()
    print(controller.statistics().magnitude_sparsity.to_str())
    print(f"\ncheckpoints, statistics and picture: {folder}")
    print(f"a report of the sparse network, for the browser: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
