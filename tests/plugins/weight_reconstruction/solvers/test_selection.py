"""Scores against what removing and solving again really costs; selection in steps against one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import UsageError
from compress_weight_reconstruction.solvers import (
    Freedom,
    RankedLayer,
    channel_errors,
    column_importance,
    least_squares,
    scores,
    select_in_steps,
    selection,
    solve,
)
from compress_weight_reconstruction.solvers.selection import largest
from tests.plugins.weight_reconstruction.solvers.solver_helpers import layer, mean_error, normal_of


def solved_error(weight, inputs, targets, support):
    return solve(weight, normal_of(inputs, targets), Freedom(support=support), damping=0.0).error_after


@pytest.mark.parametrize("groups", [1, 2])
def test_second_order_scores_are_what_removing_an_element_costs(groups):
    inputs, weight, _ = layer(groups, rows=3, columns=6, positions=80)
    targets = inputs @ weight.mT
    found = weight.square() * column_importance(normal_of(inputs, targets), "second_order", damping=0.0)[:, None]
    for column in range(6):
        support = torch.ones_like(weight, dtype=torch.bool)
        support[:, :, column] = False
        expected = solved_error(weight, inputs, targets, support)
        np.testing.assert_allclose(found[:, :, column], expected, rtol=1e-7)


def test_activation_scores_are_the_error_if_all_others_stay():
    inputs, weight, _ = layer(2, rows=3, columns=6, positions=80)
    targets = inputs @ weight.mT
    found = weight.square() * column_importance(normal_of(inputs, targets), "activation", damping=0.1)[:, None]
    for column in range(6):
        without = weight.clone()
        without[:, :, column] = 0
        np.testing.assert_allclose(found[:, :, column], mean_error(without, inputs, targets), rtol=1e-9)


def test_importance_of_wide_layers_is_computed_in_pieces(monkeypatch):
    inputs, _, targets = layer(2, rows=3, columns=20, positions=80)
    normal = normal_of(inputs, targets)
    whole = column_importance(normal, "second_order", damping=0.1)
    monkeypatch.setattr(scores, "_COLUMNS", 7)
    torch.testing.assert_close(column_importance(normal, "second_order", damping=0.1), whole, rtol=1e-12, atol=0)


CHANNELS = {
    "of two": torch.arange(12) // 2,
    "of four": torch.arange(12) // 4,
    "interleaved": torch.arange(12) % 3,
    "unequal": torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4]),
    "with a gap": torch.tensor([0, 0, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("pieces", [512, 5])
def test_channel_errors_are_what_removing_a_channel_costs(kind, refit, pieces, monkeypatch):
    monkeypatch.setattr(scores, "_COLUMNS", pieces)
    inputs, weight, targets = layer(2, rows=3, columns=12, positions=100)
    channels = CHANNELS[kind]
    row_weights = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 1.0]], dtype=torch.float64)
    found = channel_errors(
        weight, normal_of(inputs, targets), channels, damping=0.0, refit=refit, row_weights=row_weights
    )
    assert found.shape == (2, int(channels.max()) + 1)
    everything = torch.ones_like(weight, dtype=torch.bool)
    for channel in range(found.shape[1]):
        support = everything & (channels != channel)
        if refit:
            rise = solved_error(weight, inputs, targets, support) - solved_error(weight, inputs, targets, everything)
        else:
            rise = torch.from_numpy(mean_error(weight * support, inputs, targets) - mean_error(weight, inputs, targets))
        np.testing.assert_allclose(found[:, channel], (rise * row_weights).sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_dead_inputs_matter_nothing_and_degenerate_ones_are_finite(dtype, damping):
    inputs, weight, targets = (x.to(dtype) for x in layer(1, rows=3, columns=12, positions=5))
    inputs[:, :, 4:6] = 0
    normal = normal_of(inputs, targets)
    for refit in (True, False):
        errors = channel_errors(weight, normal, torch.arange(12) // 2, damping=damping, refit=refit)
        assert torch.isfinite(errors).all() and errors[0, 2] == 0
    for score in ("activation", "second_order"):
        importance = column_importance(normal, score, damping=damping)
        assert torch.isfinite(importance).all() and (importance[0, 4:6] == 0).all() and (importance >= 0).all()


def test_magnitude_in_one_step_is_plain_magnitude():
    inputs, weight, targets = layer(1, rows=8, columns=20, positions=100)
    (support,) = select_in_steps([RankedLayer(weight, normal_of(inputs, targets))], 0.25, 1, damping=0.1)
    threshold = weight.abs().flatten().sort(descending=True).values[39]
    assert torch.equal(support, weight.abs() >= threshold)


def correlated(seed):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 600, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    inputs = (common @ mix + 0.5 * torch.randn(1, 600, 24, generator=generator, dtype=torch.float64)).relu()
    weight = torch.randn(1, 16, 24, generator=generator, dtype=torch.float64)
    return inputs, weight, inputs @ weight.mT


def test_more_steps_lose_less():
    totals = dict.fromkeys((1, 2, 8), 0.0)
    for seed in range(5):
        inputs, weight, targets = correlated(seed)
        normal = normal_of(inputs, targets)
        for steps in totals:
            (support,) = select_in_steps([RankedLayer(weight, normal)], 0.25, steps, damping=0.01)
            assert int(support.sum()) == round(0.25 * weight.numel())
            totals[steps] += float(solve(weight, normal, Freedom(support=support), damping=0.01).error_after.sum())
    assert totals[8] < 0.8 * totals[1]
    assert totals[8] < totals[2] < totals[1]


def test_scores_that_see_the_inputs_lose_less_in_one_step():
    totals = dict.fromkeys(("magnitude", "activation", "second_order"), 0.0)
    for seed in range(5):
        inputs, weight, targets = correlated(seed)
        inputs = inputs * torch.logspace(-1, 1, 24, dtype=torch.float64)
        targets = inputs @ weight.mT
        normal = normal_of(inputs, targets)
        for score in totals:
            (support,) = select_in_steps([RankedLayer(weight, normal)], 0.25, 1, damping=0.01, score=score)
            totals[score] += float(solve(weight, normal, Freedom(support=support), damping=0.01).error_after.sum())
    assert totals["second_order"] < totals["activation"] < totals["magnitude"]


def test_layers_share_the_density_and_each_keeps_one():
    inputs, weight, targets = layer(1, rows=8, columns=20, positions=100)
    normal = normal_of(inputs, targets)
    tiny = RankedLayer(weight * 1e-6, normal_of(inputs, targets * 1e-6))
    supports = select_in_steps([RankedLayer(weight, normal), tiny], 0.2, 4, damping=0.1)
    assert [int(support.sum()) for support in supports] == [63, 1]
    alike = select_in_steps(
        [RankedLayer(weight, normal), RankedLayer(weight * 1e-6, normal, 1e-6)], 0.2, 1, damping=0.1
    )
    assert torch.equal(alike[0], alike[1])


def test_only_elements_of_the_support_are_kept():
    inputs, weight, targets = layer(1, rows=8, columns=20, positions=100)
    allowed = torch.arange(20).remainder(4).lt(2).expand_as(weight)
    ranked = RankedLayer(weight, normal_of(inputs, targets), support=allowed)
    nothing = RankedLayer(weight, ranked.normal, support=torch.zeros_like(allowed))
    support, none = select_in_steps([ranked, nothing], 0.1, 3, damping=0.1)
    assert int(support.sum()) == 32 and not bool((support & ~allowed).any()) and not bool(none.any())
    kept = select_in_steps([ranked], 0.9, 3, damping=0.1)
    assert torch.equal(kept[0], allowed)


@settings(deadline=None)
@given(
    values=st.lists(
        st.lists(st.sampled_from([0.0, 1e-38, 0.5, 0.5, 1.0, 2.0, 3e38]), min_size=1, max_size=9),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
def test_the_largest_are_exactly_so_many(values, data):
    tensors = [torch.tensor(x) for x in values]
    positive = sum(int((x > 0).sum()) for x in tensors)
    forced = sum(bool((x > 0).any()) for x in tensors)
    number = data.draw(st.integers(forced, positive)) if positive else 0
    masks = largest([x.clone() for x in tensors], number)
    if not positive:
        return
    assert sum(int(mask.sum()) for mask in masks) == number
    kept = [float(v) for x, mask in zip(tensors, masks, strict=True) for v in x[mask]]
    gone = [float(v) for x, mask in zip(tensors, masks, strict=True) for v in x[~mask]]
    best_of_each = [float(x.max()) for x in tensors]
    assert all(mask.any() for x, mask in zip(tensors, masks, strict=True) if x.max() > 0)
    rest = sorted(kept)
    for best in best_of_each:
        if best in rest:
            rest.remove(best)
    assert not rest or not gone or min(rest) >= max(gone)


def test_what_does_not_fit_is_named():
    inputs, weight, targets = layer()
    normal = normal_of(inputs, targets)
    ranked = [RankedLayer(weight, normal)]
    for density in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(UsageError, match="density is"):
            select_in_steps(ranked, density, 1, damping=0.1)
    with pytest.raises(UsageError, match="steps is 0"):
        select_in_steps(ranked, 0.5, 0, damping=0.1)
    with pytest.raises(UsageError, match="scale of layer 0 is 0"):
        select_in_steps([RankedLayer(weight, normal, 0.0)], 0.5, 1, damping=0.1)
    with pytest.raises(UsageError, match=r"weight of layer 1, .* finite"):
        select_in_steps([*ranked, RankedLayer(weight / 0, normal)], 0.5, 1, damping=0.1)
    with pytest.raises(UsageError, match="has to be bool"):
        select_in_steps([RankedLayer(weight, normal, support=torch.ones_like(weight))], 0.5, 1, damping=0.1)
    with pytest.raises(UsageError, match="'magnitude', 'activation', 'second_order'"):
        column_importance(normal, "taylor", damping=0.1)
    with pytest.raises(UsageError, match="each column needs one int64"):
        channel_errors(weight, normal, torch.zeros(4, dtype=torch.int64), damping=0.1)
    with pytest.raises(UsageError, match=r"weight has shape \(1, 3, 4\)"):
        channel_errors(weight[:, :, :4], normal, torch.zeros(4, dtype=torch.int64), damping=0.1)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_few_products_that_begin_where_the_last_have_ended_select_what_exact_solutions_do(monkeypatch, density):
    inputs, weight, targets = layer(2, rows=16, columns=60, positions=400)
    normal = normal_of(inputs, targets)
    exact = select_in_steps([RankedLayer(weight, normal)], density, 8, damping=0.1)[0]
    # Layers as small as this are otherwise factorized in any case.
    monkeypatch.setattr(least_squares, "_QUICK", 0.0)
    found = select_in_steps([RankedLayer(weight, normal)], density, 8, damping=0.1)[0]
    assert found.sum() == exact.sum()
    assert (found & exact).sum() > 0.97 * exact.sum()
    errors = [solved_error(weight, inputs, targets, support).sum() for support in (found, exact)]
    assert errors[0] < 1.01 * errors[1]


def test_the_damping_of_each_step_pulls_towards_the_weight_before_compression():
    inputs, weight, targets = layer(rows=3, columns=8, positions=80)
    normal = normal_of(inputs, targets)
    support = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    elsewhere = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
    found = selection._refitted(RankedLayer(weight, normal), elsewhere, support, 0.5, 1 << 30)
    expected = solve(weight, normal, Freedom(support=support), damping=0.5).weight
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 99])
def test_the_unit_of_float32_inputs_does_not_change_what_is_kept(exponent):
    inputs, weight, _ = layer(2, rows=8, columns=20, positions=200)
    inputs, weight = inputs.float(), weight.float()
    expected = select_in_steps([RankedLayer(weight, normal_of(inputs, inputs @ weight.mT))], 0.3, 8, damping=0.1)[0]
    inputs = inputs * 2.0**exponent
    found = select_in_steps([RankedLayer(weight, normal_of(inputs, inputs @ weight.mT))], 0.3, 8, damping=0.1)[0]
    assert torch.equal(found, expected)
