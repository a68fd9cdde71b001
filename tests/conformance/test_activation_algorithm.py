"""An algorithm that changes activations keeps the same promises: every kind of place, with and without weights masked."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from compress_core import Algorithm, Plan, Stage, hookimpl
from compress_core.testing import conformance_checks
from compress_core.transforms import (
    CallInput,
    CallOutput,
    CallPattern,
    ModuleInput,
    ModuleOutput,
    add_activation_transform,
)
from tests.conformance.promises import hold, on_this_model
from tests.conformance.test_builtin_algorithms import MAY_SKIP, case_for
from tests.plugin_helpers import contributing
from tests.zoo import ZOO


class ScaleAndRound(nn.Module):
    """Rounds to multiples of a learned step, with the gradient of a straight-through estimator."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(64.0))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x):
        scaled = x * self.scale + self.offset
        return (scaled + (scaled.round() - scaled).detach() - self.offset) / self.scale

    def relu(self, x, upper):
        return self(x.clamp(min=0) if upper is None else x.clamp(0, upper))


def calls(site, *sites):
    return CallPattern(site, sites)


PLACES = {
    "ResidualNet": [
        ModuleInput(""),
        ModuleOutput("relu"),
        ModuleOutput("bn2"),
        CallOutput("", "torch.Tensor.add", calls(0, 0, 0)),
        CallInput("", "torch.Tensor.mean", calls(0, 0)),
        CallOutput("conv2", "torch.nn.functional.conv2d", calls(0, 0)),
    ],
    "MobileNet": [
        ModuleInput(""),
        ModuleOutput("features.2"),
        ModuleOutput("features"),
        ModuleInput("classifier"),
        CallOutput("", "torch.nn.functional.adaptive_avg_pool2d", calls(0, 0)),
        CallInput("", "torch.nn.functional.linear", calls(0, 0)),
    ],
    "Transformer": [
        ModuleOutput("embedding"),
        ModuleOutput("encoder.layers.0.linear1"),
        CallOutput("encoder.layers.0", "torch.nn.functional.relu", calls(0, 0)),
        CallOutput("encoder.layers.1", "torch.Tensor.add", calls(1, 0, 1)),
        ModuleOutput("encoder.layers.1.self_attn", (0,)),
        CallOutput("encoder.layers.0", "torch.nn.functional.layer_norm", calls(0, 0, 1)),
    ],
    "Recurrent": [
        ModuleOutput("embedding"),
        ModuleOutput("cell"),
        ModuleInput("norm"),
        CallOutput("", "torch.zeros", calls(0, 0)),
    ],
    "StackedLSTM": [ModuleInput("lstm"), ModuleOutput("lstm", (0,)), ModuleOutput("lstm", (1, 0))],
}


class Rounding(Algorithm):
    name = "rounding"
    stage = Stage.PRECISION

    @hookimpl
    def compress_plan(self, model):
        return Plan(tuple(str(place) for place in PLACES[type(model).__name__]))

    @hookimpl
    def compress_commit(self, model):
        shared = ScaleAndRound()
        for number, place in enumerate(PLACES[type(model).__name__]):
            transform = shared if number < 2 else ScaleAndRound()
            add_activation_transform(model, place, transform, stage=self.stage, key=self.name)


# Scopes name layers, and this algorithm's plan is places: without them there is nothing left of the other's.
MAY_SKIP_TOO = {*MAY_SKIP, *((model, "check_honours_scopes") for model in ZOO)}


def wanted(model: str, check: str) -> bool:
    """What takes seconds runs on few models: one with sites of its own, one with attention."""
    if "train" in check and ("compile" in check or "export" in check):
        return model in ("resnet", "transformer")
    if not on_this_model(model, check):
        return False
    return "onnx" not in check or model == "resnet"


@functools.cache
def rounding_case(model_name: str):
    plain = case_for(model_name, "global sparsity")
    case = plain.with_sections([plain.config["compression"], {"algorithm": "rounding"}])
    case.tags = ["keeps_activations"]
    return case


CASES = [(model, check) for model in ZOO for check in conformance_checks() if wanted(model, check.__name__)]


@pytest.mark.parametrize(("model_name", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(model_name, check, registry):
    registry.register(contributing(Rounding), "demo")
    hold(check, rounding_case(model_name), model_name, MAY_SKIP_TOO)
