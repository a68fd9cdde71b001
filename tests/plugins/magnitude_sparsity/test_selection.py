"""Exact selection, against sorting everything in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core import ModelError
from compress_magnitude_sparsity.selection import RankedTensor, layer_scale, select


def keep_masks(ranked, count):
    masks = [torch.full_like(tensor.values, 7) for tensor in ranked]  # whatever was there before
    select(ranked, count).write(masks)
    return masks


def independent(tensors, scales, count):
    """Sorts (importance, tensor, position) in float64, skipping the last largest element of each tensor."""
    entries = []
    for number, (values, scale) in enumerate(zip(tensors, scales, strict=True)):
        importance = np.abs(values.double().numpy().reshape(-1)) / scale
        protected = len(importance) - 1 - int(np.argmax(importance[::-1])) if len(importance) else None
        entries += [(importance[i], number, i) for i in range(len(importance)) if i != protected]
    dropped = sorted(entries)[:count]
    masks = [np.ones(values.numel()) for values in tensors]
    for _, number, position in dropped:
        masks[number][position] = 0
    return [mask.reshape(values.shape) for mask, values in zip(masks, tensors, strict=True)]


# Values that are exact in every dtype, with many ties and zeros, so that the order has no rounding to argue about.
grid = st.integers(-6, 6).map(lambda i: i / 4)


@st.composite
def problems(draw):
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    tensors = [
        torch.tensor(draw(st.lists(grid, min_size=1, max_size=30)), dtype=draw(dtypes))
        for _ in range(draw(st.integers(1, 4)))
    ]
    total = sum(t.numel() for t in tensors)
    scales = [draw(st.sampled_from([1.0, 2.0, 0.5])) for _ in tensors]
    return tensors, scales, draw(st.integers(0, total))


@settings(deadline=None, max_examples=300)
@given(problems())
def test_same_as_sorting(problem):
    tensors, scales, count = problem
    ranked = [RankedTensor(str(i), t, s) for i, (t, s) in enumerate(zip(tensors, scales, strict=True))]
    masks = keep_masks(ranked, count)
    for mask, expected, values in zip(masks, independent(tensors, scales, count), tensors, strict=True):
        assert mask.dtype == values.dtype
        np.testing.assert_array_equal(mask.double().numpy(), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]),
    st.sampled_from(["normal", "sparse", "tiny", "half"]),
)
def test_count_is_exact_and_nothing_kept_is_smaller_than_something_dropped(seed, level, kind):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator) for n in (501, 3, 1200)]
    if kind == "sparse":
        tensors = [t * (torch.rand(t.shape, generator=generator) < 0.3) for t in tensors]
    elif kind == "tiny":
        tensors = [t * 1e-42 for t in tensors]  # subnormal
    elif kind == "half":
        tensors = [t.half() for t in tensors]
    count = round(level * sum(t.numel() for t in tensors))
    masks = keep_masks([RankedTensor("", t) for t in tensors], count)
    assert sum(int((m == 0).sum()) for m in masks) == count
    dropped = torch.cat([t[m == 0].abs().double() for t, m in zip(tensors, masks, strict=True)])
    largest = [int((t.abs() == t.abs().max()).nonzero()[-1]) for t in tensors]
    for t, m, keep in zip(tensors, masks, largest, strict=True):
        kept = m != 0
        kept[keep] = False
        if dropped.numel() and kept.any():
            assert t[kept].abs().double().min() >= dropped.max()


def test_pieces_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(1000).mul(8).round().div(8), torch.randn(777)]
    whole = keep_masks([RankedTensor("", t) for t in tensors], 900)
    monkeypatch.setattr("compress_magnitude_sparsity.selection._PIECE", 64)  # some tensors need several, some share one
    for left, right in zip(whole, keep_masks([RankedTensor("", t) for t in tensors], 900), strict=True):
        assert torch.equal(left, right)


def test_channels_last_weights_keep_their_layout_and_the_order_of_ties():
    weight = torch.ones(4, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    (mask,) = keep_masks([RankedTensor("", weight)], 10)
    assert mask.stride() == weight.stride()
    assert torch.equal(mask.contiguous().flatten(), torch.tensor([0.0] * 10 + [1.0] * 54))


def test_every_layer_keeps_its_most_important_weight():
    small, large = torch.full((5,), 0.1), torch.linspace(1, 2, 95)
    masks = keep_masks([RankedTensor("", small), RankedTensor("", large)], 1000)
    assert [int(mask.sum()) for mask in masks] == [1, 1]
    assert masks[0][-1] == 1
    assert masks[1][-1] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_an_error(bad):
    with pytest.raises(ModelError, match=r"'fc\.weight' holds NaN or infinity"):
        keep_masks([RankedTensor("fc.weight", torch.tensor([1.0, bad, 2.0]))], 1)


def test_empty_and_single_element_tensors():
    masks = keep_masks(
        [RankedTensor("", torch.empty(0, 3)), RankedTensor("", torch.ones(1)), RankedTensor("", torch.ones(2))], 3
    )
    assert [tuple(m.shape) for m in masks] == [(0, 3), (1,), (2,)]
    assert [m.tolist() for m in masks[1:]] == [[1.0], [0.0, 1.0]]


def test_scale_is_the_l2_norm_in_float64():
    values = torch.randn(1000) * 1e20
    assert layer_scale(values) == pytest.approx(float(np.linalg.norm(values.double().numpy())), rel=1e-12)
    assert layer_scale(torch.zeros(3)) == 1.0


def test_float32_and_float64_are_compared_without_rounding():
    narrow, wide = torch.full((10,), 0.1), torch.full((10,), 0.1, dtype=torch.float64)  # float32's 0.1 is larger
    masks = keep_masks([RankedTensor("", narrow), RankedTensor("", wide)], 9)
    assert [int((m == 0).sum()) for m in masks] == [0, 9]
