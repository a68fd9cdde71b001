"""What the tests of batch-norm adaptation share."""

import copy

import torch
from torch import nn


def config(samples=32, method="paired", level=0.7, **adaptation):
    section = {"num_bn_adaptation_samples": samples, "method": method, **adaptation}
    return {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": level,
            "params": {"sparsity_target": max(level, 0.5)},
            "initializer": {"batchnorm_adaptation": section},
        }
    }


def data(n=32, batch=8, seed=5, scale=1.0, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(n, 3, 8, 8, generator=generator) * scale + shift).split(batch))


class OneNorm(nn.Module):
    """One batch norm: what it sees does not depend on any other."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = norm or nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def population_moments(model, batches):
    """Independent: float64 convolution of everything at once, numpy's moments."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        seen = twin.conv(torch.cat(batches).double()).numpy()
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3))


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def changed_tensors(before, after):
    changed = []
    for name, record in before["modules"].items():
        for kind in ("parameters", "buffers"):
            for key, value in record[kind].items():
                if after["modules"][name][kind][key] != value:
                    changed.append(f"{name}.{key}")
    return changed
