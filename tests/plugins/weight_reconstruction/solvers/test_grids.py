"""Weights on grids: exactly on them, no worse than plain rounding, and near the best of all combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import UsageError
from compress_weight_reconstruction.solvers import Freedom, Grid, solve
from compress_weight_reconstruction.solvers.rounders import GridRounder
from compress_weight_reconstruction.solvers.rounding import round_successively
from tests.plugins.weight_reconstruction.solvers.solver_helpers import (
    damping_of,
    layer,
    mean_error,
    normal_of,
    row_by_row,
)


def grid_for(weight, bits=3, *, by_row=True, adjustable=False, symmetric=True):
    high = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(2, keepdim=True) if by_row else weight.abs().amax().view(1, 1, 1)
    low = -high - 1 if symmetric else -1
    return Grid(largest / high, low, high, adjustable=adjustable)


def random_support(weight, density, seed=0):
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density


def obq_reference(best, hessian, step, low, high):
    """Optimal brain quantization of one row in the order of the columns, by the inverse of what is left."""
    row, left = best.copy(), list(range(len(best)))
    for column in range(len(best)):
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        rounded = np.clip(np.round(row[column] / step), low, high) * step
        error = rounded - row[column]
        row[left] += error * inverse[0] / inverse[0, 0]
        row[column] = rounded
        left.remove(column)
    return row


def brute_force(best, hessian, step, low, high):
    """The least `(w - best) H (w - best)'` over all combinations of levels."""
    levels = np.array(list(itertools.product(range(low, high + 1), repeat=len(best)))) * step
    error = levels - best
    return np.einsum("ki,ij,kj->k", error, hessian, error).min()


@pytest.mark.parametrize("columns", [1, 2, 7, 30])
def test_rounding_is_obq_in_the_reversed_order(columns, monkeypatch):
    monkeypatch.setattr("compress_weight_reconstruction.solvers.rounding._BLOCK", 4)
    inputs, weight, _ = layer(2, rows=3, columns=columns, positions=100)
    hessian = normal_of(inputs, inputs @ weight.mT).gram + 0.01 * torch.eye(columns, dtype=torch.float64)
    grid = grid_for(weight)
    rounder = GridRounder(grid, torch.ones_like(weight), None, torch.float64)
    rounded = round_successively(torch.linalg.cholesky(hessian), weight.mT.contiguous(), rounder).mT
    for g, r in itertools.product(range(2), range(3)):
        expected = obq_reference(
            weight[g, r].numpy()[::-1].copy(), hessian[g].numpy()[::-1, ::-1], float(grid.step[g, r]), -4, 3
        )
        np.testing.assert_allclose(rounded[g, r], expected[::-1], atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
def test_near_the_best_of_all_combinations(bits):
    """And in the mean over many rows far nearer to it than to plain rounding."""
    inputs, weight, targets = layer(1, rows=40, columns=5, positions=100)
    damping = 0.03
    grid = grid_for(weight, bits)
    solution = solve(weight, normal_of(inputs, targets), Freedom(grid=grid), damping=damping)
    normal = normal_of(inputs, targets)
    best = row_by_row(inputs, weight, targets, None, damping)[0]
    hessian = normal.gram[0].numpy() + np.diag(damping_of(inputs, damping)[0])
    low, high = (int(bound.flatten()[0]) for bound in grid.bounds())

    def damped(rows):
        error = rows - best
        return np.einsum("ri,ij,rj->r", error, hessian, error)

    least = np.array([brute_force(best[r], hessian, float(grid.step[0, r]), low, high) for r in range(40)])
    plain, solved = damped(grid.project(weight)[0].numpy()), damped(solution.weight[0].numpy())
    assert (solved >= least - 1e-12).all()
    assert (solved - least).sum() < 0.15 * (plain - least).sum()
    assert np.isclose(solved, least, rtol=1e-9).mean() > 0.5


GRIDS = {
    "by row": {},
    "by layer": {"by_row": False},
    "chosen by row": {"adjustable": True},
    "chosen by layer": {"by_row": False, "adjustable": True},
    "asymmetric": {"symmetric": False, "adjustable": True},
}


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    kind=st.sampled_from(sorted(GRIDS)),
    density=st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]),
    positions=st.sampled_from([1, 4, 60]),
    damping=st.sampled_from([0.0, 0.03, 1.0]),
    workspace=st.sampled_from([0, 1 << 30]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_on_the_grid_and_the_support_exactly_and_never_worse(
    seed, bits, kind, density, positions, damping, workspace, dtype
):
    inputs, weight, targets = (x.to(dtype) for x in layer(2, rows=3, columns=9, positions=positions, seed=seed))
    support = None if density is None else random_support(weight, density, seed)
    grid = grid_for(weight, bits, **GRIDS[kind])
    freedom = Freedom(support=support, grid=grid)
    solution = solve(weight, normal_of(inputs, targets), freedom, damping=damping, workspace=workspace)
    assert solution.weight.dtype == dtype and torch.isfinite(solution.weight).all()
    assert (solution.step is not None) == grid.adjustable
    chosen = grid if solution.step is None else Grid(solution.step, grid.low, grid.high)
    assert chosen.step.shape == grid.step.shape and chosen.step.dtype == grid.step.dtype
    assert torch.equal(chosen.project(solution.weight).to(dtype), solution.weight)
    if support is not None:
        assert (solution.weight[~support] == 0).all()
    before = weight if support is None else weight * support
    plain = mean_error(grid.project(before).to(dtype), inputs, targets)
    after = mean_error(solution.weight, inputs, targets)
    slack = 1e-5 * (mean_error(weight * 0, inputs, targets) + mean_error(weight, inputs, targets * 0))
    np.testing.assert_allclose(solution.error_before, plain, atol=slack.max())
    np.testing.assert_allclose(solution.error_after, after, atol=slack.max())
    if kind == "chosen by layer":
        assert solution.error_after.sum() <= solution.error_before.sum()
    else:
        assert (solution.error_after <= solution.error_before).all()


@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("kind", GRIDS)
def test_errors_of_rounding_cancel(kind, density):
    """Less is lost than by rounding the least-squares weight plainly to the same grid."""
    inputs, weight, targets = layer(1, rows=16, columns=40, positions=400, dtype=torch.float32)
    support = None if density is None else random_support(weight, density)
    grid = grid_for(weight, **GRIDS[kind])
    solution = solve(weight, normal_of(inputs, targets), Freedom(support=support, grid=grid), damping=0.03)
    best = row_by_row(inputs, weight, targets, support, 0.03)
    chosen = grid if solution.step is None else Grid(solution.step, grid.low, grid.high)
    plain = chosen.project(torch.from_numpy(best))
    least = mean_error(torch.from_numpy(best), inputs, targets).sum()
    assert float(solution.error_after.sum()) - least < 0.9 * (mean_error(plain, inputs, targets).sum() - least)
    assert solution.error_after.sum() < solution.error_before.sum()


@pytest.mark.parametrize("by_row", [True, False])
def test_a_chosen_step_is_better_than_the_largest_weights(by_row):
    inputs, weight, targets = layer(1, rows=16, columns=40, positions=400, dtype=torch.float32)
    normal = normal_of(inputs, targets)
    kept, chosen = (
        solve(weight, normal, Freedom(grid=grid_for(weight, by_row=by_row, adjustable=adjustable)), damping=0.03)
        for adjustable in (False, True)
    )
    assert chosen.error_after.sum() < 0.8 * kept.error_after.sum()


def test_sweeps_only_lower_the_error_of_rounding():
    inputs, weight, targets = layer(1, rows=32, columns=40, positions=400, dtype=torch.float32)
    normal, freedom = normal_of(inputs, targets), Freedom(grid=grid_for(weight))
    errors = [float(solve(weight, normal, freedom, damping=1e-3, sweeps=n).error_after.sum()) for n in (0, 1, 3, 10)]
    assert errors[0] > errors[1] >= errors[2] >= errors[3]


def test_sweeps_lower_the_damped_error_of_each_row():
    inputs, weight, targets = layer(1, rows=32, columns=40, positions=400, noise=20.0)
    normal, freedom = normal_of(inputs, targets), Freedom(grid=grid_for(weight))

    def damped(sweeps):
        solution = solve(weight, normal, freedom, damping=1.0, sweeps=sweeps)
        pull = (solution.weight - weight).square().numpy() * damping_of(inputs, 1.0)[:, None]
        return solution.error_after.numpy() + pull.sum(2)

    assert (damped(5) <= damped(0) * (1 + 1e-12)).all()
    assert damped(5).sum() < damped(0).sum()


def powers_of_two(weight):
    """A third party's grid: signed powers of two from 1/8 to 2, and zero."""
    exponent = torch.log2(weight.abs().clamp_min(1e-30)).round().clamp(-3, 1)
    nearest = torch.sign(weight) * torch.exp2(exponent)
    return torch.where(weight.abs() < 0.0625, torch.zeros_like(weight), nearest)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_projection_is_a_grid(by_columns, density, dtype):
    inputs, weight, targets = layer(2, rows=8, columns=20, positions=200)
    inputs, weight, targets = inputs.to(dtype), weight.to(dtype), targets.to(dtype)
    support = None if density is None else random_support(weight, density)
    freedom = Freedom(
        support=support,
        project=powers_of_two,
        round_columns=(lambda values, index: powers_of_two(values)) if by_columns else None,
    )
    solution = solve(weight, normal_of(inputs, targets), freedom, damping=0.03)
    assert torch.equal(powers_of_two(solution.weight), solution.weight)
    if support is not None:
        assert (solution.weight[~support] == 0).all()
    best = torch.from_numpy(row_by_row(inputs, weight, targets, support, 0.03))
    least, plain = mean_error(best, inputs, targets).sum(), mean_error(powers_of_two(best), inputs, targets).sum()
    assert float(solution.error_after.sum()) - least < 0.9 * (plain - least)
    assert (solution.error_after <= solution.error_before).all()


