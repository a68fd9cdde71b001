"""Small models of every kind that the tests hold the promises against."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn


class ResidualNet(nn.Module):
    """ResNet-like: residual adds, a layer that is called twice, in-place ReLU."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for _ in range(2):  # the same layers twice
            x = x + self.bn2(self.conv2(x))
        return self.fc(self.relu(x).mean((2, 3)))


class MobileNet(nn.Module):
    """MobileNet-like: depthwise and pointwise convolutions, ReLU6, dropout, a subclass of a torch layer."""

    class MyConv(nn.Conv2d):
        pass

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            self.MyConv(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8, momentum=0.2),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.Hardswish(),
            nn.Conv2d(8, 12, 1),
            nn.BatchNorm2d(12),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Transformer(nn.Module):
    """Transformer-like: embedding tied to the output layer, attention, layer norm."""

    def __init__(self, vocabulary: int = 20, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)))


class Recurrent(nn.Module):
    """Recurrent: cells in a loop, which compile."""

    def __init__(self, vocabulary: int = 20, width: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cell = nn.GRUCell(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens):
        state = torch.zeros(tokens.shape[0], self.cell.hidden_size)
        for step in self.embedding(tokens).unbind(1):
            state = self.cell(step, state)
        return self.head(self.norm(state))


class StackedLSTM(nn.Module):
    """Recurrent: a stacked, bidirectional LSTM, whose kernel takes a flat list of weights."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def images(n: int = 4, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def tokens(n: int = 4, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 20, (n, length), generator=torch.Generator().manual_seed(1))


ZOO = {
    "resnet": (ResidualNet, lambda: (images(),)),
    "mobilenet": (MobileNet, lambda: (images(),)),
    "transformer": (Transformer, lambda: (tokens(),)),
    "recurrent": (Recurrent, lambda: (tokens(),)),
    "lstm": (StackedLSTM, lambda: (images(4, 1, 6)[:, 0],)),
}


def trained(model: nn.Module, inputs: tuple, steps: int = 3) -> nn.Module:
    """A few training steps, so that weights and running statistics are not the initial ones."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        noise = [x + 0.1 * step if x.is_floating_point() else x for x in inputs]
        optimizer.zero_grad()
        model(*noise).square().mean().backward()
        optimizer.step()
    return model


@functools.lru_cache
def _trained_once(name: str) -> nn.Module:
    make, make_inputs = ZOO[name]
    torch.manual_seed(0)
    return trained(make(), make_inputs())


def trained_model(name: str) -> nn.Module:
    """A model of the zoo after a few training steps; a new one, but always with the same weights."""
    return copy.deepcopy(_trained_once(name))
