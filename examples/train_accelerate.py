"""Compression in a loop with accelerate, on real data: sparsity and quantization of a small ResNet.

Usage: python -m examples.train_accelerate [--epochs 6] [--save FOLDER] [--resume FOLDER]
Several processes: accelerate launch --cpu --num_processes 2 -m examples.train_accelerate

Trains on scikit-learn's digits, compresses to 80 % sparsity and 8 bits, fine-tunes, and prints what each step was
worth. With --resume, fine-tuning goes on from a folder that an earlier run has saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from compress_core import create_compressed_model, register_default_init_args
from compress_core.integrations import read_compression_state
from compress_core.integrations.accelerate import CompressionCallback
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy
from examples.common.training import train as train_without_accelerate

CONFIG = Path(__file__).parent / "configs" / "sparse_8bit.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of training, and of fine-tuning")
    parser.add_argument("--mixed-precision", default="no", help="such as bf16")
    parser.add_argument("--save", help="folder for the state after each epoch")
    parser.add_argument("--resume", help="folder of an earlier run to go on from")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=options.mixed_precision, gradient_accumulation_steps=2
    )
    data, rows = digits(), {}
    torch.manual_seed(0)  # all processes start from the same weights
    network, state = demo_network("digits").to(accelerator.device), None
    if options.resume:
        state = read_compression_state(options.resume)  # the structure; load_state brings the weights
    else:
        train_without_accelerate(network, data.loader(train=True, batch_size=64), epochs=options.epochs, max_lr=0.1)
        rows["trained"] = accuracy(network, data.test)

    config = register_default_init_args(CONFIG, data.loader(train=True, batch_size=64))
    controller, network = create_compressed_model(network, config, state)
    compression = CompressionCallback(controller, accelerator)
    if not options.resume:
        rows["compressed, adapted"] = accuracy(network, data.test)

    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True)
    loader = data.loader(train=True, batch_size=32 // accelerator.num_processes, shuffle=True)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    if options.resume:
        accelerator.load_state(options.resume)
    for epoch in range(controller.scheduler.current_epoch + 1, options.epochs):
        compression.epoch_step(epoch)
        model.train()
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                compression.step()
                loss = F.cross_entropy(model(inputs), labels) + controller.loss()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if options.save:
            accelerator.save_state(options.save)
    compression.end()
    rows["fine-tuned"] = accuracy(network, data.test)
    for name, value in rows.items():
        accelerator.print(f"{name:20} {value:5.1f} %", flush=True)
    accelerator.print(f"sparsity {controller.sparsity_level:.1%}, {controller.compression_stage().name}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