@pytest.mark.parametrize("density", [None, 0.5])
def test_a_grid_given_as_a_projection_is_the_same_grid(density):
    inputs, weight, targets = layer(2, rows=8, columns=20, positions=200)
    normal, grid = normal_of(inputs, targets), grid_for(weight)
    support = None if density is None else random_support(weight, density)
    as_grid = solve(weight, normal, Freedom(support=support, grid=grid), damping=0.03)
    as_projection = solve(weight, normal, Freedom(support=support, project=grid.project), damping=0.03)
    assert torch.equal(as_grid.weight, as_projection.weight)


@pytest.mark.parametrize("adjustable", [True, False])
@pytest.mark.parametrize("workspace", [1 << 30, 0])
def test_levels_can_differ_between_rows(adjustable, workspace):
    """As zero points by channel make them."""
    inputs, weight, targets = layer(2, rows=4, columns=20, positions=200)
    low = torch.tensor([-7, -4, -1, 0])[:, None].expand(2, 4, 1)
    grid = Grid(torch.full((2, 4, 1), 0.3), low, low + 7, adjustable)
    solution = solve(weight, normal_of(inputs, targets), Freedom(grid=grid), damping=0.03, workspace=workspace)
    levels = solution.weight / (grid.step if solution.step is None else solution.step)
    assert ((levels >= low - 1e-6) & (levels <= low + 7 + 1e-6)).all()
    np.testing.assert_allclose(levels, levels.round(), atol=1e-6)
    assert (solution.error_after < solution.error_before).all()


