"""Prunes, sparsifies and quantizes a small network at once, fine-tunes it, and writes the report of docs/report.md.

Usage: python -m examples.report [--data digits|fashion-mnist] [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from compress_core import create_compressed_model
from examples.common.datasets import DATASETS
from examples.common.networks import ResNet
from examples.common.training import accuracy, train

SECTIONS = [
    {
        "algorithm": "filter_pruning",
        "pruning_init": 0.3,
        "params": {"pruning_target": 0.3, "multiple_of": 2, "prune_downsample_convs": True},
    },
    {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.3,
        "params": {"schedule": "polynomial", "sparsity_target": 0.6, "sparsity_target_epoch": 4},
        "ignored_scopes": ["conv1", "linear"],
    },
    {
        "algorithm": "quantization",
        "initializer": {
            "range": {"num_init_samples": 256},
            "precision": {"type": "sensitivity", "bits": [2, 4, 8], "budget": {"average_bits": 5}},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 512},
            "weight_reconstruction": {"num_samples": 256},
        },
    },
]


def main() -> None:
    """Trains, compresses, fine-tunes, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATASETS), default="digits")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the report goes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.manual_seed(0)
    data = DATASETS[options.data]()
    model = ResNet(1, (16, 32), blocks=2)
    train(model, data.loader(train=True, batch_size=64, shuffle=True), epochs=6, max_lr=0.2)
    steps = {"float": accuracy(model, data.test)}

    config = {
        "input_info": {"sample_size": [1, *data.train[0].shape[1:]]},
        "target_device": "TRIAL",
        "compression": SECTIONS,
    }
    loader = data.loader(train=True, batch_size=64, shuffle=True)
    controller, model = create_compressed_model(model, config, init_loader=loader)
    steps["compressed, not trained"] = accuracy(model, data.test)
    tuning = data.loader(train=True, batch_size=64, shuffle=True, seed=1)
    train(model, tuning, epochs=5, max_lr=0.05, controller=controller)
    steps["fine-tuned"] = accuracy(model, data.test)

    folder = options.runs / options.data
    folder.mkdir(parents=True, exist_ok=True)
    controller.report(folder / "all-at-once.html", title=f"ResNet, {options.data}", accuracy=steps)
    print(", ".join(f"{name}: {value:.1f} %" for name, value in steps.items()))
    print(f"the report: {folder / 'all-at-once.html'}")


if __name__ == "__main__":
    main()
