"""The algorithms of learned and of constant sparsity keep every promise."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold
from tests.zoo import ZOO, trained_model

CONFIGS = {
    "const": {"algorithm": "const_sparsity"},
    "rb": {
        "algorithm": "rb_sparsity",
        "sparsity_init": 0.2,
        "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 3},
    },
    "movement": {
        "algorithm": "movement_sparsity",
        "params": {"warmup_start_epoch": 1, "warmup_end_epoch": 3, "importance_regularization_factor": 0.1},
        "sparse_structure_by_scopes": [{"mode": "per_dim", "axis": 0, "target_scopes": "{re}linear1"}],
    },
}
EXPECTED_FAILURES = {
    "const": {"check_stage_is_measured": "what is masked is zero already, so the masks change nothing before training"},
}


def model_of(name, config):
    # In eval mode, in which gates are not drawn at random: what is read from a layer is then what was counted.
    model = trained_model(name).eval()
    if config == "const":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter[parameter.abs() < parameter.abs().median()] = 0
    return model


@functools.cache
def case_for(model_name: str, config_name: str) -> Case:
    inputs = ZOO[model_name][1]()
    config = {"compression": CONFIGS[config_name]}
    loader = [(inputs[0], torch.zeros(len(inputs[0])))] * 2 if config_name == "movement" else None
    return Case(
        loader=loader,
        make_model=lambda: model_of(model_name, config_name),
        inputs=inputs,
        config=config,
        expected_failures=EXPECTED_FAILURES.get(config_name, {}),
    )


# What these models cannot do even uncompressed, or what does not apply.
MAY_SKIP = {
    ("lstm", "check_backward_and_autocast"),
    ("lstm", "check_compile_eval"),
    ("lstm", "check_compile_train"),
    ("lstm", "check_with_filter_pruning"),
    *(
        (name, f"check_rolls_back_from_{where}")
        for name in ZOO
        for where in ("every_forward", "the_loader", "batch_norm_adaptation")
    ),
}


def wanted(model: str, config: str, check: str) -> bool:
    """Each algorithm on the model that suits it, and what depends on a model's structure on the transformer as well."""
    if "inductor" in check or ("export" in check and config != "rb"):
        return False
    if model == ("resnet" if config != "movement" else "transformer"):
        return True
    return model == "transformer" and config == "rb" and any(part in check for part in ("state", "strip", "copies"))


CASES = [
    (model, config, check)
    for model in ZOO
    for config in CONFIGS
    for check in conformance_checks()
    if wanted(model, config, check.__name__)
]


@pytest.mark.parametrize(("model_name", "config_name", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(model_name, config_name, check):
    hold(check, case_for(model_name, config_name), model_name, MAY_SKIP)
