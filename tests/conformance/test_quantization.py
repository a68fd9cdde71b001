"""Quantization keeps every promise on every kind of model, alone and on top of sparsity."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold, on_this_model
from tests.conformance.test_builtin_algorithms import MAY_SKIP as PLAIN_MAY_SKIP
from tests.zoo import ZOO, trained_model

QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target": 0.5}}
SECTIONS = {
    "symmetric": [QUANTIZATION],
    "asymmetric, sparse": [
        {**QUANTIZATION, "weights": {"mode": "asymmetric"}, "activations": {"mode": "asymmetric"}},
        SPARSITY,
    ],
}
# With calibration data every model runs something.
MAY_SKIP = {(model, check) for model, check in PLAIN_MAY_SKIP if "rolls_back" not in check and "scopes" not in check}


@functools.cache
def case_for(model_name: str, config_name: str) -> Case:
    inputs = ZOO[model_name][1]()
    sections = [dict(section) for section in SECTIONS[config_name]]
    model = trained_model(model_name)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        initializer = {**sections[0]["initializer"], "batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}
        sections[0]["initializer"] = initializer
    return Case(
        make_model=lambda: trained_model(model_name),
        inputs=inputs,
        config={"compression": sections},
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(3)],
        rounding_step=1 / 127,
        tags=["keeps_activations", *(["inductor"] if (model_name, config_name) == ("resnet", "symmetric") else [])],
    )


def wanted(model: str, config: str, check: str) -> bool:
    """What takes seconds runs once: quantizers are compiled, exported and undone in the same way in all models."""
    if not on_this_model(model, check):
        return False
    if "compile" in check:  # Inductor traces the same graph
        return False
    if "inductor" in check:
        return (model, config) == ("resnet", "symmetric")
    if "export" in check:
        return (model, config) == ("mobilenet", "symmetric")
    if config != "symmetric":
        return model in ("mobilenet", "lstm") and "rolls_back" not in check
    return model != "recurrent" or check != "check_rolls_back_from_every_forward"


CASES = [
    (model, config, check)
    for model in ZOO
    for config in SECTIONS
    for check in conformance_checks()
    if wanted(model, config, check.__name__)
]


@pytest.mark.parametrize(("model_name", "config_name", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(model_name, config_name, check):
    hold(check, case_for(model_name, config_name), model_name, MAY_SKIP)
