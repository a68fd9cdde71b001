"""A small algorithm that keeps every promise: what the seeded bugs are planted in."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    CompressionStage,
    Initializer,
    InitializerConfig,
    Stage,
    TableStatistics,
    hookimpl,
    mask_weight,
)
from compress_core.registry import use_registry
from compress_core.testing import Case, run_checks
from compress_core.transforms import get_weight_transform, raw_parameter
from tests.conftest import with_built_in_plugins
from tests.plugin_helpers import contributing, plugin
from tests.zoo import images


class RampConfig(AlgorithmConfig):
    level: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
    epochs: int = Field(3, ge=1, description="epochs until then")
    decay: float = Field(1e-4, description="weight of the loss")


class Ramp(Algorithm):
    """Masks weights at random (a generator of its own), more from epoch to epoch, and adds their squares to the loss."""

    name = "mine"
    Config = RampConfig
    stage = Stage.SPARSITY
    reads_later = ("decay", "level", "epochs")

    @hookimpl
    def compress_plan(self, model, context):
        return context.plan_weights(model, self)

    @hookimpl
    def compress_commit(self, model, plan):
        self.targets, self.level = plan.targets, 0.0
        for name in self.targets:
            self.mask(model, name)

    def mask(self, model, name):
        shape = raw_parameter(model, name).shape
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(len(name)))
        mask_weight(model, name, scores >= self.level, key=self.name)

    @hookimpl
    def compress_epoch_step(self, model, clock):
        self.set_level(model, self.level_at(clock.epoch))

    def level_at(self, epoch):
        return self.config.level * min((epoch + 1) / self.config.epochs, 1.0)

    def set_level(self, model, level):
        self.level = level
        for name in self.targets:
            self.mask(model, name)

    @hookimpl
    def compress_loss(self, model):
        return self.config.decay * sum(raw_parameter(model, name).square().sum() for name in self.targets)

    @hookimpl
    def compress_statistics(self):
        return TableStatistics({"zeros": self.compression_rate, "level": self.level}, title="Ramp")

    @hookimpl
    def compress_stage(self):
        if self.level >= self.config.level:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if self.level else CompressionStage.UNCOMPRESSED

    @property
    def compression_rate(self):
        masks = [get_weight_transform(self.model, name, self.name).mask for name in self.targets]
        return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    @hookimpl
    def compress_state(self):
        return {"level": self.level}

    @hookimpl
    def compress_load_state(self, model, state):
        self.set_level(model, state["level"])


class WarmConfig(InitializerConfig):
    pass


class Warm(Initializer):
    """Looks at the model, and leaves it as it is."""

    name = "warm"
    Config = WarmConfig

    @hookimpl
    def compress_initialize(self, model):
        self.seen = len(list(model.modules()))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


def make_case(initializer=False, data=False, **settings):
    section = {"algorithm": "mine", "level": 0.5, "epochs": 3, "decay": 1e-4}
    if initializer:
        section["initializer"] = {"warm": {}}
    loader = [images(4)] * 2 if data else None
    return Case(Net, (images(4),), {"compression": section}, loader=loader, **settings)


def registered(*classes):
    """A registry of the built-in plugins and of one that contributes these classes."""
    registry = with_built_in_plugins()
    initializers = [cls for cls in classes if issubclass(cls, Initializer)]
    algorithms = [cls for cls in classes if issubclass(cls, Algorithm)]
    registry.register(contributing(*algorithms), "seeded")
    if initializers:
        registry.register(plugin(compress_initializers=lambda self: initializers), "seeded_initializers")
    return registry


def failures_of(classes, checks=None, **settings):
    """Name of each check that fails for these classes -> what it says."""
    with use_registry(registered(*classes)):
        return run_checks(make_case(**settings), checks).failed
