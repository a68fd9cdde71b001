"""Moments equal those of all positions at once, however these are split, merged, shifted and scaled."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import DataError, UsageError
from compress_weight_reconstruction.solvers import Moments
from tests.plugins.weight_reconstruction.solvers.solver_helpers import layer, moments, normal_of


def expected(inputs, targets, centred=True):
    u, t = inputs.double().numpy(), targets.double().numpy()
    means = u.mean(1), t.mean(1)
    if centred:
        u, t = u - means[0][:, None], t - means[1][:, None]
    n = u.shape[1]
    return means, np.einsum("gni,gnj->gij", u, u) / n, np.einsum("gni,gnj->gij", t, u) / n, (t**2).mean(1)


def float32_bound(positions):
    """Two deviations of the rounding errors of a sum of so many float32 products, in whatever order a machine adds."""
    return 2 * 2**-24 * positions**0.5


def assert_normal(normal, inputs, targets, rtol):
    """Relative to what the powers of rows and columns allow."""
    means, gram, cross, power = expected(inputs, targets, normal.centred)
    u = np.sqrt(np.einsum("gii->gi", gram))
    t = np.sqrt(power)
    assert normal.count == inputs.shape[1]
    np.testing.assert_allclose(normal.input_mean, means[0], rtol=1e-12, atol=1e-12 * abs(means[0]).max())
    np.testing.assert_allclose(normal.target_mean, means[1], rtol=1e-12, atol=1e-12 * abs(means[1]).max())
    assert (abs(normal.gram.double().numpy() - gram) <= rtol * u[:, :, None] * u[:, None]).all()
    assert (abs(normal.cross.double().numpy() - cross) <= rtol * t[:, :, None] * u[:, None]).all()
    np.testing.assert_allclose(normal.target_power, power, rtol=max(rtol, 1e-12))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_moments_are_those_of_all_positions(centred, dtype, rtol):
    inputs, _, targets = layer(groups=2, positions=500, dtype=dtype)
    assert_normal(normal_of(inputs, targets, parts=7, centred=centred), inputs, targets, rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    inputs, _, targets = (x.to(dtype) for x in layer(positions=3000))
    assert_normal(normal_of(inputs, targets, parts=3), inputs, targets, 1e-6)


def test_inside_autocast_and_with_fast_matrix_products_the_sums_are_exact():
    inputs, _, targets = layer(columns=100, positions=500, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            normal = normal_of(inputs, targets)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert normal.gram.dtype == torch.float32
    assert_normal(normal, inputs, targets, float32_bound(500))


def test_wide_layers_are_summed_in_blocks_and_are_symmetric():
    inputs, _, targets = layer(columns=1100, positions=40, dtype=torch.float32)
    normal = normal_of(inputs, targets, parts=3)
    assert_normal(normal, inputs, targets, 2e-6)
    assert torch.equal(normal.gram, normal.gram.mT)
    other = moments(inputs[:, 10:], targets[:, 10:]).merge(moments(inputs[:, :10], targets[:, :10])).finalize()
    assert_normal(other, inputs, targets, 2e-6)


def test_many_positions_are_added_in_pieces(monkeypatch):
    monkeypatch.setattr("compress_weight_reconstruction.solvers.moments._PIECE", 5 * 16)
    inputs, _, targets = layer(positions=101)
    assert_normal(normal_of(inputs, targets), inputs, targets, 1e-13)


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("parts", [1, 9])
@pytest.mark.parametrize("columns", [5, 100])
def test_a_mean_far_from_zero_costs_no_precision(offset, parts, columns):
    inputs, _, targets = layer(columns=columns, positions=450, dtype=torch.float32)
    inputs, targets = inputs + offset, targets / 20 - offset
    assert_normal(normal_of(inputs, targets, parts=parts), inputs, targets, float32_bound(450))


def test_a_mean_that_drifts_by_many_deviations_costs_no_precision():
    inputs, _, targets = layer(positions=400, dtype=torch.float32)
    inputs = inputs + torch.arange(4.0).repeat_interleave(100)[None, :, None] * 1e3
    assert_normal(normal_of(inputs, targets, parts=4), inputs, targets, 1e-6)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_float32_inputs_of_any_magnitude(scale, centred):
    inputs, _, targets = layer(positions=200, dtype=torch.float32)
    normal = normal_of(inputs * scale, targets / scale, parts=3, centred=centred)
    assert_normal(normal, inputs * scale, targets / scale, 1e-6)


def test_columns_of_different_magnitudes_in_one_layer():
    inputs, _, targets = layer(positions=200, dtype=torch.float32)
    inputs = inputs * torch.tensor([1e-20, 1e-10, 1.0, 1e10, 1e18])
    assert_normal(normal_of(inputs, targets, parts=3), inputs, targets, 1e-6)


def test_a_column_that_varies_late_and_much():
    inputs, _, targets = layer(positions=300, dtype=torch.float32)
    inputs[:, :100, 0] = 0.0
    inputs[:, 200:, 1] *= 1e19
    assert_normal(normal_of(inputs, targets, parts=3), inputs, targets, 1e-6)


def test_single_positions_can_be_added_one_by_one():
    inputs, _, targets = layer(positions=50, dtype=torch.float32)
    assert_normal(normal_of(inputs, targets, parts=50), inputs, targets, 1e-6)


def test_constant_inputs_have_no_power():
    normal = normal_of(torch.full((1, 30, 2), 0.1), torch.full((1, 30, 1), 7.7), parts=3)
    assert float(normal.gram.abs().max()) <= 1e-14 and float(normal.target_power) <= 1e-12
    assert normal.input_mean[0].tolist() == pytest.approx([0.1, 0.1])


def split_at(total, cuts):
    edges = [0, *sorted(cuts), total]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), min_size=2, max_size=2),
    order=st.permutations(range(3)),
    scales=st.lists(st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]), min_size=3, max_size=3),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    centred=st.booleans(),
)
def test_merging_is_associative_and_commutative_and_equals_one_update(cuts, order, scales, offset, centred):
    inputs, _, targets = layer(columns=3, rows=2, positions=60, dtype=torch.float32)
    inputs, targets = inputs * torch.tensor(scales) + offset, targets * scales[0]
    parts = [moments(inputs[:, part], targets[:, part], centred=centred) for part in split_at(60, cuts)]
    a, b, c = (parts[i] for i in order)
    left = copy.deepcopy(a).merge(b).merge(c)
    right = copy.deepcopy(a).merge(copy.deepcopy(b).merge(c))
    for merged in (left, right):
        assert_normal(merged.finalize(), inputs, targets, 1e-6)


def test_empty_moments_are_neutral_and_merging_leaves_the_other_alone():
    inputs, _, targets = layer()
    full = moments(inputs, targets)
    before = full.finalize()
    empty = Moments(1, 5, 3, device="cpu")
    empty.update(inputs[:, :0], targets[:, :0])
    assert_normal(copy.deepcopy(full).merge(empty).finalize(), inputs, targets, 1e-13)
    merged = empty.merge(full)
    assert merged is empty
    merged.update(inputs, targets)
    assert torch.equal(full.finalize().gram, before.gram) and full.count == 60
    with pytest.raises(DataError, match="seen no position"):
        Moments(1, 5, 3, device="cpu").finalize()


def test_a_normal_does_not_change_with_later_updates():
    inputs, _, targets = layer()
    running = moments(inputs, targets)
    normal = running.finalize()
    running.update(inputs * 3, targets)
    assert_normal(normal, inputs, targets, 1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value, side):
    inputs, _, targets = layer()
    running = moments(inputs, targets)
    bad = [inputs.clone(), targets.clone()]
    bad[side][0, 7, 2] = value
    with pytest.raises(DataError, match=r"(inputs|targets) of this layer are not finite .* column 2 of group 0"):
        running.update(*bad)
    assert_normal(running.finalize(), inputs, targets, 1e-13)


def test_values_beyond_the_number_format_are_refused_and_change_nothing():
    inputs, _, targets = layer(columns=70, dtype=torch.float32)
    running = moments(inputs, targets)
    bad = inputs.clone()
    bad[0, :, 0] = -3.3e38
    bad[0, :2, 0] = 3.3e38
    with pytest.raises(DataError, match=r"largest number of torch\.float32"):
        running.update(bad, targets)
    assert_normal(running.finalize(), inputs, targets, 1e-6)
    # Narrow layers are summed in float64.
    assert_normal(normal_of(bad[:, :, :5], targets), bad[:, :, :5], targets, 1e-6)
    with pytest.raises(DataError, match="squares are not finite"):
        normal_of(inputs.double() * 1e200, targets)


def test_shapes_that_do_not_fit_are_named():
    inputs, _, targets = layer()
    running = moments(inputs, targets)
    with pytest.raises(UsageError, match=r"inputs have shape \(1, 60, 4\), expected \(1, positions, 5\)"):
        running.update(inputs[:, :, :4], targets)
    with pytest.raises(UsageError, match=r"targets have shape \(60, 3\)"):
        running.update(inputs, targets[0])
    with pytest.raises(UsageError, match="60 positions of inputs and 59 of targets"):
        running.update(inputs, targets[:, :59])
    with pytest.raises(UsageError, match=r"torch\.int64"):
        running.update(inputs.long(), targets)
    with pytest.raises(UsageError, match="cannot be merged"):
        running.merge(Moments(1, 5, 2, device="cpu"))
    with pytest.raises(UsageError, match="cannot be merged"):
        running.merge(Moments(1, 5, 3, device="cpu", centred=False))
    with pytest.raises(UsageError, match="at least one"):
        Moments(1, 0, 3, device="cpu")


def test_the_caller_keeps_its_tensors():
    inputs, _, targets = layer(dtype=torch.float32)
    copies = inputs.clone(), targets.clone()
    normal_of(inputs, targets)
    assert torch.equal(inputs, copies[0]) and torch.equal(targets, copies[1])


def test_moments_of_inference_mode_can_be_used_outside_and_without_gradients():
    inputs, _, targets = layer(positions=60)
    with torch.inference_mode():
        inside = moments(inputs[:, :20] + 0.0, targets[:, :20] + 0.0)
    inside.update(inputs[:, 20:40].requires_grad_(), targets[:, 20:40])
    other = moments(inputs[:, 40:], targets[:, 40:])
    with torch.inference_mode():
        inside.merge(other)
        normal = inside.finalize()
    inside.update(inputs[:, :0], targets[:, :0])
    assert not normal.gram.requires_grad and not normal.gram.is_inference()
    assert_normal(normal, inputs.detach(), targets, 1e-13)


def test_moments_can_be_sent_to_another_process():
    inputs, _, targets = layer(positions=60)
    sent = pickle.loads(pickle.dumps(moments(inputs[:, 20:], targets[:, 20:])))
    assert_normal(moments(inputs[:, :20], targets[:, :20]).merge(sent).finalize(), inputs, targets, 1e-13)
