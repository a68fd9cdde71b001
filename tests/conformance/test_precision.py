"""The promises hold with numbers of bits that a method has chosen, or that were given by name."""

from __future__ import annotations

import functools

import pytest
import torch

from compress_core.testing import Case, conformance_checks
from tests.conformance.promises import hold
from tests.zoo import ZOO, trained_model

# What does not depend on numbers of bits, and takes seconds; it runs with eight bits, or in tests of chosen bits.
# Flags are checked with a frozen layer, which is refused where bits are chosen.
ELSEWHERE = ("compile", "export", "onnx", "inductor", "_with_", "modes_and_flags")
METHODS = {
    "sensitivity": {"type": "sensitivity", "budget": {"average_bits": 5}, "frontier_points": 0, "num_data_points": 4},
    "hawq": {"type": "hawq", "iter_number": 1, "num_data_points": 4},
    "autoq": {"type": "autoq", "iter_number": 1},
    "manual": {"type": "manual", "bitwidth_per_scope": [[4, "{re}.*conv.*\\|WEIGHT"]]},
}


@functools.cache
def case(method: str) -> Case:
    inputs = ZOO["resnet"][1]()
    initializer = {"range": {"num_init_samples": 4}, "precision": METHODS[method]}
    return Case(
        make_model=lambda: trained_model("resnet"),
        inputs=inputs,
        config={
            "target_device": "TRIAL",
            "compression": {"algorithm": "quantization", "initializer": initializer},
        },
        loader=[(inputs[0], torch.zeros(len(inputs[0]))) for _ in range(2)],
        rounding_step=1 / 7,
        tags=["keeps_activations"],
    )


# What depends on how bits were chosen; the other checks are about what has been chosen, and run once.
OF_METHODS = ("deterministic", "resum", "round_trip", "rolls_back_from_every_forward", "strip_leaves", "repeats")
CASES = [
    (method, check)
    for method in METHODS
    for check in conformance_checks()
    if not any(part in check.__name__ for part in ELSEWHERE)
    and (method == "sensitivity" or any(part in check.__name__ for part in OF_METHODS))
]


@pytest.mark.parametrize(("method", "check"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_promise(method, check):
    hold(check, case(method), "resnet", set())
