"""The promises hold with weights that were reconstructed: rollback, checkpoints, copies, training, strip."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold
from tests.zoo import ZOO, trained_model

MODELS = ("resnet", "transformer")
# What does not depend on the values of weights, and takes seconds; it runs with the algorithms themselves.
ELSEWHERE = ("compile", "export", "onnx", "inductor", "with_filter_pruning", "honours_scopes")

# Its forwards are those of copies of the model, whose hooks are copies too; tests/plugins/weight_reconstruction has them
# fail at every layer.
MAY_SKIP = {("transformer", "check_rolls_back_from_every_forward")}


@functools.cache
def case_for(model_name: str) -> Case:
    inputs = ZOO[model_name][1]()
    initializer = {
        "weight_reconstruction": {"num_samples": 8},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 8},
    }
    if model_name == "transformer":
        del initializer["batchnorm_adaptation"]
    section = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.6,
        "params": {"sparsity_target": 0.8, "sparsity_target_epoch": 3},
        "initializer": initializer,
    }
    return Case(
        make_model=lambda: trained_model(model_name),
        inputs=inputs,
        config={"compression": section},
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(3)],
    )


CASES = [
    (model, check)
    for model in MODELS
    for check in conformance_checks()
    if not any(part in check.__name__ for part in ELSEWHERE)
]


@pytest.mark.parametrize(("model_name", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(model_name, check):
    hold(check, case_for(model_name), model_name, MAY_SKIP)
