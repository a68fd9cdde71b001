"""The last layer before a residual sum makes up for a part of the shortcut's error."""

import pytest
import torch
from torch import nn

from compress_weight_reconstruction import layers
from compress_weight_reconstruction.sums import Sums
from tests.plugins.weight_reconstruction.helpers import batches, copied, create, output_error, section, seeded


class Residual(nn.Module):
    """A shortcut whose error only the branch can make up for, where the stem is ignored."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.branch, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x):
        shortcut = self.stem(x)
        branch = self.branch(shortcut.relu())
        match self.way:
            case "operator":
                return shortcut + branch
            case "in place":
                branch += shortcut
                return branch
            case "function":
                return torch.add(branch, shortcut)


class ResidualConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.behind = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        nn.init.uniform_(self.behind.weight, 0.5, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return x + self.behind(self.conv(x))


def errors(monkeypatch, build, data, *without):
    original, found = seeded(build), []
    for share in (0.0, 0.5):
        monkeypatch.setattr(layers, "_SHORTCUT", share)
        model = copied(original)
        create(model, data, section(ignored_scopes=list(without)))
        found.append(output_error(model, original, data))
    return found


@pytest.mark.parametrize("way", ["operator", "in place", "function"])
def test_a_layer_makes_up_for_a_part_of_the_shortcuts_error(monkeypatch, way):
    without, with_share = errors(monkeypatch, lambda: Residual(way), batches(8), "stem")
    assert with_share < 0.95 * without


def test_behind_a_batch_norm_the_part_is_divided_by_its_scale(monkeypatch):
    without, with_share = errors(monkeypatch, ResidualConv, batches(3, 8, 8), "stem")
    assert with_share < 0.95 * without


def test_shortcuts_are_found_by_the_number_of_the_call():
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    sums = Sums({})
    sums.call(torch.relu, (x,), shortcut := x.relu())
    sums.product("w", y := shortcut @ w)
    sums.call(torch.relu, (y,), late := y.relu())
    sums.call(torch.Tensor.add, (y, shortcut), y + shortcut)
    assert sums.shortcuts == {"w": 1}
    sums.call(torch.Tensor.add, (y, late), y + late)  # made after the product: cannot be known there
    assert sums.shortcuts == {"w": 1}
    again = Sums({"w": 1})
    again.call(torch.relu, (x,), kept := x.relu())
    assert again.take("w") is kept and again.take("w") is None


def test_a_sum_of_other_shapes_is_no_residual_sum():
    sums = Sums({})
    sums.call(torch.relu, (torch.ones(4),), row := torch.ones(4))
    sums.product("w", y := torch.ones(2, 4))
    sums.call(torch.add, (y, row), y + row)
    assert not sums.shortcuts


def test_a_norm_between_that_is_left_alone_ends_the_search(monkeypatch):
    """Its scale is not known to the layer, so nothing may be added to what the layer should make."""
    found = []
    for share in (0.0, 0.5):
        monkeypatch.setattr(layers, "_SHORTCUT", share)
        model = seeded(ResidualConv)
        create(model, batches(3, 8, 8), section(ignored_scopes=["behind"]))
        found.append(model.conv.weight.detach().clone())
    assert torch.equal(*found)
