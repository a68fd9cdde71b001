import torch
from pydantic import Field

from compress_core import Algorithm, AlgorithmConfig, Stage, hookimpl, mask_weight
from compress_core.transforms import raw_parameter


class RandomSparsityConfig(AlgorithmConfig):
    level: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
    seed: int = Field(0, description="seed of the choice")


class RandomSparsity(Algorithm):
    name = "random_sparsity"
    Config = RandomSparsityConfig
    stage = Stage.SPARSITY

    @hookimpl
    def compress_plan(self, model, context):
        return context.plan_weights(model, self)  # every weight that the scopes of the config leave

    @hookimpl
    def compress_commit(self, model, plan):
        generator = torch.Generator().manual_seed(self.config.seed)
        for name in plan.targets:
            shape = raw_parameter(model, name).shape
            mask_weight(model, name, torch.rand(shape, generator=generator) >= self.config.level, key=self.name)


@hookimpl
def compress_algorithms():
    return [RandomSparsity]
