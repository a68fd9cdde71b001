"""Random networks from a grammar, random channels of each group: what is left agrees with the masked network, always."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.channel_helpers import check_shrinking, groups_of

NETWORKS = 60
IMAGE = (2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, x):
        return self.outer(x) + self.inner(x)


class Concatenated(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gated(nn.Module):
    """Splits channels in halves and multiplies them."""

    def __init__(self, by_size):
        super().__init__()
        self.by_size = by_size

    def forward(self, x):
        a, b = x.split(x.shape[1] // 2, 1) if self.by_size else x.chunk(2, 1)
        return a * b.sigmoid()


class Squeeze(nn.Module):
    def __init__(self, channels, inside):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Shuffle(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).flatten(1, 2)


class Attention(nn.Module):
    """Over the pixels, as channels last."""

    def __init__(self, channels, heads, *, size_in_code):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        self.shape = (-1, channels // heads) if size_in_code else (heads, -1)

    def forward(self, x):
        sequence = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(sequence).unflatten(2, self.shape).transpose(1, 2) for layer in self.qkv)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class Grammar:
    """Draws networks: a block takes (batch, channels, height, width) and says how many channels it returns."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def network(self):
        channels = self.width()
        layers = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        for _ in range(self.draw.randint(2, 4)):
            block, channels = self.block(channels, depth=1)
            layers.append(block)
        return nn.Sequential(*layers, *self.head(channels))

    def width(self):
        return self.draw.choice([4, 6, 8, 12])

    def block(self, channels, depth):
        names = ["conv", "depthwise", "grouped", "norm", "activation", "squeeze", "shuffle", "pixels", "attention"]
        names += ["residual", "concatenation", "gate"] * (2 if depth > 0 else 0)
        return getattr(self, self.draw.choice(names))(channels, depth - 1)

    def chain(self, channels, depth):
        first, inside = self.block(channels, depth)
        second, outside = self.block(inside, depth)
        return nn.Sequential(first, second), outside

    def conv(self, channels, _):
        width, size = self.width(), self.draw.choice([1, 3])
        return nn.Conv2d(channels, width, size, padding=size // 2, bias=self.draw.random() < 0.5), width

    def depthwise(self, channels, _):
        multiplier = self.draw.choice([1, 1, 2])
        return nn.Conv2d(channels, channels * multiplier, 3, padding=1, groups=channels), channels * multiplier

    def grouped(self, channels, _):
        width = self.width()
        groups = self.draw.choice([g for g in (2, 3, 4) if channels % g == width % g == 0] or [1])
        return nn.Conv2d(channels, width, 3, padding=1, groups=groups), width

    def norm(self, channels, _):
        kinds = [nn.BatchNorm2d(channels), nn.InstanceNorm2d(channels, affine=True), nn.GroupNorm(2, channels)]
        return self.draw.choices(kinds, [6, 1, 1])[0], channels

    def activation(self, channels, _):
        kinds = [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.PReLU(channels), nn.Dropout(0.3), nn.LeakyReLU(inplace=False)]
        return self.draw.choice(kinds), channels

    def squeeze(self, channels, _):
        return Squeeze(channels, self.width()), channels

    def shuffle(self, channels, _):
        return Shuffle(2), channels

    def pixels(self, channels, _):
        if channels % 8 or self.draw.random() < 0.5:
            return nn.PixelUnshuffle(1), channels
        return nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2)), channels // 4

    def attention(self, channels, _):
        return Attention(channels, 2, size_in_code=self.draw.random() < 0.5), channels

    def residual(self, channels, depth):
        inner, width = self.chain(channels, depth)
        outer = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)
        return Residual(inner, outer), width

    def concatenation(self, channels, depth):
        (a, first), (b, second) = self.chain(channels, depth), self.chain(channels, depth)
        return Concatenated(a, b), first + second

    def gate(self, channels, depth):
        block, width = self.chain(channels, depth)
        if width % 4:
            return block, width
        return nn.Sequential(block, Gated(by_size=self.draw.random() < 0.5)), width // 2

    def head(self, channels):
        pool = self.draw.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.MaxPool2d(4)])
        columns = channels * (4 if isinstance(pool, nn.MaxPool2d) else 1)
        if self.draw.random() < 0.3:
            return [nn.Conv2d(channels, 5, 1)]
        return [pool, nn.Flatten(), nn.Linear(columns, 7), nn.ReLU(), nn.Linear(7, 3)]


def randomize_statistics(model):
    with torch.no_grad():
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.uniform_(-0.5, 0.5)


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_shrunk_network_computes_what_the_masked_one_does(seed):
    torch.manual_seed(seed)
    model = Grammar(seed).network()
    randomize_statistics(model)
    found, plan, certificate = check_shrinking(model, torch.randn(IMAGE), seed=seed)
    assert bool(plan) == any(group.size > 1 for group in found.prunable)
    assert certificate.eval_difference < 1e-9
    assert certificate.train_difference is not None
    model.train()(torch.randn(IMAGE)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_grammar_leaves_something_to_remove():
    """Most networks have prunable groups: the property would hold for those that have none, too."""
    counts = [len(groups_of(Grammar(seed).network(), torch.randn(IMAGE)).prunable) for seed in range(20)]
    assert sum(count > 2 for count in counts) >= 15
