"""Small models and loops for the tests of learned sparsity."""

from __future__ import annotations

import json

import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.transforms import get_weight_transform


def create(model, algorithm, *others, state=None, root=None, **section):
    config = {"compression": [{"algorithm": algorithm, **section}, *others], **(root or {})}
    return create_compressed_model(model, config, compression_state=state)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def batches(count, dtype=torch.float32, features=12):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, features, generator=generator, dtype=dtype) for _ in range(count)]


def steps(controller, model, optimizer, data, epochs, on_step=None):
    """The documented loop; the task is to reproduce sums of the inputs."""
    model.train()
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for x in data:
            controller.scheduler.step()
            optimizer.zero_grad()
            loss = (model(x)[:, 0] - x.sum(1)).square().mean() + controller.loss()
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step()


def transforms(model, key, names=None):
    found = {name: get_weight_transform(model, name, key) for name, _ in model.named_parameters()}
    return {name: transform for name, transform in found.items() if transform is not None}


def through_json(state):
    return json.loads(json.dumps(state))


def same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
