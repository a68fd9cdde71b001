"""Every weight is pruned, or has a reason why it is left whole."""

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model


class Net(nn.Module):
    """Two layers that can be pruned, and one that is used in another way."""

    def __init__(self, other, use):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.other, self.use = other, use

    def forward(self, x):
        return self.use(self.other, self.body(x))


def unreached(layer, x):
    return x


def solved(layer, x):
    return torch.linalg.solve(layer.weight, x.mT).mT


def bagged(layer, x):
    return x + layer(torch.arange(8).reshape(2, 4))


def clustered(layer, x):
    return x @ layer.weight.cummax(0).values


@pytest.mark.parametrize(
    ("layer", "use", "reason"),
    [
        (nn.Linear(4, 4), unreached, "no example input reaches it"),
        (nn.Linear(4, 4), solved, "linalg_solve"),
        (nn.Linear(4, 4), clustered, "cummax"),
        (nn.EmbeddingBag(8, 4), bagged, "the model returns it"),
        (nn.Embedding(8, 4), unreached, "no example input reaches it"),
        (nn.LSTM(4, 4), unreached, "no example input reaches it"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__ if isinstance(value, nn.Module) else ""),
)
def test_every_weight_is_named(layer, use, reason):
    torch.manual_seed(0)
    model = Net(layer, use)
    config = {"compression": {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}}}
    controller, _ = create_compressed_model(model, config, init_loader=[torch.rand(2, 4)])
    figures = controller.statistics().filter_pruning
    left = {name: why for name, why in figures.skipped.items() if name.startswith("other.")}
    weights = {f"other.{name}" for name, parameter in layer.named_parameters() if parameter.ndim > 1}
    assert set(left) == weights
    assert all(reason in why for why in left.values()), left
    assert "body.0.weight" not in figures.skipped