def test_columns_are_rounded_by_their_own_levels():
    inputs, weight, targets = layer(1, rows=4, columns=6, positions=100)
    steps = torch.tensor([0.5, 0.25, 1.0, 0.125, 0.5, 2.0], dtype=torch.float64)
    seen = []

    def round_columns(values, index):
        seen.extend(index.tolist())
        return torch.round(values / steps[index]) * steps[index]

    freedom = Freedom(project=lambda w: torch.round(w / steps) * steps, round_columns=round_columns)
    solution = solve(weight, normal_of(inputs, targets), freedom, damping=0.03)
    whole = solve(weight, normal_of(inputs, targets), Freedom(project=freedom.project), damping=0.03)
    assert set(seen) == set(range(6))
    assert torch.equal(solution.weight, whole.weight)
    assert torch.equal(freedom.project(solution.weight), solution.weight)


@settings(deadline=None)
@given(
    inputs_scale=st.sampled_from([1e-20, 1e-7, 1e3, 1e18]),
    weight_scale=st.sampled_from([1e-17, 1e-3, 1e6, 1e17]),
    adjustable=st.booleans(),
)
def test_scaled_inputs_and_weights_scale_the_solution(inputs_scale, weight_scale, adjustable):
    inputs, weight, targets = layer(1, rows=4, columns=12, positions=80)
    plain = solve(
        weight, normal_of(inputs, targets), Freedom(grid=grid_for(weight, adjustable=adjustable)), damping=0.03
    )
    scaled = solve(
        weight * weight_scale,
        normal_of(inputs * inputs_scale, targets * (inputs_scale * weight_scale)),
        Freedom(grid=grid_for(weight * weight_scale, adjustable=adjustable)),
        damping=0.03,
    )
    np.testing.assert_allclose(scaled.weight / weight_scale, plain.weight, rtol=1e-9)


