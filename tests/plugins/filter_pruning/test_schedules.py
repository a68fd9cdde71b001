"""Levels by epoch, against NNCF's formulas solved independently."""

import logging

import numpy as np
import pytest
import torch
from scipy.optimize import fsolve

from compress_core import CompressionStage
from tests.plugins.filter_pruning.pruning_helpers import Chain, gone, pruned, seen


def levels(controller, epochs):
    found = []
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        found.append(controller.statistics().filter_pruning.requested_level)
    return found


def exponential(initial, target, k, duration):
    density = (1 - initial) * ((1 - target) / (1 - initial)) ** (k / duration)
    return min(1 - max(density, 1 - target), target)


def with_bias(initial, target, k, duration):
    """a exp(-k kk) + b through (0, initial), (duration / 8, 3/4 target), (duration, target)."""

    def equation(rate):
        a = (0.75 * target - target) / (np.exp(-rate * duration / 8) - np.exp(-rate * duration))
        return initial + a * (np.exp(-rate * k_end) - 1) - target

    k_end = duration
    rate = float(fsolve(equation, 1.0 * 8 / duration, xtol=1e-14)[0])
    a = (target - initial) / (np.exp(-rate * duration) - 1)
    return a * np.exp(-rate * min(k, duration)) + initial - a


@pytest.mark.parametrize(("initial", "target", "steps"), [(0.0, 0.5, 5), (0.1, 0.7, 9), (0.2, 0.2, 3), (0.0, 0.9, 1)])
def test_exponential(initial, target, steps):
    controller, _ = pruned(level=initial, schedule="exponential", pruning_target=target, pruning_steps=steps)
    expected = [exponential(initial, target, k, steps - 1) if steps > 1 else target for k in range(steps + 3)]
    assert levels(controller, steps + 3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("initial", "target", "steps"), [(0.0, 0.5, 20), (0.1, 0.7, 9), (0.05, 0.9, 40)])
def test_exponential_with_bias(initial, target, steps):
    controller, _ = pruned(level=initial, schedule="exponential_with_bias", pruning_target=target, pruning_steps=steps)
    expected = [with_bias(initial, target, k, steps - 1) for k in range(steps)]
    assert expected[-1] == pytest.approx(target)  # the reference has found a solution
    assert levels(controller, steps) == pytest.approx(expected, abs=1e-6)


def test_exponential_with_bias_from_a_high_initial_level_is_the_straight_line():
    controller, _ = pruned(level=0.45, schedule="exponential_with_bias", pruning_target=0.5, pruning_steps=6)
    assert levels(controller, 6) == pytest.approx([0.45, 0.46, 0.47, 0.48, 0.49, 0.5])


def test_baseline_jumps_to_the_target_after_the_warm_up_and_freezes():
    controller, _ = pruned(level=0.25, schedule="baseline", pruning_target=0.5, num_init_steps=2)
    before = gone(controller)
    assert controller.pruning_level == pytest.approx(0.25, abs=0.01)
    assert levels(controller, 2) == [0.25, 0.25]  # the warm-up keeps the initial level
    assert gone(controller) == before
    assert not controller.frozen
    assert levels(controller, 2) == [0.5, 0.5]
    assert controller.frozen
    assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED


def test_masks_are_chosen_anew_each_epoch_until_they_freeze():
    import torch

    controller, model = pruned(seen(Chain()), 0.5, schedule="exponential", pruning_target=0.5, pruning_steps=2)
    raw = model.conv1._parameters["weight"]
    lost = gone(controller)[0][0]
    controller.scheduler.epoch_step()
    with torch.no_grad():
        raw[lost] = 10.0
    controller.scheduler.epoch_step()
    assert lost not in gone(controller)[0]
    controller.scheduler.epoch_step()
    assert controller.frozen
    with torch.no_grad():
        raw[lost] = 1e-9
    after = gone(controller)
    controller.scheduler.epoch_step()
    assert gone(controller) == after


def test_target_in_operations_follows_the_schedule_too():
    params = {"schedule": "exponential", "pruning_flops_target": 0.6, "pruning_steps": 4}
    controller, _ = pruned(seen(Chain((16, 24, 16))), 0.0, **params)
    reached = []
    for level in [exponential(0.0, 0.6, k, 3) for k in range(4)]:
        controller.scheduler.epoch_step()
        reached.append(controller.flops_pruning_level)
        assert controller.flops_pruning_level >= level - 1e-9
    assert reached == sorted(reached)


def test_nothing_is_said_where_nothing_is_wrong(caplog):
    with caplog.at_level(logging.WARNING):
        pruned(seen(Chain()), 0.5)
    assert not caplog.text


def test_an_unchanged_level_ranks_weights_anew_that_were_loaded_without_masks():
    options = {"schedule": "baseline", "num_init_steps": 0}
    controller, model = pruned(level=0.5, **options)
    before = gone(controller)
    other = seen(Chain())
    with torch.no_grad():
        for layer in (other.conv1, other.conv2, other.conv3):
            layer.weight.copy_(layer.weight.flip(0))
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    expected = gone(pruned(other, level=0.5, **options)[0])
    model.load_state_dict(weights)
    controller.scheduler.epoch_step()
    assert gone(controller) == expected != before
    # What comes with its masks keeps them.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    controller.scheduler.epoch_step()
    assert gone(controller) == expected
