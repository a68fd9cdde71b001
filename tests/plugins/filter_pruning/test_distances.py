"""Sums of distances against the differences themselves, in float64; importances that are kept while values stay."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_core.transforms import raw_parameter
from compress_filter_pruning import cached, distances
from compress_filter_pruning.cached import Importances
from compress_filter_pruning.distances import sums_of_distances
from tests.plugins.filter_pruning.pruning_helpers import Chain, gone, pruned, seen


def direct(filters):
    wide = filters.double()
    return torch.stack([(row - wide).square().sum(1).sqrt().sum() for row in wide])


def filters(count, elements, seed=0, dtype=torch.float32):
    return torch.randn(count, elements, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def agree(found, values):
    expected = direct(values)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (3, 0), (300, 27), (64, 700)])
def test_as_from_the_differences(shape, dtype):
    values = filters(*shape).to(dtype)
    found = sums_of_distances(values)
    assert found.dtype == torch.float64
    agree(found, values)
    assert found.argsort(stable=True).tolist() == direct(values).argsort(stable=True).tolist()


@pytest.mark.parametrize("relative", [1e-15, 1e-12, 1e-8, 1e-5, 1e-3, 3e-3, 0.1])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("clusters", [1, 2, 30])
def test_filters_that_are_nearly_the_same(relative, offset, clusters):
    middles = filters(clusters, 90, dtype=torch.float64).repeat(60 // clusters, 1) + offset
    values = middles + relative * filters(60, 90, 1, torch.float64)
    agree(sums_of_distances(values), values)


def test_products_alone_would_lose_these_distances():
    values = filters(1, 90, dtype=torch.float64).repeat(8, 1) + 1e-12 * filters(8, 90, 1, torch.float64)
    values[0] *= -1  # the mean is far from all filters
    squares = values.square().sum(1)
    lost = (squares[:, None] + squares - 2 * values @ values.T).clamp(min=0).sqrt()[1:, 1:].sum(1)
    kept = sums_of_distances(values)[1:] - sums_of_distances(values)[1:].min()
    wanted = direct(values)[1:] - direct(values)[1:].min()
    assert (lost - direct(values[1:])).abs().max() > 1e-9
    assert (kept - wanted).abs().max() < 1e-13


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e150, 1e300])
def test_values_of_any_magnitude(scale):
    values = filters(20, 9, dtype=torch.float64)
    expected = direct(values) * scale
    torch.testing.assert_close(sums_of_distances(values * scale), expected, rtol=1e-9, atol=0)
    agree(sums_of_distances((values * 1e-45).float()), (values * 1e-45).float())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.integers(1, 64))
def test_blocks_and_copies_change_nothing(count, elements, seed, at_once):
    values = filters(count, elements, seed)[torch.arange(3 * count) % count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_VALUES", at_once)
        found = sums_of_distances(values)
    agree(found, values)
    # Equal filters are equally important, to the bit: then the first ones go.
    assert torch.equal(found[:count], found[count : 2 * count])
    assert torch.equal(found[:count], found[2 * count :])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_that(value):
    values = filters(4, 3)
    values[1, 1] = value
    assert bool(sums_of_distances(values).isnan().all())


class Counted:
    """Counts how often distances are computed."""

    def __init__(self, patch):
        self.calls = 0
        self._compute = cached.filter_importance
        patch.setattr(cached, "filter_importance", self)

    def __call__(self, *args):
        self.calls += 1
        return self._compute(*args)


def test_nothing_is_computed_again_that_has_not_changed(monkeypatch):
    counted = Counted(monkeypatch)
    plain = seen(Chain())
    controller, model = pruned(copy.deepcopy(plain), 0.0, filter_importance="geometric_median", all_weights=True)
    controller.set_pruning_level(0.3)
    assert counted.calls == 3
    controller.set_pruning_level(0.5)
    controller.compression_stage()
    assert counted.calls == 3
    with torch.no_grad():
        raw_parameter(model, "conv2.weight").data[3] += 1  # the version of the parameter stays
    controller.set_pruning_level(0.5)
    assert counted.calls == 4
    copy.deepcopy(controller).set_pruning_level(0.5)
    assert counted.calls == 4
    with torch.no_grad():
        plain.conv2.weight[3] += 1
    again, _ = pruned(plain, 0.5, filter_importance="geometric_median", all_weights=True)
    assert gone(controller) == gone(again)


@pytest.mark.parametrize("change", ["swap", "dtype", "dim", "one bit", "name"])
def test_every_change_counts(change):
    weight = nn.Parameter(filters(4, 4))
    importances = Importances("geometric_median")
    first = importances.of("a", weight, 0)
    other, dim, name = weight.detach().clone(), 0, "a"
    if change == "swap":
        other[[0, 1]] = other[[1, 0]]
    elif change == "dtype":
        other = other.half()
    elif change == "dim":
        dim = 1
    elif change == "name":
        name = "b"
    else:
        other.view(torch.int32)[2, 2] ^= 1 << 22
    found = importances.of(name, other, dim)
    torch.testing.assert_close(found, direct(other if dim == 0 else other.T), rtol=1e-9, atol=0)
    assert (found is first) is False
    assert importances.of(name, other, dim) is found
