"""Compression in Hugging Face's Trainer, on real data: sparsity and quantization of a small ResNet.

Usage: python -m examples.train_transformers [--epochs 6] [--output FOLDER]
Several processes: torchrun --nproc-per-node 2 -m examples.train_transformers

Trains on scikit-learn's digits, compresses to 80 % sparsity and 8 bits, fine-tunes, and saves a plain model that
`from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from compress_core import create_compressed_model, register_default_init_args
from compress_core.integrations.transformers import CompressionCallback
from examples.common.datasets import digits

CONFIG = Path(__file__).parent / "configs" / "sparse_8bit.json"


class Digits(Dataset):
    """Images as dicts, which is what the Trainer and Hugging Face's models want."""

    def __init__(self, part: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.images, self.labels = part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make_model() -> ResNetForImageClassification:
    """A ResNet for images of 8x8 pixels."""
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
        )
    )


def make_trainer(model: nn.Module, output: Path, epochs: int, rate: float, bf16: bool = False) -> Trainer:
    """The Trainer as without compression."""
    args = TrainingArguments(
        str(output),
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        gradient_accumulation_steps=2,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = digits()
    return Trainer(
        model=model,
        args=args,
        train_dataset=Digits(data.train),
        eval_dataset=Digits(data.test),
        compute_metrics=accuracy,
    )


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of images classified correctly, in percent."""
    return {"accuracy": 100 * float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of training, and of fine-tuning")
    parser.add_argument("--output", type=Path, help="folder for checkpoints and the compressed model")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp())
    rows = {}

    trainer = make_trainer(make_model(), output / "trained", options.epochs, 5e-3)
    trainer.train()
    rows["trained"] = trainer.evaluate()["eval_accuracy"]

    # Batches with labels are fine: what only the loss computes is no part of the network that is compressed.
    config = register_default_init_args(CONFIG, trainer.get_train_dataloader())
    controller, model = create_compressed_model(trainer.model, config)
    trainer = CompressionCallback(controller).attach(
        make_trainer(model, output / "tuned", options.epochs, 5e-3, options.bf16)
    )
    rows["compressed, adapted"] = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    rows["fine-tuned"] = trainer.evaluate()["eval_accuracy"]

    if trainer.is_world_process_zero():
        for name, value in rows.items():
            print(f"{name:20} {value:5.1f} %", flush=True)
        print(f"sparsity {controller.sparsity_level:.1%}, {controller.compression_stage().name}", flush=True)
        controller.strip().save_pretrained(output / "plain")
        print(f"plain model in {output / 'plain'}")


if __name__ == "__main__":
    main()
