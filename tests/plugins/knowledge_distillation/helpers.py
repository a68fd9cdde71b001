"""What the tests of knowledge distillation share."""

from __future__ import annotations

import torch
from torch import nn

from compress_core import CompressionConfig, TeacherArgs, create_compressed_model


class Blocks(nn.Module):
    """Two blocks with batch norm, dropout and in-place activations, and a head."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.block2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.dropout(self.block2(self.block1(x)).mean((2, 3))))


def make(seed: int = 0, **options) -> Blocks:
    torch.manual_seed(seed)
    return Blocks(**options)


def images(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def section(**values):
    return {"algorithm": "knowledge_distillation", **values}


def create(model, *others, teacher=None, copy=True, state=None, uncompressed_model=None, **values):
    """Creates a model that learns from a teacher, by default from itself."""
    config = CompressionConfig.from_dict({"compression": [*others, section(**values)]})
    if teacher is not None:
        config.register_extra_structs([TeacherArgs(teacher, copy)])
    return create_compressed_model(model, config, state, uncompressed_model=uncompressed_model)


class Returning(nn.Module):
    """A model that returns what a function makes of the outputs of its layer."""

    def __init__(self, shape, function=lambda y: y, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        size = int(torch.tensor(shape).prod())
        self.fc, self.shape, self.function = nn.Linear(3, size).double(), shape, function

    def forward(self, x):
        return self.function(self.fc(x).reshape(-1, *self.shape))
