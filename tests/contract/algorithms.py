"""What tests of contract share."""

import torch
from torch import nn

from compress_core import (
    Algorithm,
    Plan,
    Stage,
    hookimpl,
    mask_weight,
)
from compress_core.registry import Registry
from compress_core.transforms import raw_parameter
from tests.conftest import declared_entry_points
from tests.plugin_helpers import contributing, plugin


class Base(Algorithm):
    """Masks every second element of each weight."""

    name = "base"
    stage = Stage.SPARSITY

    @hookimpl
    def compress_plan(self, model, context):
        return context.plan_weights(model, self)

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            weight = raw_parameter(model, name)
            mask_weight(model, name, (torch.arange(weight.numel()) % 2).reshape(weight.shape), key=self.name)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def images(count=8):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def sections(*names):
    return {"compression": [{"algorithm": name} for name in names], "input_info": {"sample_size": [2, 3, 6, 6]}}


def pruned(config):
    """Lets the small models of this page lose channels."""
    for section in config["compression"]:
        if section["algorithm"] == "filter_pruning":
            section.setdefault("params", {}).update(multiple_of=1, prune_first_conv=True)
    return config


def fresh(*classes, **hooks):
    registry = Registry()
    registry.find_entry_points(declared_entry_points())
    if classes:
        registry.register(contributing(*classes), "test")
    if hooks:
        registry.register(plugin(**hooks), "test hooks")
    return registry


class Replacing(Algorithm):
    name = "replacing"
    stage = Stage.STRUCTURE
    replaces_modules = True

    @hookimpl
    def compress_plan(self, model):
        return Plan(("4.weight",))

    @hookimpl
    def compress_commit(self, model):
        model[4] = nn.Sequential(nn.Linear(8 * 16, 3), nn.Linear(3, 4))
