"""Channel groups: what belongs together, what must stay and why, smaller tensors, and what they cost."""

import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import StateError
from compress_core.channels import (
    Certificate,
    Costs,
    InputSpec,
    Role,
    Shrinkage,
    ShrinkError,
    channel_groups,
    input_specs,
    operation_costs,
    parameter_costs,
    prove,
    removable_groups,
    shrinkage,
)
from compress_core.channels.rules import RULES, rule
from compress_core.trace import Example, trace
from tests.channel_helpers import check_shrinking, group_with, groups_of, mask, slices


class Function(nn.Module):
    """Layers by name, and a forward that is given as a function of self and inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args):
        return self._forward(self, *args)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# What belongs together.


def test_convolution_batch_norm_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    found = groups_of(model, normal(1, 3, 9, 9))
    (group,) = found.prunable
    assert group.size == 4
    every = [0, 1, 2, 3]
    assert slices(group) == {
        "0.weight.0": every,
        "0.bias.0": every,
        "1.weight.0": every,
        "1.bias.0": every,
        "1.running_mean.0": every,
        "1.running_var.0": every,
        "3.weight.1": every,
    }
    assert {f"{m.parameter}.{m.dim}": m.role for m in group.members} == {
        "0.weight.0": Role.MAKES,
        "0.bias.0": Role.ADDS,
        "1.weight.0": Role.NORMALIZES,
        "1.bias.0": Role.NORMALIZES,
        "1.running_mean.0": Role.OTHER,
        "1.running_var.0": Role.OTHER,
        "3.weight.1": Role.READS,
    }
    assert str(group_with(found, "0.weight", 1).obstacle).endswith("in '0': is summed with a tensor of fixed size")
    assert str(group_with(found, "3.weight", 0).obstacle) == "output in 'model': the model returns it"
    assert "kernel size" in str(group_with(found, "0.weight", 2).obstacle)
    _, plan, certificate = check_shrinking(model, normal(2, 3, 9, 9))
    assert model[0].out_channels == model[1].num_features == model[3].in_channels == model[0].weight.shape[0] < 4
    assert set(plan.kept) == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight"}
    assert certificate.eval_difference < 1e-12
    assert certificate.train_difference is not None
    assert certificate.dtype == "float64"


def test_residual_chain_is_one_group():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x):
            return x + self.second(self.first(x).relu())

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block(), Block(), nn.Conv2d(4, 2, 1))
    found = groups_of(model, normal(1, 3, 5, 5))
    sizes = sorted((group.size, len(group.members)) for group in found.prunable)
    # Each block has an inside; the stream is one group: made by 4 convolutions with their biases, read by 4.
    assert sizes == [(4, 12), (6, 3), (6, 3), (6, 3)]
    check_shrinking(model, normal(2, 3, 5, 5))


def test_squeeze_excite_and_broadcasting():
    def forward(self, x):
        x = self.stem(x)
        scale = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head(x * scale * self.gain)

    model = Function(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        down=nn.Conv2d(8, 2, 1),
        up=nn.Conv2d(2, 8, 1),
        head=nn.Conv2d(8, 4, 1),
        gain=nn.Parameter(torch.ones(8, 1, 1)),
    )
    found = groups_of(model, normal(1, 3, 6, 6))
    stream, squeezed = found.prunable
    assert set(slices(stream)) == {
        "stem.weight.0",
        "stem.bias.0",
        "down.weight.1",
        "up.weight.0",
        "up.bias.0",
        "head.weight.1",
        "gain.0",
    }
    assert set(slices(squeezed)) == {"down.weight.0", "down.bias.0", "up.weight.1"}
    check_shrinking(model, normal(2, 3, 6, 6))
    assert model.gain.shape == (model.stem.out_channels, 1, 1)


def test_depthwise_convolution_goes_with_its_input():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    (group,) = groups_of(model, normal(1, 3, 5, 5)).prunable
    assert set(slices(group)) == {"0.weight.0", "0.bias.0", "1.weight.0", "1.bias.0", "2.weight.1"}
    check_shrinking(model, normal(2, 3, 5, 5))
    assert model[1].groups == model[1].in_channels == model[1].out_channels == model[0].out_channels < 6


def test_depthwise_convolution_with_multiplier():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    (group,) = groups_of(model, normal(1, 3, 5, 5)).prunable
    twice = [0, 0, 1, 1, 2, 2, 3, 3]
    assert slices(group)["1.weight.0"] == slices(group)["2.weight.1"] == twice
    check_shrinking(model, normal(2, 3, 5, 5))
    assert model[1].groups == model[1].in_channels
    assert model[1].out_channels == 2 * model[1].groups


def test_grouped_convolution_keeps_groups_of_equal_size():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    inputs, outputs = groups_of(model, normal(1, 3, 5, 5)).prunable
    assert slices(inputs)["0.weight.0"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert slices(inputs)["1.weight.1"] == [0, 1, 2, 3]
    assert slices(outputs)["1.weight.0"] == [0, 1, 2, 0, 1, 2]
    check_shrinking(model, normal(2, 3, 5, 5))
    assert model[1].groups == 2


@pytest.mark.parametrize(
    ("layer", "size"),
    [(nn.ConvTranspose2d(6, 4, 3), 4), (nn.ConvTranspose2d(6, 6, 3, groups=6), 6)],
    ids=["dense", "depthwise"],
)
def test_transposed_convolution(layer, size):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.BatchNorm2d(size), nn.Conv2d(size, 2, 1))
    assert len(groups_of(model, normal(1, 3, 4, 4)).prunable) == (2 if layer.groups == 1 else 1)
    check_shrinking(model, normal(2, 3, 4, 4))
    assert model[1].in_channels == model[0].out_channels < 6


def test_transposed_convolution_in_groups_stays_whole():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    found = groups_of(model, normal(1, 3, 4, 4))
    assert not found.prunable
    assert "transposed convolution in groups" in str(group_with(found, "0.weight", 0).obstacle)


@pytest.mark.parametrize(
    ("conv", "norm", "rank"),
    [(nn.Conv1d, nn.BatchNorm1d, 1), (nn.Conv2d, nn.BatchNorm2d, 2), (nn.Conv3d, nn.BatchNorm3d, 3)],
)
def test_dimensions_of_space(conv, norm, rank):
    model = nn.Sequential(conv(2, 6, 3, bias=False), norm(6), nn.ReLU6(), conv(6, 4, 1), conv(4, 3, 1))
    assert [group.size for group in groups_of(model, normal(1, 2, *[5] * rank)).prunable] == [6, 4]
    check_shrinking(model, normal(2, 2, *[5] * rank))


def test_flatten_then_linear_has_one_column_for_each_pixel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 2 * 3, 5))
    (group,) = groups_of(model, normal(1, 3, 6, 8)).prunable
    assert slices(group)["4.weight.1"] == np.repeat(range(4), 6).tolist()
    check_shrinking(model, normal(2, 3, 6, 8))
    assert model[4].in_features == 6 * model[0].out_channels


def test_linear_layers_in_any_rank_and_a_product_with_itself():
    model = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 4))
    assert [group.size for group in groups_of(model, normal(2, 5, 3)).prunable] == [6]
    check_shrinking(model, normal(2, 5, 3))
    # A gram matrix: channels on both sides of the product, fixed because they are returned.
    gram = Function(lambda self, x: self.a(x).transpose(1, 2) @ self.a(x), a=nn.Linear(3, 6))
    assert str(group_with(groups_of(gram, normal(2, 5, 3)), "a.weight", 0).obstacle).startswith("output")


def test_concatenation_keeps_parts_apart():
    def forward(self, x):
        return self.head(torch.cat([self.a(x), x, self.b(x)], 1))

    model = Function(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1), head=nn.Conv2d(9, 5, 1))
    found = groups_of(model, normal(1, 3, 4, 4))
    a, b = found.prunable
    assert slices(a)["head.weight.1"] == [0, 1, 2, 3, -1, -1, -1, -1, -1]
    assert slices(b)["head.weight.1"] == [-1] * 7 + [0, 1]
    assert sorted(group.size for group in found.groups if "head.weight.1" in slices(group)) == [2, 3, 4]
    check_shrinking(model, normal(2, 3, 4, 4))


def test_chunks_shrink_by_the_same_amount():
    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        return self.head(a * b.sigmoid())

    model = Function(forward, stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(4, 2, 1))
    (group,) = groups_of(model, normal(1, 3, 4, 4)).prunable
    assert slices(group)["stem.weight.0"] == [0, 1, 2, 3, 0, 1, 2, 3]
    check_shrinking(model, normal(2, 3, 4, 4))


def test_parts_of_a_size_in_the_code_stay():
    def forward(self, x):
        a, b = self.stem(x).split([6, 2], 1)
        return self.head(a) + b.sum(1, keepdim=True)

    model = Function(forward, stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(6, 2, 1))
    found = groups_of(model, normal(1, 3, 4, 4))
    assert not found.prunable
    obstacles = [str(group.obstacle) for group in found.groups if "stem.weight.0" in slices(group)]
    assert len(obstacles) == 2
    assert all("split at positions that are written in the code" in obstacle for obstacle in obstacles)


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def test_channel_shuffle():
    model = Function(
        lambda self, x: self.head(shuffle(self.stem(x), 2)), stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 2, 1)
    )
    (group,) = groups_of(model, normal(1, 3, 4, 4)).prunable
    assert group.size == 4
    assert slices(group)["stem.weight.0"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert slices(group)["head.weight.1"] == [0, 0, 1, 1, 2, 2, 3, 3]
    check_shrinking(model, normal(2, 3, 4, 4))


def test_pixel_shuffle_and_back():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1), nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 1)
    )
    before, after = groups_of(model, normal(1, 3, 4, 4)).prunable
    assert slices(before)["0.weight.0"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert slices(after)["4.weight.1"] == np.repeat(range(3), 4).tolist()
    check_shrinking(model, normal(2, 3, 4, 4))


def test_tied_weights():
    first, second = nn.Linear(3, 6), nn.Linear(3, 6)
    second.weight = first.weight
    model = Function(lambda self, x: self.c(self.a(x)) + self.d(self.b(x)), a=first, b=second)
    model.c, model.d = nn.Linear(6, 4), nn.Linear(6, 4)
    (group,) = groups_of(model, normal(2, 3)).prunable
    assert set(slices(group)) == {"a.weight.0", "a.bias.0", "b.bias.0", "c.weight.1", "d.weight.1"}
    check_shrinking(model, normal(2, 3))
    assert model.a.weight is model.b.weight
    assert model.a.out_features == model.b.out_features == model.d.in_features


def test_layer_that_is_used_twice():
    model = Function(
        lambda self, x: self.head(self.inner(self.inner(self.stem(x)).relu())),
        stem=nn.Linear(3, 4),
        inner=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    (group,) = groups_of(model, normal(2, 3)).prunable
    assert set(slices(group)) == {
        "stem.weight.0",
        "stem.bias.0",
        "inner.weight.0",
        "inner.weight.1",
        "inner.bias.0",
        "head.weight.1",
    }
    check_shrinking(model, normal(2, 3))


def test_products_of_two_activations_read_all_channels():
    """A masked channel is not zero behind a sigmoid, and no weight stands between it and the sum."""

    def forward(self, x):
        return self.head(self.a(x).sigmoid() @ self.b(x).sigmoid().transpose(1, 2))

    model = Function(forward, a=nn.Linear(3, 6), b=nn.Linear(3, 6), head=nn.Linear(4, 2))
    found = groups_of(model, normal(2, 4, 3))
    assert "two activations are multiplied" in str(group_with(found, "a.weight", 0).obstacle)
    assert not found.prunable


# Attention.


class Attention(nn.Module):
    def __init__(self, size=8, heads=2, *, given_heads=True):
        super().__init__()
        self.heads, self.width, self.given_heads = heads, size // heads, given_heads
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))

    def split(self, x):
        shape = (self.heads, -1) if self.given_heads else (-1, self.width)
        return x.view(*x.shape[:2], *shape).transpose(1, 2)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*(self.split(layer(x)) for layer in (self.q, self.k, self.v)))
        return self.out(x.transpose(1, 2).flatten(2))


def test_attention_values_shrink_within_heads_and_scores_do_not():
    model = nn.Sequential(nn.Linear(3, 8), Attention(), nn.Linear(8, 5))
    found = groups_of(model, normal(2, 4, 3))
    values = group_with(found, "1.v.weight", 0)
    assert slices(values) == {
        name: [0, 1, 2, 3, 0, 1, 2, 3] for name in ("1.v.weight.0", "1.v.bias.0", "1.out.weight.1")
    }
    assert values.obstacle is None
    assert "scores are scaled by the size of a head" in str(group_with(found, "1.q.weight", 0).obstacle)
    check_shrinking(model, normal(2, 4, 3))


def test_attention_with_the_size_of_heads_in_the_code_stays_whole():
    model = nn.Sequential(nn.Linear(3, 8), Attention(given_heads=False), nn.Linear(8, 5))
    x = normal(2, 4, 3)
    found_trace = trace(model.eval(), x)
    groups, broken = removable_groups(model, channel_groups(found_trace).prunable, input_specs(found_trace.forwards[0]))
    ((values, reason),) = broken
    assert "1.v.weight.0" in slices(values)
    assert "fails in '1.out'" in reason and "A size is written in its code" in reason
    assert [slices(group).keys() for group in groups] == [
        {"0.weight.0", "0.bias.0", "1.q.weight.1", "1.k.weight.1", "1.v.weight.1"},
        {"1.out.weight.0", "1.out.bias.0", "2.weight.1"},
    ]
    check_shrinking(model, x)


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


def test_transformer_encoder_layer():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    _, plan, _ = check_shrinking(model, normal(2, 4, 8))
    assert set(plan.kept) == {"0.linear1.weight", "0.linear1.bias", "0.linear2.weight"}


# What must stay, and why.


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(4), "normalized over"),
        (nn.GroupNorm(2, 6), "groups of channels are normalized together"),
        (nn.GroupNorm(6, 6), "the number of groups is written in the code"),
    ],
    ids=["layer", "group", "instance-like"],
)
def test_normalization_over_channels(norm, reason):
    if isinstance(norm, nn.LayerNorm):
        model, x = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)), normal(2, 3)
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 1)), normal(2, 3, 4, 4)
    found = groups_of(model, x)
    assert not found.prunable
    assert reason in str(group_with(found, "0.weight", 0).obstacle)


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_looks_at_each_channel_alone(affine):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=affine), nn.Conv2d(6, 2, 1))
    (group,) = groups_of(model, normal(2, 3, 5, 5)).prunable
    assert ("1.weight.0" in slices(group)) == affine
    check_shrinking(model, normal(2, 3, 5, 5))
    # A layer without tensors cannot be told by them; its num_features is only for a warning then.
    assert model[1].num_features == (model[0].out_channels if affine else 6)


def test_embedding():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    found = groups_of(model, torch.zeros(2, 4, dtype=torch.long))
    (group,) = found.prunable
    assert set(slices(group)) == {"0.weight.1", "1.weight.1"}
    assert "rows are chosen by number" in str(group_with(found, "0.weight", 0).obstacle)
    check_shrinking(model, torch.ones(2, 4, dtype=torch.long))
    assert model[0].embedding_dim == model[1].in_features < 6


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout()]
)
def test_dropout_in_training_is_no_obstacle(dropout):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), dropout, nn.Conv2d(6, 2, 1))
    found = groups_of(model, normal(2, 3, 5, 5), training=True)
    assert [group.size for group in found.prunable] == [6]
    check_shrinking(model, normal(2, 3, 5, 5))


def test_views_do_not_mix_channels_with_dimensions_of_size_one():
    def forward(self, x):
        scale = self.scale.view(-1)
        return self.head(self.stem(x) * scale.view(1, -1, 1, 1))

    model = Function(forward, stem=nn.Conv2d(3, 6, 1), head=nn.Conv2d(6, 2, 1), scale=None)
    model.scale = nn.Parameter(torch.rand(1, 6, 1, 1))
    (group,) = groups_of(model, normal(2, 3, 5, 5)).prunable
    assert slices(group)["scale.1"] == [0, 1, 2, 3, 4, 5]
    check_shrinking(model, normal(2, 3, 5, 5))


def test_quantizer_with_a_scale_for_each_channel():
    def forward(self, x):
        return self.head(
            torch.fake_quantize_per_channel_affine(self.stem(x), self.scale, self.zero_point, 1, -128, 127)
        )

    model = Function(forward, stem=nn.Conv2d(3, 6, 1), head=nn.Conv2d(6, 2, 1))
    model.register_buffer("scale", torch.full((6,), 0.1))
    model.register_buffer("zero_point", torch.zeros(6, dtype=torch.int32))
    x = normal(2, 3, 5, 5)
    (group,) = groups_of(model, x).prunable
    assert {"scale.0", "zero_point.0"} <= slices(group).keys()
    shrinkage(model, [(group, {1, 2})]).apply(model)
    assert model(x).shape == (2, 2, 5, 5)


def test_new_tensor_of_a_size_in_the_code():
    def forward(self, x):
        x = self.stem(x)
        return self.head(x + x.new_zeros(1, 6 if self.fixed else x.shape[1], 1, 1))

    model = Function(forward, stem=nn.Conv2d(3, 6, 1), head=nn.Conv2d(6, 2, 1), fixed=False)
    x = normal(2, 3, 5, 5)

    def removable():
        found_trace = trace(model.eval(), x)
        return removable_groups(model, channel_groups(found_trace).prunable, input_specs(found_trace.forwards[0]))

    groups, broken = removable()
    assert [group.size for group in groups] == [6] and not broken
    model.fixed = True
    groups, ((group, reason),) = removable()
    assert not groups and "stem.weight.0" in slices(group)
    assert "fails in 'the model'" in reason and "A size is written in its code" in reason


def test_linear_that_torch_does_not_take_apart():
    class Inference(Function):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    model = Inference(lambda self, x: self.b(self.a(x)), a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    found = groups_of(model, normal(2, 4, 3))
    (group,) = found.prunable
    assert set(slices(group)) == {"a.weight.0", "a.bias.0", "b.weight.1"}
    assert operation_costs(found, [group]).of([6]) == 2 * 8 * (3 * 6 + 6 * 2)


@pytest.mark.parametrize(
    "function",
    [
        F.hardswish,
        F.logsigmoid,
        lambda x: F.rrelu(x, training=x.device.type == "none"),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.glu(torch.cat([x, x], 1), 1),
        lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1),
        lambda x: F.grid_sample(x, x.new_zeros(2, 4, 4, 2), align_corners=False),
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
        lambda x: x.movedim(1, -1).repeat_interleave(2, 1).movedim(-1, 1),
        lambda x: torch.roll(x, 1, 2).flip(3).cumsum(2),
        lambda x: x @ x.transpose(2, 3),
        lambda x: torch.einsum("nchw,nchw->nch", x, x)[..., None],
        lambda x: torch.stack([x, 2 * x]).softmax(0).sum(0),
        lambda x: x.std((2, 3), keepdim=True) * x.amax((2, 3), keepdim=True),
        lambda x: x.clone(memory_format=torch.channels_last).contiguous(),
    ],
)
def test_operators_that_leave_channels_alone(function):
    model = Function(lambda self, x: self.b(function(self.a(x))), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    (group,) = groups_of(model, normal(2, 3, 8, 8), training=True).prunable
    assert group.size == 6
    pairs = [(group, {0, 3, 4})]
    mask(model, pairs)
    prove(model, shrinkage(model, pairs), [InputSpec((0,), (2, 3, 8, 8), "float32")])


def test_random_slopes_in_training():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.RReLU(), nn.Conv2d(6, 2, 1))
    assert [group.size for group in groups_of(model, normal(2, 3, 8, 8), training=True).prunable] == [6]


def test_prelu():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1))
    (group,) = groups_of(model, normal(2, 3, 5, 5)).prunable
    assert "1.weight.0" in slices(group)
    check_shrinking(model, normal(2, 3, 5, 5))
    assert model[1].num_parameters == model[0].out_channels


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.mean(1, keepdim=True) + 0 * x[:, :1], "is reduced"),
        (lambda x: x[:, :3], "a part is chosen by number"),
        (lambda x: x[:, 1:2], "a part is chosen by number"),
        (lambda x: x.softmax(1)[:, :1], "the operator looks along it"),
        (lambda x: x[:, [0, 2]], "is indexed by number"),
        (lambda x: x + torch.ones(6, 1, 1), "meets a tensor of fixed size"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), "is padded"),
        (lambda x: x.unbind(1)[0], "is taken apart"),
    ],
)
def test_reason_why_channels_stay(function, reason):
    model = Function(lambda self, x: function(self.stem(x)).sum(1), stem=nn.Conv2d(3, 6, 1))
    group = group_with(groups_of(model, normal(1, 3, 4, 4)), "stem.weight", 0)
    assert reason in str(group.obstacle)


def test_one_channel_for_all_others_is_no_channel_to_remove():
    model = Function(lambda self, x: x * self.attention(x).sigmoid() * self.gain, attention=nn.Conv2d(3, 1, 1))
    model.gain = nn.Parameter(torch.ones(3, 1, 1))
    found = groups_of(model, normal(1, 3, 4, 4))
    assert str(group_with(found, "attention.weight", 0).obstacle).endswith("is broadcast")
    assert str(group_with(found, "gain", 1).obstacle).endswith("is broadcast")


def test_unknown_operator_is_a_barrier_until_a_third_party_has_a_rule():
    with torch.library._scoped_library("channels_test", "FRAGMENT") as library:
        library.define("swirl(Tensor x) -> Tensor")
        library.impl("swirl", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("swirl", torch.empty_like, "Meta")
        layer = Function(lambda self, x: torch.ops.channels_test.swirl(x))
        model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(layer), nn.Linear(6, 2))
        obstacle = group_with(groups_of(model, normal(2, 3)), "0.weight", 0).obstacle
        assert (obstacle.module, obstacle.operator) == ("1.0", "channels_test.swirl.default")
        assert "no rule says what this operator does with channels" in str(obstacle)
        try:
            rule("channels_test.swirl")(lambda step: step.same(step.dims(step.argument(0))))
            assert [group.size for group in groups_of(model, normal(2, 3)).prunable] == [6]
        finally:
            RULES.pop("channels_test.swirl")


def test_examples_of_different_paths_are_united():
    def forward(self, x):
        x = self.a(x)
        return self.c(x) if x.shape[0] == 1 else self.c(self.b(x) + x)

    model = Function(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    found = channel_groups(trace(model, [normal(1, 3), normal(2, 3)]))
    assert set(slices(group_with(found, "a.weight", 0))) >= {"a.weight.0", "b.weight.0", "b.weight.1", "c.weight.1"}
    # Costs are those of the first forward.
    assert operation_costs(found, []).of([]) == 2 * (3 * 4 + 4 * 2)


def test_classifier_that_only_training_uses():
    def forward(self, x):
        x = self.stem(x)
        return (self.head(x), self.help(x)) if self.training else self.head(x)

    model = Function(forward, stem=nn.Linear(3, 6), head=nn.Linear(6, 2), help=nn.Linear(6, 2))
    x = normal(4, 3)
    assert "help.weight.1" in slices(group_with(groups_of(model, x, training=True), "stem.weight", 0))
    check_shrinking(model, x)


def test_models_without_anything_to_remove():
    found = groups_of(nn.Linear(3, 2), normal(2, 3))
    assert found.prunable == []
    plan = shrinkage(nn.Linear(3, 2), [])
    assert not plan
    found = groups_of(Function(lambda self, x: x + 1), normal(2, 3))
    assert found.groups == []
    assert operation_costs(found, []).of([]) == 0


# Smaller tensors.


def small():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    trace_of = trace(model.eval(), normal(2, 3, 5, 5))
    (group,) = channel_groups(trace_of).prunable
    return model, group, input_specs(trace_of.forwards[0])


def test_parameters_stay_objects_and_gradients_shrink():
    model, group, _ = small()
    model(normal(2, 3, 5, 5)).sum().backward()
    weight, gradient = model[0].weight, model[0].weight.grad.clone()
    values = weight.detach().clone()
    shrinkage(model, [(group, {0, 2})]).apply(model)
    assert model[0].weight is weight
    assert torch.equal(weight, values[[1, 3]])
    assert torch.equal(weight.grad, gradient[[1, 3]])
    assert model[1].running_mean.shape == (2,)


def test_memory_format_is_kept():
    model, group, _ = small()
    model.to(memory_format=torch.channels_last)
    shrinkage(model, [(group, {0})]).apply(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()


def test_plan_goes_through_json():
    model, group, _ = small()
    plan = shrinkage(model, [(group, {1})])
    assert plan.kept["2.weight"] == {1: [0, 2, 3]}
    again = Shrinkage.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    other, _, _ = small()
    again.apply(other)
    assert other[2].weight.shape == (5, 3, 1, 1)
    assert Shrinkage.from_dict(Shrinkage().to_dict()) == Shrinkage()


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("format"),
        lambda saved: saved.update(format=2),
        lambda saved: saved.update(tensors=[]),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [3, 1]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [0, 0]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [0, 4]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [-1, 2]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": []}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"7": [0]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"x": [0]}),
        lambda saved: saved["tensors"]["2.weight"].update(shape=None),
    ],
)
def test_broken_plan(change):
    model, group, _ = small()
    saved = shrinkage(model, [(group, {1})]).to_dict()
    change(saved)
    with pytest.raises(StateError, match="not the plan of a shrunk model"):
        Shrinkage.from_dict(saved)


def test_plan_for_another_model():
    model, group, _ = small()
    plan = shrinkage(model, [(group, {1})])
    with pytest.raises(StateError, match=r"no tensor '0\.weight'"):
        plan.apply(nn.ReLU())
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"shape \(6, 3, 3, 3\), expected \(4, 3, 3, 3\)"):
        plan.apply(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_one_shrinkage_after_another():
    model, group, _ = small()
    once = copy.deepcopy(model)
    first = shrinkage(model, [(group, {0})])
    first.apply(model)
    (smaller,) = groups_of(model, normal(1, 3, 5, 5)).prunable
    second = shrinkage(model, [(smaller, {1})])
    second.apply(model)
    both = first.then(second)
    assert both.kept["0.weight"] == {0: [1, 3]}
    both.apply(once)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True))
    assert first.then(Shrinkage()) == first
    assert Shrinkage().then(first) == first


# Proof.


def test_proof_fails_when_channels_matter():
    model, group, specs = small()
    with pytest.raises(ShrinkError, match="computes something else from '2'") as raised:
        prove(model, shrinkage(model, [(group, {0})]), specs)
    assert raised.value.module == "2"
    assert not raised.value.reference


def test_proof_leaves_the_model_and_random_numbers_alone():
    model, group, specs = small()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mask(model, [(group, set())])
    prove(model, shrinkage(model, []), specs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_proof_names_the_module_with_a_size_in_its_code():
    def forward(self, x):
        return x.reshape(len(x), 6, -1).flatten(1)

    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Function(forward)), nn.Linear(6, 2))
    found_trace = trace(model, normal(2, 3))
    (group,) = channel_groups(found_trace).prunable
    pairs = [(group, {0, 1})]
    mask(model, pairs)
    with pytest.raises(ShrinkError, match=r"fails in '1\.0' \(eval mode\).*A size is written in its code") as raised:
        prove(model, shrinkage(model, pairs), input_specs(found_trace.forwards[0]))
    assert raised.value.module == "1.0"


def test_proof_of_a_model_that_draws_random_numbers_anywhere():
    def forward(self, x):
        factor = random.random() + np.random.rand() + torch.rand(()) if self.training else 1.0
        return self.b(self.a(x)) * factor

    model = Function(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    found_trace = trace(model.eval(), normal(2, 3))
    pairs = [(channel_groups(found_trace).prunable[0], {1})]
    mask(model, pairs)
    states = random.getstate(), np.random.get_state()[1].tolist()
    assert prove(model, shrinkage(model, pairs), input_specs(found_trace.forwards[0])).train_difference is not None
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_proof_of_a_model_that_does_not_run_on_random_inputs():
    def forward(self, x):
        if float(x.sum()) != 0:
            raise ValueError("only zeros")
        return self.b(self.a(x))

    model = Function(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    found_trace = trace(model, torch.zeros(2, 3))
    (group,) = channel_groups(found_trace).prunable
    with pytest.raises(ShrinkError, match=r"does not run on random inputs.*only zeros") as raised:
        prove(model, shrinkage(model, [(group, {0})]), input_specs(found_trace.forwards[0]))
    assert raised.value.reference


def test_dropout_and_nested_inputs():
    def forward(self, given, *, scale):
        return self.b(self.drop(self.a(given["x"][0]))) * scale

    class Keyword(Function):
        def forward(self, given, *, scale):
            return self._forward(self, given, scale=scale)

    model = Keyword(forward, a=nn.Linear(3, 6), drop=nn.Dropout(0.5), b=nn.Linear(6, 2))
    found_trace = trace(model, Example.of({"x": [normal(4, 3)]}, scale=normal(4, 1)))
    (group,) = channel_groups(found_trace).prunable
    specs = input_specs(found_trace.forwards[0])
    assert [InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) for spec in specs] == specs
    mask(model, [(group, {1})])
    certificate = prove(model, shrinkage(model, [(group, {1})]), specs)
    assert certificate.train_difference is not None
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


# Costs.


def test_costs_by_hand_and_through_json():
    model, group, _ = small()
    found = groups_of(model, normal(2, 3, 5, 5))
    (group,) = found.prunable
    operations, parameters = operation_costs(found, [group], 2), parameter_costs(model, [group])
    for left in range(5):
        assert operations.of([left]) == 2 * 9 * (3 * 9 * left + left * 5)
        assert parameters.of([left]) == left * (27 + 1 + 2 + 5) + 5
    for costs in (operations, parameters):
        again = Costs.from_dict(json.loads(json.dumps(costs.to_dict())))
        assert [again.of([left]) for left in range(5)] == [costs.of([left]) for left in range(5)]
    assert parameter_costs(model, []).of([]) == sum(p.numel() for p in model.parameters())
