"""Thresholds, factors and levels by step and epoch, against those that NNCF 2.16 itself had.

`benchmarks.sparsity_against_nncf` wrote them down, with everything else that it compares.
"""

import json

import pytest

from benchmarks import report
from benchmarks.sparsity_against_nncf import SCHEDULES, STEPS, WARMUP
from tests.plugins.learned_sparsity.scores_helpers import create, network

FOUND = json.loads((report.RESULTS / "sparsity_against_nncf.json").read_text())


@pytest.mark.parametrize("structure", FOUND["courses"])
def test_threshold_and_factor_of_each_step_are_those_of_nncf(structure):
    course = FOUND["courses"][structure]
    first = course[STEPS * WARMUP["warmup_start_epoch"]][0]
    params = WARMUP | {"enable_structured_masking": False, "init_importance_threshold": first}
    controller, model = create(network(), "movement_sparsity", params=params)
    for mask in (m for m in model.modules() if hasattr(m, "scores")):
        mask.scores.data.fill_(1)  # no quantile is below the threshold
    for step, (threshold, factor) in enumerate(course):
        if step % STEPS == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        wanted = float("-inf") if threshold is None else pytest.approx(threshold, rel=1e-6, abs=1e-12)
        assert controller.importance_threshold == wanted, step
        assert controller.importance_regularization_factor == pytest.approx(factor, rel=1e-12, abs=1e-15), step


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "adaptive"])
def test_level_that_the_loss_asks_for_in_each_epoch_is_that_of_nncf(schedule):
    controller, _ = create(network(), "rb_sparsity", sparsity_init=0.05, params=SCHEDULES[schedule])
    for epoch, level in enumerate(FOUND["requested_levels"][schedule]):
        controller.scheduler.epoch_step()
        assert controller.requested_level == pytest.approx(level, rel=1e-12), epoch


def test_what_was_compared_side_by_side_is_the_same():
    checkpoint, stripped = FOUND["const"]
    assert checkpoint["masks that differ"] == 0
    assert stripped["zeros after training, here"] == checkpoint["zeros after training, here"]
    for row in FOUND["rb"]:
        assert row["masks that differ"] == row["loss"] == row["gradients of scores"] == row["outputs"] == 0, row
    for row in FOUND["movement"]:
        if "biases" not in row["structure"]:
            assert row["masks that differ"] == row["outputs"] == 0, row
            assert max(row["loss"], row["gradients of scores"], row["scores"]) < 1e-6, row