# A step that is chosen for the whole layer is one for all groups.
@pytest.mark.parametrize("kind", [kind for kind in GRIDS if kind != "chosen by layer"])
@pytest.mark.parametrize("density", [None, 0.5])
def test_groups_are_solved_as_each_alone(kind, density):
    inputs, weight, targets = layer(3, rows=4, columns=12, positions=80)
    support = None if density is None else random_support(weight, density)
    grid = grid_for(weight, **GRIDS[kind])
    normal = normal_of(inputs, targets)
    together = solve(weight, normal, Freedom(support=support, grid=grid), damping=0.03)
    for g in range(3):
        part = slice(g, g + 1)
        step = grid.step if grid.step.shape[0] == 1 else grid.step[part]
        freedom = Freedom(
            support=None if support is None else support[part], grid=Grid(step, grid.low, grid.high, grid.adjustable)
        )
        alone = solve(weight[part], normal_of(inputs[part], targets[part]), freedom, damping=0.03)
        torch.testing.assert_close(together.weight[part], alone.weight, rtol=1e-9, atol=1e-12)


def all_dead(inputs, weight):
    return inputs * 0, weight


def constant(inputs, weight):
    return inputs * 0 + 3.0, weight


def half_dead(inputs, weight):
    return inputs * (torch.arange(12) % 2), weight


def equal_columns(inputs, weight):
    return inputs[:, :, :1].expand_as(inputs), weight


def zero_row(inputs, weight):
    return inputs, weight * torch.tensor([1.0, 0, 1])[:, None]


@pytest.mark.parametrize("change", [all_dead, constant, half_dead, equal_columns, zero_row])
@pytest.mark.parametrize("adjustable", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_degenerate_layers(change, adjustable, damping):
    inputs, weight, targets = layer(2, rows=3, columns=12)
    inputs, weight = change(inputs, weight)
    grid = Grid(grid_for(weight).step.clamp_min(0.1), -4, 3, adjustable)
    solution = solve(weight, normal_of(inputs, targets), Freedom(grid=grid), damping=damping)
    assert torch.isfinite(solution.weight).all() and torch.isfinite(solution.bias).all()
    assert (solution.error_after <= solution.error_before).all()


def test_weights_of_dead_inputs_are_rounded_plainly():
    inputs, weight, targets = layer(1, rows=3, columns=12)
    inputs[:, :, ::3] = 0
    grid = grid_for(weight)
    for damping in (0.0, 0.03):
        solved = solve(weight, normal_of(inputs, targets), Freedom(grid=grid), damping=damping).weight
        assert torch.equal(solved[:, :, ::3], grid.project(weight)[:, :, ::3])


def test_what_contradicts_itself_is_named():
    inputs, weight, targets = layer(1, rows=3, columns=5)
    normal = normal_of(inputs, targets)
    support = random_support(weight, 0.5)
    grid = grid_for(weight)

    def refused(match, **freedom):
        with pytest.raises(UsageError, match=match):
            solve(weight, normal, Freedom(**freedom), damping=0.03)

    refused("without zero", support=support, project=lambda w: torch.round(w) + 0.5)
    refused("either a `grid` or a `project`", grid=grid, project=torch.round)
    refused("give both", round_columns=lambda values, index: values)
    refused(r"returned \(1, 3, 4\)", project=lambda w: w[:, :, :4])
    refused("not finite", project=lambda w: w / 0)
    refused("projecting twice", project=lambda w: w * 0.5)
    refused(r"step of a grid has shape \(3, 1\)", grid=Grid(grid.step[0], -4, 3))
    refused("positive and finite; the smallest is 0.0", grid=Grid(grid.step * 0, -4, 3))
    refused("positive and finite", grid=Grid(grid.step * float("nan"), -4, 3))
    refused("`low` <= 0 to `high` >= 0", grid=Grid(grid.step, 1, 3))
    refused("`low` <= 0 to `high` >= 0", grid=Grid(grid.step, 0, 0))
