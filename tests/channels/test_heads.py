"""Heads of attention go as a whole where the code computes how many there are."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from compress_core.channels import (
    channel_groups_of_heads,
    input_specs,
    load_compressed_model,
    removable_groups,
)
from compress_core.trace import trace
from tests.channel_helpers import check_shrinking, group_with, groups_of, slices
from tests.channels.small_models import Function, normal

SIZE, HEAD = 24, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SPLITS = {
    "view, open": lambda x, heads: x.view(*x.shape[:-1], -1, HEAD),
    "reshape, open": lambda x, heads: x.reshape(*x.shape[:-1], -1, HEAD),
    "unflatten, open": lambda x, heads: x.unflatten(-1, (-1, HEAD)),
    "computed": lambda x, heads: x.view(*x.shape[:-1], x.shape[-1] // HEAD, HEAD),
    "number in the code": lambda x, heads: x.view(*x.shape[:-1], heads, -1),
    "all in the code": lambda x, heads: x.view(*x.shape[:-1], heads, HEAD),
}
WHOLE = ["view, open", "reshape, open", "unflatten, open", "computed"]


class WithSizes(nn.Module):
    """Attention whose code reads all its sizes from attributes, with one layer for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_size, self.attn_width = SIZE // HEAD, HEAD, SIZE
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)
        return self.out(fused(*qkv.unbind(0)).transpose(1, 2).reshape(*x.shape[:-1], self.attn_width))


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def by_hand(q, k, v):
    repeats = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(len(x), -1, *x.shape[2:]) for x in (k, v))
    return ((q @ k.transpose(-1, -2)) * HEAD**-0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention as libraries write it; with `groups`, several heads of queries share keys and values."""

    def __init__(self, split, attend=fused, groups=1):
        super().__init__()
        self.split_by, self.attend, self.groups = SPLITS[split], attend, groups
        self.q, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.k, self.v = (nn.Linear(SIZE, SIZE // groups) for _ in range(2))

    def split(self, x, heads):
        return self.split_by(x, heads).transpose(1, 2)

    def forward(self, x):
        heads = SIZE // HEAD
        q, k, v = self.split(self.q(x), heads), *(self.split(m(x), heads // self.groups) for m in (self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def attending(*args, **options):
    return nn.Sequential(nn.Linear(3, SIZE), Attention(*args, **options), nn.Linear(SIZE, 5)), normal(2, 5, 3)


@pytest.mark.parametrize("attend", [fused, by_hand])
@pytest.mark.parametrize("split", WHOLE)
def test_heads_go_as_a_whole(split, attend):
    model, x = attending(split, attend)
    found = trace(model.eval(), x)
    group = group_with(channel_groups_of_heads(model, found, input_specs(found.forwards[0])), "1.q.weight", 0)
    heads = [index // HEAD for index in range(SIZE)]
    expected = [f"1.{name}.{kind}.0" for name in "qkv" for kind in ("weight", "bias")]
    assert slices(group) == dict.fromkeys([*expected, "1.out.weight.1"], heads)
    assert group.obstacle is None
    check_shrinking(model, x)
    assert model[1].q.out_features == model[1].out.in_features < SIZE
    assert model[1].q.out_features % HEAD == 0


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("attend", [fused, by_hand])
@pytest.mark.parametrize("split", ["view, open", "computed"])
def test_keys_that_several_heads_share_go_with_all_of_them(split, attend, groups):
    model, x = attending(split, attend, groups)
    check_shrinking(model, x)
    attention = model[1]
    assert attention.q.out_features == groups * attention.k.out_features < SIZE
    assert attention.v.out_features == attention.k.out_features


def test_one_key_for_all_heads_keeps_them():
    # Channels within the one head of values could go, or heads of queries, but not both from one dimension of the sum.
    model, x = attending("view, open", fused, SIZE // HEAD)
    assert "is mixed with other dimensions" in str(group_with(groups_of(model, x), "1.v.weight", 0).obstacle)
    check_shrinking(model, x)


def test_scores_of_a_number_of_heads_in_the_code_stay_and_values_shrink_within_heads():
    model, x = attending("number in the code")
    found = groups_of(model, x)
    values = group_with(found, "1.v.weight", 0)
    within = [index % HEAD for index in range(SIZE)]
    assert slices(values) == dict.fromkeys(["1.v.weight.0", "1.v.bias.0", "1.out.weight.1"], within)
    assert values.obstacle is None
    assert "scores are scaled by the size of a head" in str(group_with(found, "1.q.weight", 0).obstacle)
    check_shrinking(model, x)
    assert model[1].q.out_features == SIZE > model[1].v.out_features


def test_attention_with_all_sizes_in_the_code_stays_whole():
    model, x = attending("all in the code")
    found_trace = trace(model.eval(), x)
    specs = input_specs(found_trace.forwards[0])
    found = channel_groups_of_heads(model, found_trace, specs)
    assert "scores are scaled by the size of a head" in str(group_with(found, "1.q.weight", 0).obstacle)
    groups, broken = removable_groups(model, found.prunable, specs)
    ((values, reason),) = broken
    assert "1.v.weight.0" in slices(values)
    assert "fails in '1' (eval mode)" in reason and "A size is written in its code" in reason
    assert [slices(group).keys() for group in groups] == [
        {"0.weight.0", "0.bias.0", "1.q.weight.1", "1.k.weight.1", "1.v.weight.1"},
        {"1.out.weight.0", "1.out.bias.0", "2.weight.1"},
    ]
    check_shrinking(model, x)


def test_sizes_that_a_module_keeps_in_attributes_follow():
    model = nn.Sequential(nn.Linear(3, SIZE), WithSizes(), nn.Linear(SIZE, 5))
    before = copy.deepcopy(model)
    _, plan, _ = check_shrinking(model, normal(2, 5, 3))
    attention = model[1]
    left = attention.num_heads
    assert left < SIZE // HEAD
    assert (attention.head_size, attention.attn_width, attention.qkv.out_features) == (
        HEAD,
        left * HEAD,
        3 * left * HEAD,
    )
    saved = json.loads(json.dumps(plan.to_dict()))
    assert saved["attributes"] == {"1": {"num_heads": left, "attn_width": left * HEAD}}
    again = load_compressed_model(before, model.state_dict(), saved)
    assert torch.equal(again(normal(2, 5, 3)), model(normal(2, 5, 3)))


def test_a_group_of_heads_is_saved_and_shrinks_a_second_time():
    model = nn.Sequential(nn.Linear(3, SIZE), WithSizes(), nn.Linear(SIZE, 5)).eval()
    x = normal(2, 5, 3)
    config = {
        "input_info": {"sample_size": [2, 5, 3]},
        "compression": {
            "algorithm": "filter_pruning",
            "pruning_init": 0.34,
            "params": {"pruning_target": 0.67, "pruning_steps": 1, "multiple_of": 1},
        },
    }
    controller, model = create_compressed_model(model, config)
    controller.shrink()
    assert model[1].num_heads == 4
    state = json.loads(json.dumps(controller.get_compression_state()))
    fresh = nn.Sequential(nn.Linear(3, SIZE), WithSizes(), nn.Linear(SIZE, 5))
    resumed, again = create_compressed_model(fresh, config, compression_state=state)
    again.load_state_dict(model.state_dict())
    for one in (controller, resumed):
        one.set_pruning_level(0.67)
        assert one.strip()[1].num_heads == 2
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_attention_that_looks_everywhere_alike_does_not_hide_a_number_in_the_code():
    # Heads of half the size would compute the same as half of the heads.
    model, x = attending("number in the code", by_hand)
    with torch.no_grad():
        for layer in (model[1].q, model[1].k):
            layer.weight.zero_()
            layer.bias.zero_()
    found = trace(model.eval(), x)
    groups = channel_groups_of_heads(model, found, input_specs(found.forwards[0]))
    assert group_with(groups, "1.q.weight", 0).obstacle is not None


def test_modules_of_a_class_that_work_differently_are_tried_one_by_one():
    layers = [Attention("computed"), Attention("all in the code"), Attention("computed")]
    model = nn.Sequential(nn.Linear(3, SIZE), *layers, nn.Linear(SIZE, 5)).eval()
    found_trace = trace(model, normal(2, 5, 3))
    specs = input_specs(found_trace.forwards[0])
    groups, broken = removable_groups(model, channel_groups_of_heads(model, found_trace, specs).prunable, specs)
    makers = {name for group in groups for name in slices(group)}
    assert {"1.q.weight.0", "3.q.weight.0"} <= makers
    assert "2.q.weight.0" not in makers
    assert any("2.v.weight.0" in slices(group) for group, _ in broken)


def test_attention_mask_that_is_computed_for_each_head():
    def forward(self, x, positions):
        bias = self.bias(positions).permute(2, 0, 1)[None]
        heads = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        return self.out(x.transpose(1, 2).flatten(2))

    model = Function(forward, bias=nn.Embedding(7, 2), out=nn.Linear(8, 3))
    found = groups_of(model, normal(2, 4, 8), torch.zeros(4, 4, dtype=torch.long))
    assert "meets a tensor of fixed size" in str(group_with(found, "bias.weight", 1).obstacle)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_stays_whole_inside(batch_first):
    def forward(self, x):
        y = self.stem(x)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])

    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model = Function(forward, stem=nn.Linear(3, 8), attention=attention, head=nn.Linear(8, 2))
    _, plan, _ = check_shrinking(model, normal(2, 4, 3))
    assert not any(name.startswith("attention.") for name in plan.kept)
