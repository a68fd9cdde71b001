"""Range statistics against NumPy in float64 over everything at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import DataError, ModelError
from compress_quantization.config import RangeConfig, RangeParams
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.ranges import QuantileSketch, collector_for

TYPES = ["min_max", "mixed_min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"]
LOW, HIGH = 2.5, 97.0
EPS = np.finfo(np.float32).eps


def collector(kind, mode="symmetric", *, per_channel=False, is_weight=False, name="layer.relu", channel_dim=1):
    params = RangeParams(min_percentile=LOW, max_percentile=HIGH)
    spec = QuantizerSpec(mode=mode, per_channel=per_channel)
    config = RangeConfig(type=kind, params=params)
    channel_dim = channel_dim if per_channel else None
    return collector_for(config, spec, is_weight=is_weight, name=name, channel_dim=channel_dim)


def collected(statistics, batches):
    for batch in batches:
        statistics.update(batch)
    return [bound.double().numpy() for bound in statistics.finalize()]


def by_channel(x, channel):
    return np.moveaxis(x, channel, 0).reshape(x.shape[channel], -1) if channel is not None else x.reshape(1, -1)


def three_sigma(rows):
    bounds = []
    for row in rows:
        present = row[np.abs(row) >= EPS]
        median = np.median(present) if present.size else 0.0
        spread = 3 * 1.4826230 * np.median(np.abs(row - median))
        bounds.append((median - spread, median + spread))
    return np.array(bounds).T


def expected(kind, mode, batches, channel, is_weight):
    """The definitions, on everything at once and in float64."""
    batches = [batch.double().numpy() for batch in batches]
    rows = [by_channel(batch, channel) for batch in batches]
    pooled = np.concatenate(rows, axis=1)
    upper = np.abs if mode == "symmetric" else lambda x: x
    extremes = pooled.min(1), upper(pooled).max(1)
    if kind == "threesigma":
        return three_sigma(pooled)
    if kind == "percentile":
        return np.percentile(pooled, [LOW, HIGH], axis=1)
    if kind == "mean_percentile":
        return np.mean([np.percentile(r, [LOW, HIGH], axis=1) for r in rows], axis=0)
    if kind == "mean_min_max":
        return np.mean([(r.min(1), upper(r).max(1)) for r in rows], axis=0)
    if kind == "min_max" or is_weight or channel is not None:
        return extremes
    samples = [sample for batch in batches for sample in batch]
    low = np.mean([s.min() for s in samples]) if mode == "asymmetric" else extremes[0][0]
    return [low], [np.mean([upper(s).max() for s in samples])]


def activations(sizes=(4, 3, 5), shape=(3, 4, 2), shift=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) * 2 + shift for size in sizes]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("channel", [None, 1])
@pytest.mark.parametrize("rectified", [False, True])
def test_activations(kind, mode, channel, rectified):
    batches = [batch.relu() if rectified else batch for batch in activations(shift=-0.5)]
    found = collected(collector(kind, mode, per_channel=channel is not None), batches)
    wanted = expected(kind, mode, batches, channel, False)
    for bound, truth in zip(found, wanted, strict=True):
        assert bound.shape == (() if channel is None else (3,))
        np.testing.assert_allclose(np.atleast_1d(bound), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("channel", [None, 0, 1])
def test_weights(kind, mode, channel):
    (weight,) = activations((6,), (5, 3, 3), shift=0.1)
    more = {} if channel is None else {"per_channel": True, "channel_dim": channel}
    found = collected(collector(kind, mode, is_weight=True, **more), [weight])
    for bound, truth in zip(found, expected(kind, mode, [weight], channel, True), strict=True):
        np.testing.assert_allclose(np.atleast_1d(bound), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["min_max", "mixed_min_max", "mean_min_max"])
def test_extremes_of_symmetric_ranges_are_those_of_the_absolute_value(kind):
    low, high = collected(collector(kind), [torch.tensor([[-5.0, 1.0], [-5.0, 2.0]])])
    assert (float(low), float(high)) == (-5.0, 5.0)


def test_a_range_of_rectified_values_is_not_empty_though_most_are_zero():
    values = torch.cat([torch.zeros(70), torch.linspace(1, 2, 30)])
    low, high = collected(collector("threesigma"), [values])
    # Median 1.5 of what is not zero; half of all values are at most 1.5 from it, as all zeros are.
    assert (low, high) == pytest.approx((1.5 - 3 * 1.4826230 * 1.5, 1.5 + 3 * 1.4826230 * 1.5))
    assert collected(collector("threesigma"), [torch.zeros(9)]) == [0.0, 0.0]


# Merging.

# Statistics of all values or all samples do not depend on where batches begin; means over batches depend on it.
POOLED = ["min_max", "mixed_min_max", "threesigma", "percentile"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_into_batches_and_processes_is_one_pass(data):
    kind = data.draw(st.sampled_from(TYPES))
    mode = data.draw(st.sampled_from(["symmetric", "asymmetric"]))
    channel = data.draw(st.sampled_from([None, 1]))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
    ranks = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    batches = activations(sizes, seed=data.draw(st.integers(0, 10**6)))
    parts = [collector(kind, mode, per_channel=channel is not None) for _ in range(3)]
    for rank, batch in zip(ranks, batches, strict=True):
        parts[rank].update(batch)
    whole = parts[0].empty()
    for part in data.draw(st.permutations(parts)):
        whole.merge(part)
    single = collected(collector(kind, mode, per_channel=channel is not None), batches)
    for bound, truth in zip(whole.finalize(), single, strict=True):
        np.testing.assert_allclose(bound.double().numpy(), truth, rtol=1e-6, atol=1e-7)
    if kind in POOLED:
        at_once = collected(collector(kind, mode, per_channel=channel is not None), [torch.cat(batches)])
        np.testing.assert_allclose(single, at_once, rtol=1e-6, atol=1e-7)


def test_merging_leaves_the_other_as_it_is_and_shares_nothing_with_it():
    for kind in TYPES:
        first, second = activations((4, 3))
        part = collector(kind)
        part.update(first)
        before = part.finalize()
        whole = part.empty()
        whole.merge(part)
        whole.update(second * 10)
        assert all(torch.equal(now, then) for now, then in zip(part.finalize(), before, strict=True))
        assert not torch.equal(whole.finalize().max, before.max)


def test_a_model_that_writes_to_a_tensor_later_changes_nothing():
    for kind in TYPES:
        for shape, channel in (((4, 3), 1), ((1, 3), 1), ((1, 1), 1), ((3,), 0)):
            x = torch.rand(shape)
            statistics = collector(kind, "asymmetric", per_channel=True, channel_dim=channel)
            statistics.update(x)
            before = [bound.clone() for bound in statistics.finalize()]
            x.fill_(7)
            assert all(torch.equal(now, then) for now, then in zip(statistics.finalize(), before, strict=True))


# Quantiles of more than is kept.


def true_share(values, quantile):
    """Shares of the values that are below a quantile and at most it."""
    return np.mean(values < quantile), np.mean(values <= quantile)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30),
    budget=st.sampled_from([16, 50, 128, 1000]),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(["normal", "sorted", "few values"]),
    split=st.integers(0, 30),
)
def test_quantiles_are_within_the_stated_error_however_data_come(sizes, budget, seed, shape, split):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(sum(sizes))
    values = {"normal": values, "sorted": np.sort(values), "few values": np.round(values)}[shape]
    chunks = np.split(values, np.cumsum(sizes)[:-1])
    sketch, second = QuantileSketch(budget=budget), QuantileSketch(budget=budget)
    for index, chunk in enumerate(chunks):
        (sketch if index < split else second).update(torch.from_numpy(chunk)[None])
        assert max(sketch.kept, second.kept) <= budget
    sketch.merge(second)
    assert sketch.kept <= budget
    assert sketch.count == len(values)
    assert int(sketch.weighted()[1].sum()) == len(values)
    if len(values) <= budget:
        assert sketch.rank_error == 0
    shares = (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)
    # One value more, because a quantile that lies between two values is interpolated.
    slack = sketch.rank_error + 1 / len(values)
    for share, quantile in zip(shares, sketch.quantiles(shares)[:, 0].tolist(), strict=True):
        below, up_to = true_share(values, quantile)
        assert below - slack <= share <= up_to + slack


def test_rows_of_a_sketch_do_not_mix():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((3, 5000)) * [[1], [10], [100]]
    sketch = QuantileSketch(rows=3, budget=600)
    for part in np.split(rows, 10, axis=1):
        sketch.update(torch.from_numpy(part))
    assert sketch.kept <= 600
    for row, quantile in zip(rows, sketch.quantiles((0.25,))[0].tolist(), strict=True):
        below, up_to = true_share(row, quantile)
        assert below - sketch.rank_error <= 0.25 <= up_to + sketch.rank_error


def test_rows_that_outnumber_the_budget_still_work():
    sketch = QuantileSketch(rows=100, budget=10)
    for value in range(9):
        sketch.update(torch.full((100, 1), float(value)))
    assert sketch.kept <= 400
    assert sketch.quantiles((0.5,)).shape == (1, 100)


def test_memory_is_bounded_and_large_data_are_exact_to_a_part_in_ten_thousand():
    statistics = collector("percentile")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 500_000, generator=generator) for _ in range(3)]
    low, high = collected(statistics, batches)
    assert statistics._sketch.kept <= 2**20
    assert 0 < statistics.rank_error < 1e-4
    values = torch.cat(batches).numpy().ravel()
    for quantile, percentile in ((low, LOW), (high, HIGH)):
        below, up_to = true_share(values, quantile)
        assert below - statistics.rank_error <= percentile / 100 <= up_to + statistics.rank_error


def test_weights_are_exact_however_large():
    weight = torch.randn(3, 500_000, generator=torch.Generator().manual_seed(0))
    statistics = collector("percentile", is_weight=True, per_channel=True, channel_dim=0)
    found = collected(statistics, [weight])
    assert statistics.rank_error == 0
    np.testing.assert_allclose(found, np.percentile(weight.double().numpy(), [LOW, HIGH], axis=1), rtol=1e-6)


# What comes in.


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(kind, dtype):
    batches = [batch.to(dtype) for batch in activations()]
    statistics = collector(kind)
    found = collected(statistics, batches)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert [bound.dtype for bound in statistics.finalize()] == [wanted, wanted]
    for bound, truth in zip(found, expected(kind, "symmetric", batches, None, False), strict=True):
        np.testing.assert_allclose(np.atleast_1d(bound), truth, rtol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3, 4, 5, 2)])
def test_shapes(kind, shape):
    x = torch.full(shape, 2.5)
    low, high = collected(collector(kind), [x])
    assert float(high) == pytest.approx(2.5)
    assert float(low) == pytest.approx(2.5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_change_nothing(kind, bad):
    statistics = collector(kind, per_channel=True)
    good, spoilt = activations((4, 4))
    statistics.update(good)
    before = statistics.finalize()
    spoilt[1, 2, 0, 0] = bad
    with pytest.raises(DataError, match=r"'layer.relu' has 1 values of 96 that are not finite"):
        statistics.update(spoilt)
    assert all(torch.equal(now, then) for now, then in zip(statistics.finalize(), before, strict=True))
    with pytest.raises(ModelError, match=r"the weight 'fc.weight' has 1 values"):
        collector(kind, is_weight=True, name="fc.weight").update(torch.tensor([[bad, 1.0]]))


@pytest.mark.parametrize("kind", TYPES)
def test_empty_batches_are_skipped_and_nothing_at_all_is_an_error(kind):
    statistics = collector(kind, "asymmetric")
    statistics.update(torch.empty(0, 3))
    with pytest.raises(DataError, match=r"'layer.relu' was never computed in calibration"):
        statistics.finalize()
    batches = activations((3, 0, 2))
    found = collected(statistics, batches)
    for bound, truth in zip(found, expected(kind, "asymmetric", [batches[0], batches[2]], None, False), strict=True):
        np.testing.assert_allclose(np.atleast_1d(bound), truth, rtol=1e-6)
    with pytest.raises(ModelError, match="has no elements"):
        collector(kind, is_weight=True).finalize()


def test_channels_that_come_and_go_are_refused():
    statistics = collector("min_max", per_channel=True)
    statistics.update(torch.zeros(2, 3))
    with pytest.raises(DataError, match=r'had 3 channels and now has 4; set "per_channel": false'):
        statistics.update(torch.zeros(2, 4))
    other = statistics.empty()
    other.update(torch.zeros(2, 4))
    with pytest.raises(DataError, match="had 3 channels"):
        statistics.merge(other)
    with pytest.raises(ModelError, match=r"shape \(5,\) and so no dimension 1"):
        collector("min_max", per_channel=True).update(torch.zeros(5))
    with pytest.raises(DataError, match=r"dtype torch.int64"):
        collector("min_max").update(torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("kind", TYPES)
def test_no_graph_is_kept(kind):
    x = torch.rand(4, 3, requires_grad=True)
    statistics = collector(kind)
    statistics.update(x * 2)
    assert not any(bound.requires_grad for bound in statistics.finalize())
