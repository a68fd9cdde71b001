import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.batchnorm.moments import Correlation, Moments, sampled_rows

shapes = st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 2)])


@st.composite
def splits(draw):
    """A tensor (n, channels, ...), and a way to cut it into batches."""
    n, channels = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**16))
    offset = draw(st.sampled_from([0.0, 1e-3, 3.0, 500.0]))
    scale = draw(st.sampled_from([1e-3, 1.0, 40.0]))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, channels, *shape, generator=generator) * scale + offset
    if len(shape) == 2 and draw(st.booleans()):
        values = values.contiguous(memory_format=torch.channels_last)
    cuts = sorted(draw(st.sets(st.integers(1, n), max_size=n)) | {n})
    return values, [b - a for a, b in zip([0, *cuts], cuts, strict=False)]


def assert_population(moments, values):
    wide = values.double().movedim(1, 0).flatten(1).numpy()
    mean, var = wide.mean(1), wide.var(1)
    assert moments.count == wide.shape[1]
    # float32 data carry a rounding of 6e-8 of their size: the variance cannot be known better than that.
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6, atol=1e-6 * np.sqrt(var).max())
    np.testing.assert_allclose(moments.variance, var, rtol=1e-6, atol=1e-12 * (mean**2).max())


@settings(deadline=None, max_examples=200)
@given(splits())
def test_any_split_pools_to_the_population(case):
    values, sizes = case
    pooled = Moments.empty(values.shape[1])
    for part in values.split(sizes):
        pooled.merge(Moments.of(part))
    assert_population(pooled, values)


@settings(deadline=None, max_examples=100)
@given(splits(), st.randoms())
def test_merging_is_commutative_and_associative(case, random):
    values, sizes = case
    parts = [Moments.of(part) for part in values.split(sizes)]
    random.shuffle(parts)
    while len(parts) > 1:
        left = parts.pop(random.randrange(len(parts)))
        index = random.randrange(len(parts))
        left.merge(parts[index])
        parts[index] = left
    assert_population(parts[0], values)


@settings(deadline=None, max_examples=50)
@given(splits())
def test_empty_is_neutral(case):
    values, _ = case
    moments, empty = Moments.of(values), Moments.empty(values.shape[1])
    moments.merge(Moments.of(values[:0]))
    empty.merge(moments)
    assert torch.equal(empty.mean, moments.mean)
    assert torch.equal(empty.m2, moments.m2)
    assert empty.count == moments.count


def test_large_channels_last_tensors():
    for offset in (0.0, 100.0, 1000.0):
        values = (torch.randn(16, 8, 48, 48) + offset).contiguous(memory_format=torch.channels_last)
        assert_population(Moments.of(values), values)
    volume = torch.randn(4, 3, 9, 9, 9).contiguous(memory_format=torch.channels_last_3d)
    assert_population(Moments.of(volume), volume)


def test_low_precision_and_strided_inputs():
    values = torch.randn(8, 6, 10)
    for variant in (values.to(torch.bfloat16), values.half(), values.double(), values[:, ::2], values.transpose(0, 2)):
        moments = Moments.of(variant)
        assert_population(moments, variant)


def test_nan_is_noticed():
    assert Moments.of(torch.randn(4, 3)).is_finite()
    for bad in (float("nan"), float("inf")):
        values = torch.randn(4, 3)
        values[2, 1] = bad
        assert not Moments.of(values).is_finite()


@settings(deadline=None, max_examples=60)
@given(splits(), st.floats(-2, 2))
def test_correlation_pools_to_numpys(case, slope):
    values, sizes = case
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    other = values * slope + noise * values.std(correction=0)
    pooled = Correlation(values.shape[1])
    pairs = [
        (x.movedim(1, -1).flatten(0, -2), y.movedim(1, -1).flatten(0, -2))
        for x, y in zip(values.split(sizes), other.split(sizes), strict=True)
    ]
    for left, right in pairs:
        pooled.add(left, right)
    left, right = (torch.cat(side).double().numpy() for side in zip(*pairs, strict=True))
    for channel in range(values.shape[1]):
        if min(left[:, channel].std(), right[:, channel].std()) > 1e-6 * abs(left[:, channel]).max() > 0:
            expected = np.corrcoef(left[:, channel], right[:, channel])[0, 1]
            assert abs(float(pooled.value()[channel]) - expected) < 1e-6


def test_correlation_of_constants():
    pooled = Correlation(3)
    varying = torch.randn(10)
    pooled.add(
        torch.stack([torch.ones(10), varying, varying], 1), torch.stack([torch.ones(10), torch.ones(10), varying], 1)
    )
    assert pooled.value().tolist() == [1.0, 0.0, 1.0]


def test_sampled_rows_are_spread_and_the_same_for_every_sample():
    values = torch.arange(8 * 3 * 32 * 32.0).view(8, 3, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        rows = sampled_rows(values.contiguous(memory_format=layout), 16)
        assert rows.shape == (8 * 16, 3)
        positions = {int(v) % 1024 for v in rows[:, 0]}
        assert len(positions) == 16
        assert len({p // 32 for p in positions}) > 8 < len({p % 32 for p in positions})  # rows and columns
        assert torch.equal(rows[:16] % 1024, rows[16:32] % 1024)
        assert torch.equal(rows[:, 1] - rows[:, 0], torch.full((128,), 1024.0))
    assert torch.equal(sampled_rows(values[:1, :, :1, :1], 100), values[:1, :, 0, 0])
    assert torch.equal(sampled_rows(values[:, :, 0, 0], 4), values[:, :, 0, 0])
    assert sampled_rows(values.half(), 4).dtype is torch.float32
