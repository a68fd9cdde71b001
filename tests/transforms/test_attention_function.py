"""The function that stands for torch's multi-head attention while a function mode is active: what it gives."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.transforms.attention_helpers import (
    BATCH,
    BIASES,
    FEATURES,
    FLAGS,
    HEADS,
    KEYS,
    QUERIES,
    SEPARATE,
    Inside,
    arguments,
    inside,
    layer_with,
    mask_of,
    normal,
    padding_of,
    tensors,
)


def run(layer, inputs, kwargs):
    """Returns the results of the layer, and their gradients with respect to all that needs some."""
    torch.manual_seed(0)
    results = [result for result in layer(*inputs, **kwargs) if result is not None]
    leaves = [x for x in (*inputs, *kwargs.values(), *layer.parameters()) if torch.is_tensor(x) and x.requires_grad]
    loss = sum((result * normal(*result.shape, seed=30 + i)).sum() for i, result in enumerate(results))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return results, [gradient for gradient in gradients if gradient is not None]


def run_both(layer, inputs, kwargs):
    expected, mode = run(layer, inputs, kwargs), Inside()
    with mode:
        found = run(layer, inputs, kwargs)
    assert mode.replaced == 1
    assert [len(part) for part in found] == [len(part) for part in expected]
    return list(zip(itertools.chain(*found), itertools.chain(*expected), strict=True))


WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "by head": {"need_weights": True, "average_attn_weights": False},
}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
@pytest.mark.parametrize("mask", ["no mask", "2-D bool", "2-D float", "3-D bool", "3-D float", "causal"])
@pytest.mark.parametrize("padding", ["no padding", "bool", "float"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_all_options_give_bit_by_bit_what_torch_gives(sizes, mask, padding):
    # The tensors are three objects, of which torch, too, makes three products.
    keys = QUERIES if mask == "causal" else KEYS
    for bias, add_bias_kv, add_zero_attn, batched, dropout in itertools.product(FLAGS, FLAGS, FLAGS, FLAGS, (0.0, 0.3)):
        options = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "dropout": dropout}
        layer, inputs, masks = layer_with(**options, **sizes), tensors(**sizes, keys=keys), {}
        if mask != "no mask":
            masks = {"attn_mask": mask_of(mask, keys, HEADS * (BATCH if batched else 1)), "is_causal": mask == "causal"}
        if padding != "no padding":
            masks["key_padding_mask"] = padding_of(padding, keys)
        if not batched:
            inputs = [x[:, 1] for x in inputs]
            masks |= {"key_padding_mask": masks["key_padding_mask"][1]} if "key_padding_mask" in masks else {}
        for kind, weights in WEIGHTS.items():
            for found, expected in run_both(layer, inputs, {**masks, **weights}):
                assert torch.equal(found, expected), (options, batched, kind)


@pytest.mark.parametrize("objects", ["self", "cross"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch_first", FLAGS)
@pytest.mark.parametrize("batched", FLAGS)
def test_tensors_that_are_one_object_give_what_torch_gives(objects, weights, batch_first, batched):
    query, key, _ = tensors()
    if not batched:
        query, key = query[:, 0], key[:, 0]
    inputs = (query, query, query) if objects == "self" else (query, key, key)
    layer = layer_with(batch_first=batch_first, dropout=0.3)
    if batch_first and batched:
        inputs = (query, query, query) if objects == "self" else (query[:2], key[:2], key[:2])
    for found, expected in run_both(layer, inputs, WEIGHTS[weights]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nothing_is_dropped_in_evaluation(weights):
    for found, expected in run_both(layer_with(dropout=0.3).eval(), tensors(), WEIGHTS[weights]):
        assert torch.equal(found, expected)


# The function by itself.


STATIC = normal(BATCH * HEADS, 7, FEATURES // HEADS, seed=5)


@pytest.mark.parametrize("need_weights", FLAGS)
@pytest.mark.parametrize("add_zero_attn", FLAGS)
@pytest.mark.parametrize(
    "static",
    [{"static_k": STATIC[:, :5]}, {"static_v": STATIC[:, :5]}, {"static_k": STATIC, "static_v": STATIC.flip(0)}],
    ids=["key", "value", "both"],
)
def test_static_keys_and_values_stand_for_the_projected_ones(static, add_zero_attn, need_weights):
    given = arguments(**static, add_zero_attn=add_zero_attn, need_weights=need_weights)
    for found, expected in zip(inside(**given), F.multi_head_attention_forward(**given), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_a_mask_for_one_sequence_and_one_head_is_one_for_all():
    query = normal(QUERIES, 1, FEATURES)
    given = arguments(query=query, key=query, value=query, num_heads=1, attn_mask=normal(1, QUERIES, QUERIES, seed=1))
    expected = F.multi_head_attention_forward(**given, need_weights=False)[0]
    torch.testing.assert_close(inside(**given, need_weights=False)[0], expected, rtol=1e-12, atol=1e-12)


MISTAKES = {
    "query of one dimension": {"query": torch.ones(8)},
    "query of four dimensions": {"query": torch.ones(4, 3, 8, 1)},
    "key without batch": {"key": torch.ones(5, 8)},
    "value without batch": {"value": torch.ones(5, 8)},
    "key with batch": {"query": torch.ones(4, 8), "value": torch.ones(5, 8)},
    "padding of one dimension": {"key_padding_mask": torch.zeros(5)},
    "padding of three dimensions": {"key_padding_mask": torch.zeros(3, 5, 1)},
    "mask of one dimension": {"attn_mask": torch.zeros(5)},
    "mask of four dimensions": {"attn_mask": torch.zeros(3, 2, 4, 5)},
    "mask of other keys": {"attn_mask": torch.zeros(4, 6)},
    "mask of other heads": {"attn_mask": torch.zeros(3, 4, 5)},
    "mask of integers": {"attn_mask": torch.zeros(4, 5, dtype=torch.int64)},
    "padding of integers": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.int64)},
    "padding of other keys": {"key_padding_mask": torch.zeros(3, 6)},
    "padding of another batch": {"key_padding_mask": torch.zeros(2, 5)},
    "causal without mask": {"is_causal": True},
    "features": {"embed_dim_to_check": 6},
    "heads": {"num_heads": 3},
    "length of key": {"key": normal(6, 3, 8)},
    "features of key": {"key": normal(5, 3, 6)},
    "features of key and value": {"key": normal(5, 3, 6), "value": normal(5, 3, 6)},
    "batch of key and value": {"key": normal(5, 2, 8), "value": normal(5, 2, 8)},
    "no packed weight": {"in_proj_weight": None},
    "packed weight of four": {"in_proj_weight": normal(32, 8)},
    "packed weight of one row": {"in_proj_weight": normal(1, 8)},
    "packed bias of two": {"in_proj_bias": normal(16)},
    "no query weight": {**SEPARATE, "q_proj_weight": None},
    "no key weight": {**SEPARATE, "k_proj_weight": None},
    "no value weight": {**SEPARATE, "v_proj_weight": None},
    "rows of query weight": {**SEPARATE, "q_proj_weight": normal(6, 8)},
    "columns of key weight": {**SEPARATE, "k_proj_weight": normal(8, 6)},
    "columns of value weight": {**SEPARATE, "v_proj_weight": normal(8, 6)},
    "separate weights and bias of two": {**SEPARATE, "in_proj_bias": normal(16)},
    "separate weights and length of key": {**SEPARATE, "key": normal(6, 3, 8)},
    "bias_k alone": {**BIASES, "bias_v": None},
    "bias_v alone": {**BIASES, "bias_k": None},
    "static key and bias": {**BIASES, "static_k": STATIC},
    "static value and bias": {**BIASES, "static_v": STATIC},
    "static key of another batch": {"static_k": STATIC[:4]},
    "static key of other features": {"static_k": STATIC[..., :3]},
    "static value of another batch": {"static_v": STATIC[:4]},
    "static value of other features": {"static_v": STATIC[..., :3]},
    "weight of output": {"out_proj_weight": normal(8, 6)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("need_weights", FLAGS)
def test_mistakes_raise_what_they_raise_in_torch(mistake, need_weights):
    given = arguments(**MISTAKES[mistake], need_weights=need_weights)
    with pytest.raises(Exception) as expected:
        F.multi_head_attention_forward(**given)
    with pytest.raises(expected.type) as found:
        inside(**given)
    assert found.type is expected.type


def test_a_mask_for_other_heads_of_a_single_sequence_raises_what_it_raises_in_torch():
    query, key, value = (x[:, 0] for x in tensors())
    given = arguments(query=query, key=key, value=value, attn_mask=torch.zeros(3, QUERIES, KEYS))
    for function in (inside, F.multi_head_attention_forward):
        with pytest.raises(AssertionError, match="shape"):
            function(**given)


def test_masks_of_two_types_are_warned_of():
    masks = {"attn_mask": mask_of("2-D float"), "key_padding_mask": padding_of("bool")}
    for function in (inside, F.multi_head_attention_forward):
        with pytest.warns(UserWarning, match="deprecated"):
            function(**arguments(**masks))
