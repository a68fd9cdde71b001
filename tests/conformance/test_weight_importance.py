"""The promises hold with masks that were chosen with data."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold
from tests.zoo import ZOO, trained_model

# What does not depend on how masks were chosen, and takes seconds; it runs with `normed_abs`.
ELSEWHERE = ("compile", "export", "onnx", "inductor", "honours_scopes")
# Its forwards are those of copies of the model, whose hooks are copies too.
MAY_SKIP = {(kind, "check_rolls_back_from_every_forward") for kind in ("activation", "reconstruction")}


@functools.cache
def case_for(kind: str) -> Case:
    inputs = ZOO["resnet"][1]()
    section = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.5,
        "params": {"weight_importance": kind, "sparsity_target": 0.8, "sparsity_target_epoch": 3},
    }
    return Case(
        make_model=lambda: trained_model("resnet"),
        inputs=inputs,
        config={"compression": section},
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(3)],
    )


CASES = [
    (kind, check)
    for kind in ("activation", "reconstruction")
    for check in conformance_checks()
    if not any(part in check.__name__ for part in ELSEWHERE)
]


@pytest.mark.parametrize(("kind", "check"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_promise(kind, check):
    hold(check, case_for(kind), kind, MAY_SKIP)
