"""A classification script as users of NNCF have one, with its imports changed and nothing else.

It is written anew, from NNCF's public documentation: config from JSON, data registered with it, a loop that calls the
scheduler, adds the compression loss, saves checkpoints and resumes from them, and at the end an ONNX file.

Usage: python -m examples.nncf_classification [--config FILE] [--epochs 3] [--resume FILE] [--to-onnx FILE]
    [--mode train|accuracy_aware]
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from compress_core.nncf import (
    CompressionStage,
    NNCFConfig,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    load_state,
    register_default_init_args,
)
from examples.common.datasets import digits
from examples.common.training import accuracy, train

CONFIG = Path(__file__).parent / "configs" / "nncf_classification.json"


def validate(model: nn.Module, loader: DataLoader, epoch: int | None = None) -> float:
    """Returns the accuracy in percent."""
    del epoch
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return accuracy(model, (images, labels))


def train_epoch(compression_ctrl: Any, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """Trains one epoch; whoever calls it has called `epoch_step()`."""
    criterion = nn.CrossEntropyLoss()
    loss = torch.zeros(())
    model.train()
    for images, target in loader:
        compression_ctrl.scheduler.step()
        output = model(images)
        loss = criterion(output, target) + compression_ctrl.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def plain_loop(options: argparse.Namespace, nncf_config: NNCFConfig, loaders: tuple[DataLoader, DataLoader]) -> float:
    """Compresses, trains, resumes; returns the accuracy."""
    train_loader, val_loader = loaders
    model = pretrained(train_loader, options)
    compression_state, checkpoint = None, None
    if options.resume:
        checkpoint = torch.load(options.resume, weights_only=True)
        compression_state = checkpoint["compression_state"]
    compression_ctrl, model = create_compressed_model(model, nncf_config, compression_state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    first = 0
    if checkpoint is not None:
        load_state(model, checkpoint["state_dict"], is_resume=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"] + 1
    compression_ctrl.distributed()
    for epoch in range(first, options.epochs):
        compression_ctrl.scheduler.epoch_step()
        train_epoch(compression_ctrl, model, optimizer, train_loader)
        metric = validate(model, val_loader)
        stage = compression_ctrl.compression_stage()
        print(f"epoch {epoch}: accuracy {metric:.1f} %, {CompressionStage(stage).name}")
        state = {
            "epoch": epoch,
            "state_dict": model.state_dict(),
            "compression_state": compression_ctrl.get_compression_state(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, options.output / "last.pth")
    print(compression_ctrl.statistics().to_str())
    if options.to_onnx is not None:
        compression_ctrl.export_model(str(options.to_onnx))
    return validate(model, val_loader)


def accuracy_aware_loop(
    options: argparse.Namespace, nncf_config: NNCFConfig, loaders: tuple[DataLoader, DataLoader]
) -> float:
    """Compresses, and trains until the accuracy holds; returns the accuracy."""
    train_loader, val_loader = loaders
    model = pretrained(train_loader, options)
    uncompressed_accuracy = validate(model, val_loader)
    compression_ctrl, model = create_compressed_model(model, nncf_config)

    def train_epoch_fn(compression_ctrl: Any, model: nn.Module, epoch: int, optimizer: Any, **more: Any) -> float:
        return train_epoch(compression_ctrl, model, optimizer, train_loader)

    def configure_optimizers_fn() -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), None

    loop = create_accuracy_aware_training_loop(nncf_config, compression_ctrl, uncompressed_accuracy)
    model = loop.run(
        model,
        train_epoch_fn=train_epoch_fn,
        validate_fn=lambda model, epoch=None: validate(model, val_loader, epoch),
        configure_optimizers_fn=configure_optimizers_fn,
        log_dir=str(options.output),
    )
    print(loop.statistics.to_str())
    return validate(model, val_loader)


def pretrained(train_loader: DataLoader, options: argparse.Namespace) -> nn.Module:
    """Returns a network that has been trained without compression."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    train(model, train_loader, epochs=options.pretraining, max_lr=0.2)
    return model


def main(arguments: list[str] | None = None) -> float:
    """Runs the script; returns the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--mode", choices=["train", "accuracy_aware"], default="train")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=5)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--to-onnx", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs") / "nncf_classification")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    data = digits()
    loaders = data.loader(train=True, batch_size=64, shuffle=True), data.loader(train=False, batch_size=100)
    nncf_config = register_default_init_args(NNCFConfig.from_json(str(options.config)), loaders[0])
    run = plain_loop if options.mode == "train" else accuracy_aware_loop
    return run(options, nncf_config, loaders)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
