"""What tests of quantizer placement share."""

from __future__ import annotations

import torch
from torch import nn

from compress_core.config.scopes import ScopeFilter
from compress_core.trace import trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.plan import QuantizationPlan
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile


def plan(model: nn.Module, *inputs: torch.Tensor, device: str = "ANY", **section) -> QuantizationPlan:
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    recorded = trace(model, inputs if len(inputs) > 1 else inputs[0], training=True)
    return Planner(model, recorded, config, load_profile(device), ScopeFilter(model)).plan()


def counts(found: QuantizationPlan) -> tuple[int, int]:
    weights = [q for q in found.quantizers if q.group == "weights"]
    return len(weights), len(found.quantizers) - len(weights)


def places(found: QuantizationPlan) -> list[list[str]]:
    return [[str(place) for place in q.places] for q in found.quantizers if q.group == "activations"]


class Block(nn.Module):
    """conv-bn-relu, residual add, and whatever a test makes of the rest."""

    def __init__(self, rest):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.rest = rest

    def forward(self, *inputs):
        return self.rest(self, *inputs)
