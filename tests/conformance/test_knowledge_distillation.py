"""Knowledge distillation keeps every promise, alone and beside sparsity, from outputs and from features."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold, on_this_model
from tests.conformance.test_builtin_algorithms import MAY_SKIP as PLAIN_MAY_SKIP
from tests.zoo import ZOO, trained_model

SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target": 0.5}}
# Layers of each model, what is compared there, and what has to be said about tensors of three dimensions.
MODELS = {
    "resnet": ({"type": "softmax", "temperature": 2.0}, [{"student": ["bn1", "bn2"], "type": "attention"}]),
    "mobilenet": ({"type": "cosine"}, [{"student": "features.1"}, {"student": "features.4", "type": "cosine"}]),
    "transformer": (
        {"type": "softmax", "class_dim": -1},
        [{"student": "encoder.layers.*", "type": "attention", "channel_dim": -1}],
    ),
    "lstm": ({"type": "mse"}, [{"student": "lstm", "output": "0"}]),
}
SCHEDULE = {"weight_schedule": {"type": "cosine", "end_epoch": 4}}


@functools.cache
def case_for(model_name: str, kind: str) -> Case:
    make_inputs = ZOO[model_name][1]
    inputs = make_inputs()
    outputs, features = MODELS[model_name]
    section = {"algorithm": "knowledge_distillation", **outputs, "features": features, **SCHEDULE}
    return Case(
        make_model=lambda: trained_model(model_name),
        inputs=inputs,
        config={"compression": [section] if kind == "alone" else [SPARSITY, section]},
        loader=[(inputs[0], torch.zeros(len(inputs[0])))] * 2,
    )


MAY_SKIP = {
    *PLAIN_MAY_SKIP,
    # It has no scopes, adds no transform, and measures nothing before training.
    *((name, "check_honours_scopes") for name in MODELS),
    *((name, "check_rolls_back_from_every_forward") for name in MODELS),
    *((name, "check_rolls_back_from_the_loader") for name in MODELS),
}


def wanted(model: str, kind: str, check: str) -> bool:
    if kind == "alone" and (model != "resnet" or "compile" in check or "export" in check):
        return False
    if model == "lstm" and ("compile" in check or "with" in check):
        return False
    return on_this_model(model, check) and ("onnx" not in check or model == "resnet")


CASES = [
    (model, kind, check)
    for model in MODELS
    for kind in ("alone", "sparse")
    for check in conformance_checks()
    if wanted(model, kind, check.__name__)
]


@pytest.mark.parametrize(("model_name", "kind", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(model_name, kind, check):
    hold(check, case_for(model_name, kind), model_name, MAY_SKIP)
