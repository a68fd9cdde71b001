"""`modules_of` goes where `named_modules` goes."""

import pytest
import torch
from torch import nn

from compress_core import Stage
from compress_core.transforms import add_activation_transform, add_weight_transform
from compress_core.transforms.places import ModuleOutput
from compress_core.transforms.walk import modules_of
from tests.zoo import ZOO


class Private(nn.Module):
    """Keeps its inner layers to itself."""

    def __init__(self):
        super().__init__()
        self.shown, self.hidden = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield from self.shown.named_modules(memo, f"{prefix}.shown" if prefix else "shown", remove_duplicate)

    def forward(self, x):
        return self.hidden(self.shown(x))


def shared():
    twice, pair = nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.ReLU())
    return nn.Sequential(nn.Sequential(pair, twice), twice, nn.ModuleDict({"a": pair, "b": nn.Sequential(pair)}))


def with_empty_places():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    model.register_module("nothing", None)
    return model


MAKES = {
    **{name: make for name, (make, _) in ZOO.items()},
    "shared": shared,
    "private": lambda: nn.Sequential(Private(), nn.ReLU(), nn.Sequential(Private())),
    "private itself": Private,
    "scripted": lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), nn.ReLU()),
    "empty places": with_empty_places,
}


@pytest.mark.parametrize("name", MAKES)
def test_the_same_modules_in_the_same_order(name):
    model = MAKES[name]()

    def check():
        named = [module for _, module in model.named_modules()]
        assert list(map(id, modules_of(model))) == list(map(id, named))
        return named

    for path, parameter in list(model.named_parameters()):
        if parameter.ndim > 1 and "parametrizations" not in path and path != "0.0.weight":
            add_weight_transform(model, path, nn.Identity(), stage=Stage.SPARSITY, key="same")
    before = check()
    places = [name for name, module in model.named_modules() if type(module) in (nn.ReLU, nn.Linear, nn.Conv2d)]
    for place in places[:3]:
        add_activation_transform(model, ModuleOutput(place, ()), nn.ReLU(), stage=Stage.PRECISION, key="same")
    assert len(check()) > len(before) or not places
