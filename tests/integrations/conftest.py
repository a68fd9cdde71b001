"""An algorithm with a loss of its own, which trainers must add."""

import pytest
from pydantic import Field

from compress_core import Algorithm, AlgorithmConfig, Plan, Stage, hookimpl
from tests.plugin_helpers import contributing


class PenaltyConfig(AlgorithmConfig):
    factor: float = Field(default=0.05, description="Factor of the squared weights of `fc`.")


class Penalty(Algorithm):
    name = "penalty"
    stage = Stage.SPARSITY
    Config = PenaltyConfig

    @hookimpl
    def compress_plan(self):
        return Plan(("fc.weight",))

    @hookimpl
    def compress_commit(self):
        pass

    @hookimpl
    def compress_loss(self, model):
        return self.config.factor * model.fc.weight.square().sum()


@pytest.fixture(autouse=True)
def penalty(registry):
    registry.register(contributing(Penalty), "penalty")
