"""The demo's third part: half of the filters go, first under masks, in the end physically."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import Dataset
from examples.common.training import train

Step = Callable[[str], Any]
# Epochs of fine-tuning by data set.
EPOCHS = {"digits": 10, "fashion-mnist": 2}


def prune(step: Step, fp32: nn.Module, data: Dataset, *, flip: bool) -> Table:
    """Prunes a trained network by half of its filters, repairs and trains it, and makes it smaller.

    Args:
        step: Opens a row of the demo's table.
        fp32: The trained network; it stays as it is.
        data: The data.
        flip: Whether training mirrors images.

    Returns:
        A table: what the network costs, before and after.
    """
    loader = data.loader(train=True, batch_size=64, shuffle=True)
    section: dict[str, Any] = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"schedule": "baseline", "prune_first_conv": True, "prune_downsample_convs": True},
    }
    document: dict[str, Any] = {"input_info": {"sample_size": [1, *data.train[0].shape[1:]]}, "compression": section}
    with step("half of the filters, no adaptation") as row:
        _, row["model"] = create_compressed_model(copy.deepcopy(fp32), document)
    section["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 2048}}
    with step("half of the filters, adapted") as row:
        _, row["model"] = create_compressed_model(copy.deepcopy(fp32), document, init_loader=loader)
    section["initializer"]["weight_reconstruction"] = {"num_samples": 256}
    with step("half of the filters, weights reconstructed") as row:
        controller, row["model"] = create_compressed_model(copy.deepcopy(fp32), document, init_loader=loader)
    torch.manual_seed(1)
    epochs = EPOCHS[data.name]
    with step(f"half of the filters, fine-tuned, {epochs} epochs") as row:
        tuning = data.loader(train=True, batch_size=128, shuffle=True, seed=1)
        train(controller.model, tuning, epochs=epochs, max_lr=0.05, flip=flip, controller=controller)
        row["model"] = controller.model
    with step("half of the filters, stripped: smaller tensors") as row:
        row["model"] = controller.strip()
    controller.measure_latency()
    figures = controller.statistics().filter_pruning
    costs = figures.tables()[0]
    return Table("half of the filters: what is left", costs.headers, costs.rows)
