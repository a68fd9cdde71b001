"""What the tests of importances share."""

import itertools

import torch
from torch import nn

from compress_core import (
    create_compressed_model,
)
from compress_core.transforms import get_weight_transform

POINT = "magnitude_sparsity.weight_importance"
DATA_KINDS = ("activation", "second_order", "reconstruction")


def batches(features=12, count=4, size=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, features, generator=generator)
    x = (x + 0.9 * x.roll(1, 1)) * torch.linspace(0.2, 3.0, features)
    return list(x.split(size))


def net(*sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


def document(level=0.5, kind="activation", mode="global", initializer=None, **params):
    section = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": level,
        "params": {"weight_importance": kind, "sparsity_level_setting_mode": mode, "sparsity_target": 0.9, **params},
        "initializer": initializer or {},
    }
    return {"compression": section}


def create(model, *, data=None, **options):
    return create_compressed_model(model, document(**options), init_loader=batches() if data is None else data)[0]


def masks(model, controller):
    names = controller.sparsified_module_info
    return {n: get_weight_transform(model, n, "magnitude_sparsity").mask.clone() for n in names}


def zeros(found):
    return sum(int((~mask).sum()) for mask in found.values())


def size(found):
    return sum(mask.numel() for mask in found.values())


def inputs(data, count=256):
    return torch.cat(data)[:count].double()


def run_epochs(controller, model, data, epochs, seen):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for batch in data[:2]:
            controller.scheduler.step()
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        seen.append(masks(model, controller))
