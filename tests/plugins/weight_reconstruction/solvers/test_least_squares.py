"""Solved weights against `lstsq` of each row in float64, for every kind of support and of degenerate input."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import UsageError
from compress_weight_reconstruction.solvers import Freedom, Moments, least_squares, solve
from tests.plugins.weight_reconstruction.solvers.solver_helpers import (
    layer,
    mean_error,
    moments,
    normal_of,
    row_by_row,
)


def random_support(weight, density, seed=0):
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density


def columns_gone(weight):
    kept = torch.tensor([True, False, True, True, False]).repeat(3)[: weight.shape[2]]
    return kept.expand_as(weight).clone()


def two_of_four(weight):
    order = weight.unflatten(2, (-1, 4)).abs().argsort(3, descending=True)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(3, order[..., :2], True).flatten(2)


def blocks(weight):
    """Two rows by three columns each."""
    return random_support(weight[:, ::2, ::3], 0.5).repeat_interleave(2, 1).repeat_interleave(3, 2)


SUPPORTS = {
    "none": lambda weight: None,
    "all": lambda weight: torch.ones_like(weight, dtype=torch.bool),
    "columns": columns_gone,
    "unstructured": lambda weight: random_support(weight, 0.4),
    "2:4": two_of_four,
    "blocks": blocks,
    "one each": lambda weight: torch.eye(weight.shape[1], weight.shape[2]).bool().expand_as(weight),
    "nothing": lambda weight: torch.zeros_like(weight, dtype=torch.bool),
    "some rows empty": lambda weight: random_support(weight, 0.5) & (torch.arange(weight.shape[1]) % 2 > 0)[:, None],
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("groups", [1, 3])
def test_each_row_is_the_least_squares_solution_on_its_support(kind, damping, centred, groups):
    inputs, weight, targets = layer(groups, rows=4, columns=12, positions=80)
    support = SUPPORTS[kind](weight)
    solution = solve(weight, normal_of(inputs, targets, centred=centred), Freedom(support=support), damping=damping)
    expected = row_by_row(inputs, weight, targets, support, damping, centred=centred)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-8, atol=1e-8)
    if support is not None:
        assert (solution.weight[~support] == 0).all()
    masked = weight if support is None else weight * support
    np.testing.assert_allclose(solution.error_before, mean_error(masked, inputs, targets, centred=centred), rtol=1e-9)
    after = mean_error(solution.weight, inputs, targets, centred=centred)
    np.testing.assert_allclose(solution.error_after, after, rtol=1e-9)
    bias = (targets.mean(1) - (inputs @ solution.weight.mT).mean(1)) * centred
    np.testing.assert_allclose(solution.bias, bias, atol=1e-12)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_float32_is_as_near_as_its_rounding_allows(kind):
    inputs, weight, targets = layer(2, rows=4, columns=12, positions=200, dtype=torch.float32)
    support = SUPPORTS[kind](weight)
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.1)
    assert solution.weight.dtype == torch.float32
    expected = row_by_row(inputs, weight, targets, support, 0.1)
    np.testing.assert_allclose(solution.weight, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["none", "columns", "unstructured"])
@pytest.mark.parametrize("workspace", [0, 3000])
def test_without_room_for_factors_conjugate_gradients_come_to_the_same(kind, workspace):
    inputs, weight, targets = layer(2, rows=4, columns=12, positions=200)
    support = SUPPORTS[kind](weight)
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.1, workspace=workspace)
    np.testing.assert_allclose(solution.weight, row_by_row(inputs, weight, targets, support, 0.1), atol=3e-3)
    if support is not None:
        assert (solution.weight[~support] == 0).all()


def test_rows_with_many_sizes_are_solved_in_several_batches(monkeypatch):
    monkeypatch.setattr(least_squares, "_BATCH", 3)
    inputs, weight, targets = layer(2, rows=11, columns=12, positions=80)
    support = torch.arange(12) < torch.arange(1, 12)[:, None]
    support = torch.stack([support, support.flip(0).flip(1)])
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.1, workspace=20_000)
    np.testing.assert_allclose(solution.weight, row_by_row(inputs, weight, targets, support, 0.1), atol=1e-8)


def test_equal_rows_of_different_groups_are_not_solved_together():
    inputs, weight, targets = layer(3, rows=4, columns=12, positions=80)
    support = random_support(weight[:1], 0.5).expand_as(weight)
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.1)
    np.testing.assert_allclose(solution.weight, row_by_row(inputs, weight, targets, support, 0.1), atol=1e-8)


def test_what_removed_columns_carried_goes_to_those_that_are_left():
    inputs, weight, _ = layer(rows=3, columns=4, positions=100)
    inputs[:, :, 3] = 2 * inputs[:, :, 0] - inputs[:, :, 1] + 3
    support = torch.tensor([True, True, True, False]).expand_as(weight)
    solution = solve(weight, normal_of(inputs, inputs @ weight.mT + 1), Freedom(support=support), damping=0.0)
    moved = weight[0] @ torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [2, -1, 0]], dtype=torch.float64)
    np.testing.assert_allclose(solution.weight[0, :, :3], moved, atol=1e-9)
    np.testing.assert_allclose(solution.bias[0], weight[0, :, 3] * 3 + 1, atol=1e-9)
    assert float(solution.error_after.max()) < 1e-12 < float(solution.error_before.min())


def test_damping_pulls_towards_the_old_weight():
    inputs, weight, targets = layer()
    far = solve(weight, normal_of(inputs, targets), damping=1e9).weight
    np.testing.assert_allclose(far, weight, atol=1e-7)


# What the layers of real networks hand over.
def fewer_positions_than_columns():
    return layer(2, rows=3, columns=12, positions=5)


def dead_inputs():
    inputs, weight, targets = layer(2, rows=3, columns=12)
    inputs[:, :, ::3] = 0
    return inputs, weight, targets


def constant_inputs():
    inputs, weight, targets = layer(2, rows=3, columns=12)
    inputs[:, :, ::2] = 3.7
    return inputs, weight, targets


def all_dead():
    inputs, weight, targets = layer(2, rows=3, columns=12)
    return inputs * 0, weight, targets


def one_position():
    return layer(2, rows=3, columns=12, positions=1)


def equal_columns():
    inputs, weight, targets = layer(2, rows=3, columns=12)
    return inputs[:, :, :1].expand_as(inputs), weight, targets


def zero_rows():
    inputs, weight, targets = layer(2, rows=3, columns=12)
    return inputs, weight * torch.tensor([1.0, 0, 1])[:, None], targets * torch.tensor([1.0, 0, 1])


def one_by_one():
    return layer(1, rows=1, columns=1)


def depthwise():
    return layer(16, rows=1, columns=9)


DEGENERATE = [
    fewer_positions_than_columns,
    dead_inputs,
    constant_inputs,
    all_dead,
    one_position,
    equal_columns,
    zero_rows,
    one_by_one,
    depthwise,
]


@pytest.mark.parametrize("make", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [None, 0.4, 0.0])
def test_degenerate_layers_have_finite_weights_and_errors_that_do_not_rise(make, dtype, density):
    inputs, weight, targets = (x.to(dtype) for x in make())
    support = None if density is None else random_support(weight, density)
    masked = weight if support is None else weight * support
    for centred, damping, workspace in itertools.product((True, False), (0.0, 1e-6, 0.1), (1 << 30, 0)):
        normal = normal_of(inputs, targets, centred=centred)
        solution = solve(weight, normal, Freedom(support=support), damping=damping, workspace=workspace)
        for value in (solution.weight, solution.bias, solution.error_before, solution.error_after):
            assert torch.isfinite(value).all()
        assert (solution.error_after <= solution.error_before).all()
        scale = mean_error(masked * 0, inputs, targets, centred=centred)
        scale = scale + mean_error(masked, inputs, targets * 0, centred=centred)
        before = mean_error(masked, inputs, targets, centred=centred)
        after = mean_error(solution.weight, inputs, targets, centred=centred)
        assert (after <= before + scale * (1e-5 if dtype == torch.float32 else 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_weights_of_dead_inputs_stay(dtype, damping):
    inputs, weight, targets = (x.to(dtype) for x in dead_inputs())
    solution = solve(weight, normal_of(inputs, targets), damping=damping)
    assert torch.equal(solution.weight[:, :, ::3], weight[:, :, ::3])
    np.testing.assert_allclose(
        solution.weight[:, :, 1::3],
        row_by_row(inputs, weight, targets, None, damping)[:, :, 1::3],
        rtol=1e-3,
        atol=1e-3,
    )


def test_nothing_known_changes_nothing():
    inputs, weight, targets = all_dead()
    solution = solve(weight, normal_of(inputs, targets), damping=0.1)
    assert torch.equal(solution.weight, weight)
    np.testing.assert_allclose(solution.bias, targets.mean(1))


@settings(deadline=None)
@given(
    inputs_scale=st.sampled_from([1e-20, 1e-7, 1e-2, 1e3, 1e20]),
    weight_scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e17]),
    kind=st.sampled_from(["none", "columns", "unstructured"]),
    workspace=st.sampled_from([0, 1 << 30]),
)
def test_scaled_inputs_and_weights_scale_the_solution(inputs_scale, weight_scale, kind, workspace):
    inputs, weight, targets = layer(2, rows=4, columns=12, positions=80, dtype=torch.float32)
    support = SUPPORTS[kind](weight)
    freedom = Freedom(support=support)
    plain = solve(weight, normal_of(inputs, targets), freedom, damping=0.1, workspace=workspace)
    output_scale = min(max(inputs_scale * weight_scale, 1e-36), 1e36)
    weight_scale = output_scale / inputs_scale
    scaled = solve(
        weight * weight_scale,
        normal_of(inputs * inputs_scale, targets * output_scale),
        freedom,
        damping=0.1,
        workspace=workspace,
    )
    np.testing.assert_allclose(scaled.weight / weight_scale, plain.weight, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(scaled.bias / output_scale, plain.bias, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(scaled.error_after / output_scale**2, plain.error_after, rtol=1e-4)


def test_powers_of_two_change_no_bit():
    inputs, weight, targets = layer(2, rows=4, columns=12, positions=80, dtype=torch.float32)
    freedom = Freedom(support=random_support(weight, 0.5))
    plain = solve(weight, normal_of(inputs, targets), freedom, damping=0.1)
    scaled = solve(weight * 2.0**20, normal_of(inputs * 2.0**-30, targets * 2.0**-10), freedom, damping=0.1)
    assert torch.equal(scaled.weight, plain.weight * 2.0**20)
    assert torch.equal(scaled.error_after, plain.error_after * 2.0**-20)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_groups_are_solved_as_each_alone(kind):
    inputs, weight, targets = layer(3, rows=4, columns=12, positions=80)
    support = SUPPORTS[kind](weight)
    together = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.1)
    for g in range(3):
        part = slice(g, g + 1)
        alone = solve(
            weight[part],
            normal_of(inputs[part], targets[part]),
            Freedom(support=None if support is None else support[part]),
            damping=0.1,
        )
        torch.testing.assert_close(together.weight[part], alone.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.error_after[part], alone.error_after, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 40),
    damping=st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_error_never_rises(seed, positions, damping, density, dtype):
    inputs, weight, targets = layer(2, rows=3, columns=10, positions=positions, seed=seed)
    weight = weight.to(dtype)
    inputs, targets = inputs.to(dtype), targets.to(dtype)
    support = random_support(weight, density, seed)
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=damping)
    assert solution.weight.dtype == dtype
    assert (solution.error_after <= solution.error_before).all()
    assert (solution.weight[~support] == 0).all()
    scale = mean_error(weight * 0, inputs, targets) + mean_error(weight * support, inputs, targets * 0)
    after, before = mean_error(solution.weight, inputs, targets), mean_error(weight * support, inputs, targets)
    assert (after <= before + 1e-5 * scale).all()
    np.testing.assert_allclose(solution.error_after, after, atol=1e-5 * scale.max())


def test_moments_in_parts_give_the_weight_of_all_at_once():
    inputs, weight, targets = layer(rows=4, columns=12, positions=90, dtype=torch.float32)
    whole = solve(weight, normal_of(inputs, targets), damping=0.1)
    merged = moments(inputs[:, 50:], targets[:, 50:]).merge(moments(inputs[:, :50], targets[:, :50]))
    merged.merge(Moments(1, 12, 4, device="cpu"))
    torch.testing.assert_close(solve(weight, merged.finalize(), damping=0.1).weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    inputs, weight, targets = layer()
    normal = normal_of(inputs, targets)
    with pytest.raises(UsageError, match=r"shape \(1, 3, 4\), but the moments are of \(1, 3, 5\)"):
        solve(weight[:, :, :4], normal, damping=0.1)
    with pytest.raises(UsageError, match="finite floating-point"):
        solve(weight / 0, normal, damping=0.1)
    with pytest.raises(UsageError, match="finite floating-point"):
        solve(weight.long(), normal, damping=0.1)
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="damping is"):
            solve(weight, normal, damping=damping)
    with pytest.raises(UsageError, match="has to be bool"):
        solve(weight, normal, Freedom(support=torch.ones_like(weight)), damping=0.1)
    with pytest.raises(UsageError, match=r"shape \(1, 3, 4\)"):
        solve(weight, normal, Freedom(support=torch.ones(1, 3, 4, dtype=torch.bool)), damping=0.1)
    impossible = dataclasses.replace(normal, gram=normal.gram + 1e30 * (1 - torch.eye(5, dtype=torch.float64)))
    for support in (None, torch.ones_like(weight).tril() > 0):
        with pytest.raises(UsageError, match="no second moments"):
            solve(weight, impossible, Freedom(support=support), damping=0.1)
    normal.cross[0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"not finite .* in cross"):
        solve(weight, normal, damping=0.1)
