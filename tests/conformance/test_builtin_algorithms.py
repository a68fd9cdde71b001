"""Every built-in algorithm keeps every promise on every kind of model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core.testing import Case, conformance_checks
from tests.zoo import ZOO, trained

CONFIGS = {
    "global sparsity": {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.6,
            "params": {"sparsity_target": 0.8, "sparsity_target_epoch": 3},
        }
    },
    "local sparsity": {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.5,
            "params": {
                "sparsity_level_setting_mode": "local",
                "weight_importance": "abs",
                "schedule": "adaptive",
                "sparsity_target": 0.7,
            },
        }
    },
}


def case_for(model_name: str, config_name: str) -> Case:
    make, make_inputs = ZOO[model_name]
    inputs = make_inputs()
    config = {**CONFIGS[config_name]}
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in make().modules())
    if has_batch_norm:
        section = dict(config["compression"])
        section["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}
        config["compression"] = section
    return Case(
        make_model=lambda: trained(make(), inputs),
        inputs=inputs,
        config=config,
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(3)],
    )


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("config_name", CONFIGS)
@pytest.mark.parametrize("model_name", ZOO)
def test_promise(model_name, config_name, check):
    if "compile" in check.__name__ and config_name == "local sparsity":
        pytest.skip("the transforms are the same as with global sparsity, and compiling takes seconds")
    check(case_for(model_name, config_name))
