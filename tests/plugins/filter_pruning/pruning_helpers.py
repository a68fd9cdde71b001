"""Small networks, and configs for them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from compress_core import create_compressed_model


class Chain(nn.Module):
    """Three convolutions, batch norm, a linear layer behind a flattened map."""

    def __init__(self, widths=(8, 12, 8)):
        super().__init__()
        first, second, third = widths
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, stride=2, padding=1)
        self.linear = nn.Linear(third * 16, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.sigmoid(self.bn2(self.conv2(x)))  # not zero where its input is
        return self.linear(torch.relu(self.conv3(x)).flatten(1))


def inputs(n=4, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def seen(model, x=None):
    """A model whose running statistics are not the initial ones."""
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(inputs(seed=seed) + 0.3 if x is None else x)
    return model


def config(level=0.5, *, sections=(), **params):
    section = {"algorithm": "filter_pruning", "pruning_init": level}
    settings = {"prune_first_conv": True, "prune_downsample_convs": True, "multiple_of": 1} | params
    section["params"] = {key: value for key, value in settings.items() if value is not None}
    return {
        "input_info": {"sample_size": [4, 3, 8, 8]},
        "compression": [section, *sections] if sections else section,
    }


def pruned(model=None, level=0.5, **params):
    model = seen(Chain()) if model is None else model
    return create_compressed_model(model, config(level, **params))


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def evaluated(model, x=None):
    model.eval()
    with torch.no_grad():
        return model(inputs() if x is None else x)


def gone(controller):
    """Group -> channels that are masked, read from the masks of the weight that makes them."""
    found = {}
    for number, layers in controller.pruned_module_groups.items():
        layer = controller.model.get_submodule(layers[0])
        dims = list(range(1, layer.weight.ndim))
        found[number] = (layer.weight.detach().abs().sum(dims) == 0).nonzero().flatten().tolist()
    return found


def twin(model):
    return copy.deepcopy(model)
