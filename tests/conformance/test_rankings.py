"""The promises hold with channels that a search has ranked."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold
from tests.zoo import ZOO, trained_model

# What does not depend on how channels were ranked, and takes seconds; it runs with filter pruning as it is.
ELSEWHERE = ("compile", "export", "onnx", "inductor", "with_quantization")
MAY_SKIP = {("resnet", "check_honours_scopes")}  # one group, all of which the scope takes away


@functools.cache
def case() -> Case:
    inputs = ZOO["resnet"][1]()
    params = {
        "interlayer_ranking_type": "adapted_ranking",
        "adapted_params": {"candidates": 5, "population_size": 3, "calibration_samples": 4},
        "multiple_of": 2,
    }
    return Case(
        make_model=lambda: trained_model("resnet"),
        inputs=inputs,
        config={"compression": {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": params}},
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(3)],
        strip_tolerance=1e-6,
    )


CHECKS = [check for check in conformance_checks() if not any(part in check.__name__ for part in ELSEWHERE)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(check):
    hold(check, case(), "resnet", MAY_SKIP)
