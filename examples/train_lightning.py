"""Compression in Lightning's Trainer, on real data: sparsity and quantization of a small ResNet.

Usage: python -m examples.train_lightning [--epochs 6] [--devices 1] [--checkpoint FILE] [--resume FILE]

Trains on scikit-learn's digits, compresses to 80 % sparsity and 8 bits, fine-tunes, and prints what each step was
worth. With --resume, fine-tuning goes on from a checkpoint of an earlier run.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from compress_core import create_compressed_model
from compress_core.integrations import read_compression_state
from compress_core.integrations.lightning import CompressionCallback
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy

CONFIG = Path(__file__).parent / "configs" / "sparse_8bit.json"


class Classifier(pl.LightningModule):
    """A network and how it is trained; it knows nothing of compression."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Decay would shrink scales, whatever the loss says.
        named = list(self.network.named_parameters())
        scales = [p for name, p in named if "_transforms." in name]
        weights = [p for name, p in named if "_transforms." not in name]
        return torch.optim.AdamW([{"params": weights}, {"params": scales, "weight_decay": 0.0}], self.rate)


def make_trainer(options: argparse.Namespace, *callbacks: pl.Callback) -> pl.Trainer:
    """The Trainer as without compression."""
    return pl.Trainer(
        max_epochs=options.epochs,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        precision=options.precision,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of training, and of fine-tuning")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--checkpoint", default="lightning_digits", help="file for the last checkpoint, without .ckpt")
    parser.add_argument("--resume", help="checkpoint of an earlier run to go on from")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, rows = digits(), {}
    loader = data.loader(train=True, batch_size=64 // options.devices, shuffle=True)
    torch.manual_seed(0)
    network, state = demo_network("digits"), None

    if options.resume:
        state = read_compression_state(options.resume)  # the structure; the weights come with ckpt_path
    else:
        make_trainer(options).fit(Classifier(network, 1e-2), loader)
        rows["trained"] = accuracy(network, data.test)

    # Before fit: every process does the same, with the same data.
    controller, network = create_compressed_model(
        network, CONFIG, state, init_loader=data.loader(train=True, batch_size=64)
    )
    if not options.resume:
        rows["compressed, adapted"] = accuracy(network, data.test)

    saving = ModelCheckpoint(".", filename=options.checkpoint, enable_version_counter=False)
    trainer = make_trainer(options, CompressionCallback(controller), saving)
    trainer.fit(Classifier(network, 2e-3), loader, ckpt_path=options.resume)
    rows["fine-tuned"] = accuracy(network, data.test)
    if trainer.is_global_zero:
        for name, value in rows.items():
            print(f"{name:20} {value:5.1f} %", flush=True)
        print(f"sparsity {controller.sparsity_level:.1%}, {controller.compression_stage().name}", flush=True)


if __name__ == "__main__":
    main()
