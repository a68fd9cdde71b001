"""Compression in several processes: DistributedDataParallel on real data, started by torchrun.

Usage: torchrun --nproc-per-node 2 -m examples.train_ddp [--epochs 6] [--checkpoint FILE]

Trains the demo's network on scikit-learn's digits, compresses it (80 % sparsity, 8 bits) with each process reading
its own part of the data, fine-tunes it, and prints what each step was worth. CUDA is used if every process has a GPU.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from compress_core import CompressionController, create_compressed_model, register_default_init_args, save_checkpoint
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy

CONFIG = {
    "input_info": {"sample_size": [1, 1, 8, 8]},
    "compression": [
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.8,
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 512}},
        },
        # Activations a little later than weights: quantizers that are still off need nothing from DDP.
        {
            "algorithm": "quantization",
            "initializer": {"range": {"num_init_samples": 256}},
            "params": {"activations_quant_start_epoch": 1},
        },
    ],
}
BATCH = 64


def train(
    model: nn.Module, loader: DataLoader, *, epochs: int, max_lr: float, controller: CompressionController | None = None
) -> None:
    """Trains with SGD; each process sees its part of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, epochs * len(loader))
    device = next(model.parameters()).device
    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        if controller is not None:
            controller.scheduler.epoch_step()
        for inputs, labels in loader:
            if controller is not None:
                controller.scheduler.step()
            loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
            if controller is not None:
                loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    """Runs one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of training, and of fine-tuning")
    parser.add_argument("--checkpoint", help="file for the compressed model after fine-tuning")
    options = parser.parse_args()
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    use_cuda = torch.cuda.device_count() >= world
    if use_cuda:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if use_cuda else torch.device("cpu")
    dist.init_process_group("nccl" if use_cuda else "gloo")
    torch.manual_seed(0)  # all processes start from the same weights
    data = digits()
    test = (data.test[0].to(device), data.test[1].to(device))
    part = TensorDataset(*data.train)
    loader = DataLoader(part, BATCH // world, sampler=DistributedSampler(part, seed=0), drop_last=True)
    model = demo_network("digits").to(device)
    rows = {}

    parallel = DistributedDataParallel(model)
    train(parallel, loader, epochs=options.epochs, max_lr=0.1)
    rows["trained"] = accuracy(model, test)

    # The model itself, not its wrapper; the loader of this process is enough, because processes share their batches.
    config = register_default_init_args(CONFIG, loader)
    controller, model = create_compressed_model(model, config)
    rows["compressed, adapted"] = accuracy(model, test)

    # A new wrapper, because there are new parameters.
    parallel = DistributedDataParallel(model)
    train(parallel, loader, epochs=options.epochs, max_lr=0.02, controller=controller)
    rows["fine-tuned"] = accuracy(model, test)
    if dist.get_rank() == 0:
        for name, value in rows.items():
            print(f"{name:20} {value:5.1f} %", flush=True)
        print(f"sparsity {controller.sparsity_level:.1%}, {controller.compression_stage().name}", flush=True)
        if options.checkpoint:
            save_checkpoint(options.checkpoint, controller)
    del parallel
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
