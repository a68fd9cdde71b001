"""Schedules against the formulas of NNCF 2.16, written down independently."""

import math

import pytest
from torch import nn

from compress_core import ConfigError, create_compressed_model


def levels(params, epochs, init=0.0, steps=0):
    """Runs the real thing on a layer of a million weights, so that levels are exact to 1e-6, and measures the masks."""
    model = nn.Linear(1000, 1000, bias=False)
    section = {"algorithm": "magnitude_sparsity", "sparsity_init": init, "params": params}
    controller, _ = create_compressed_model(model, {"compression": section})
    measured = [controller.sparsity_level]
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        measured.append(controller.sparsity_level)
        for _ in range(steps):
            controller.scheduler.step()
            measured.append(controller.sparsity_level)
    return measured, controller


def polynomial(init, target, p, power, concave):
    return target - (target - init) * (1 - p) ** power if concave else init + (target - init) * p**power


@pytest.mark.parametrize("concave", [True, False])
@pytest.mark.parametrize(("init", "target", "power"), [(0.0, 0.5, 0.9), (0.2, 0.9, 3.0)])
def test_polynomial(init, target, power, concave):
    params = {"sparsity_target": target, "sparsity_target_epoch": 5, "power": power, "concave": concave}
    measured, _ = levels(params, 8, init)
    expected = [init] + [polynomial(init, target, min(e / 5, 1), power, concave) for e in range(8)]
    assert measured == pytest.approx(expected, abs=1e-6)


def test_polynomial_with_no_time_is_at_its_target_at_once():
    measured, _ = levels({"sparsity_target": 0.4, "sparsity_target_epoch": 0}, 2)
    assert measured == pytest.approx([0.0, 0.4, 0.4], abs=1e-6)


def test_polynomial_per_step():
    params = {
        "sparsity_target": 0.6,
        "sparsity_target_epoch": 3,
        "update_per_optimizer_step": True,
        "steps_per_epoch": 4,
    }
    measured, _ = levels(params, 4, steps=4)
    expected = [0.0]
    for epoch in range(4):
        expected.append(expected[-1])  # the epoch itself changes nothing
        expected += [polynomial(0.0, 0.6, min((epoch + i / 4) / 3, 1), 0.9, True) for i in range(4)]
    assert measured == pytest.approx(expected, abs=1e-6)


def test_polynomial_per_step_measures_the_first_epoch_when_its_length_is_not_given():
    params = {"sparsity_target": 0.6, "sparsity_target_epoch": 3, "update_per_optimizer_step": True}
    measured, _ = levels(params, 4, steps=4)
    assert measured[:6] == pytest.approx([0.0] * 6, abs=1e-6)
    assert measured[7:11] == pytest.approx([polynomial(0, 0.6, (1 + i / 4) / 3, 0.9, True) for i in range(4)], abs=1e-6)
    assert measured[-1] == pytest.approx(0.6, abs=1e-6)


def test_more_steps_than_announced_wait_for_the_epoch(caplog):
    params = {
        "sparsity_target": 0.6,
        "sparsity_target_epoch": 3,
        "update_per_optimizer_step": True,
        "steps_per_epoch": 2,
    }
    measured, _ = levels(params, 1, steps=4)
    assert measured[-2:] == pytest.approx([polynomial(0, 0.6, 1 / 3, 0.9, True)] * 2, abs=1e-6)
    assert sum("steps_per_epoch is 2, but epoch 0 has more steps" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize(("init", "target"), [(0.0, 0.5), (0.3, 0.95)])
def test_exponential(init, target):
    measured, _ = levels({"schedule": "exponential", "sparsity_target": target, "sparsity_target_epoch": 6}, 9, init)
    expected = [init]
    for epoch in range(9):
        density = (1 - init) * math.exp(math.log((1 - target) / (1 - init)) * epoch / 6)
        expected.append(min(1 - max(density, 1 - target), target))
    assert measured == pytest.approx(expected, abs=1e-6)


def test_multistep():
    params = {"schedule": "multistep", "multistep_steps": [4, 2], "multistep_sparsity_levels": [0.1, 0.3, 0.7]}
    measured, controller = levels(params, 6, init=0.05)
    assert measured == pytest.approx([0.05, 0.1, 0.1, 0.3, 0.3, 0.7, 0.7], abs=1e-6)
    assert controller.target_level == 0.7


def test_adaptive():
    params = {"schedule": "adaptive", "sparsity_target": 0.3, "patience": 2, "step": 0.1}
    measured, _ = levels(params, 9, init=0.05)
    assert measured == pytest.approx([0.05, 0.05, 0.15, 0.15, 0.25, 0.25, 0.3, 0.3, 0.3, 0.3], abs=1e-6)


def test_freezing_before_the_target_is_said_and_reported_as_what_it_is(caplog):
    params = {"sparsity_target": 0.8, "sparsity_target_epoch": 10, "sparsity_freeze_epoch": 3}
    measured, controller = levels(params, 12)
    expected = polynomial(0, 0.8, 2 / 10, 0.9, True)
    assert measured[-1] == pytest.approx(expected, abs=1e-6)
    assert "the schedule ends at epoch 10: the level will stay where epoch 2 has brought it" in caplog.text
    assert controller.compression_stage().name == "PARTIALLY_COMPRESSED"
    statistics = controller.statistics().magnitude_sparsity
    assert statistics.sparsity_level == pytest.approx(expected, abs=1e-6)
    assert statistics.requested_level == pytest.approx(expected, abs=1e-6)
    assert statistics.frozen


def test_default_freeze_epoch_does_not_cut_a_long_schedule():
    measured, controller = levels({"sparsity_target": 0.5, "sparsity_target_epoch": 120}, 125)
    assert measured[-1] == pytest.approx(0.5, abs=1e-6)
    assert controller.frozen


@pytest.mark.parametrize("schedule", ["polynomial", "exponential", "adaptive", "multistep"])
def test_a_target_that_nobody_gave_is_not_below_the_initial_level(schedule):
    measured, controller = levels({"schedule": schedule}, 3, init=0.9)
    assert measured == pytest.approx([0.9] * 4, abs=1e-6)
    assert controller.target_level == 0.9


def test_multistep_levels_that_nobody_gave_do_not_fall_below_the_initial_level():
    measured, _ = levels({"schedule": "multistep", "multistep_steps": [2]}, 3, init=0.3)
    assert measured == pytest.approx([0.3, 0.3, 0.3, 0.5], abs=1e-6)


@pytest.mark.parametrize("params", [{}, {"schedule": "exponential"}, {"schedule": "multistep"}])
def test_a_target_epoch_that_nobody_gave_is_before_the_freeze(params, caplog):
    measured, controller = levels({"sparsity_freeze_epoch": 3, **params}, 5)
    assert measured[-1] == pytest.approx(0.5, abs=1e-6)
    assert controller.frozen
    assert "the schedule ends" not in caplog.text


def test_a_default_that_cannot_follow_is_named_as_one():
    with pytest.raises(ConfigError, match=r"multistep_sparsity_levels not given: the default.*one level more"):
        levels({"schedule": "multistep", "multistep_steps": [2, 4]}, 0)
