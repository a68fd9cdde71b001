"""Models, data and configs that tests of chosen bits share."""

from __future__ import annotations

import torch
from torch import nn

from compress_core import Choice, create_compressed_model
from compress_core.registry import Registry, use_registry
from tests.conftest import declared_entry_points
from tests.plugin_helpers import plugin


class Net(nn.Module):
    """Three convolutions, two of which read the same tensor, batch norm, and a linear layer: images 3x6x6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc((self.left(x) + self.right(x)).relu().mean((2, 3)))


GROUPS = {
    frozenset({"stem|WEIGHT"}),
    frozenset({"left|WEIGHT", "right|WEIGHT"}),
    frozenset({"fc|WEIGHT"}),
}


def make_net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.stem.weight[:3] *= 4
        model(torch.randn(64, 3, 6, 6))
    return model.eval()


def pairs(count=1, size=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def document(precision, device="TRIAL", **section):
    initializer = {"range": {"num_init_samples": 16}, "precision": precision}
    return {
        "target_device": device,
        "input_info": {"sample_size": [1, 3, 6, 6]},
        "compression": {"algorithm": "quantization", "initializer": initializer, **section},
    }


def created(precision, model=None, loader=None, **options):
    model = make_net() if model is None else model
    loader = pairs() if loader is None else loader
    return create_compressed_model(model, document(precision, **options), init_loader=loader)


def bits_of(controller):
    return {name: quantizer.bits for name, quantizer in controller.all_quantizations.items()}


def weight_bits(controller):
    return {name: quantizer.bits for name, quantizer in controller.weight_quantizers.items()}


def with_method(value):
    """Returns a context manager in which `first-first` is a type of `precision`."""
    registry = Registry()
    registry.find_entry_points(declared_entry_points())
    choices = [Choice("quantization.precision", "first-first", value, "theirs")]
    registry.register(plugin(compress_choices=lambda self: choices), "theirs")
    return use_registry(registry)
