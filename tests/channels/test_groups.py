"""Which channels belong together."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.channels import (
    Role,
)
from tests.channel_helpers import check_shrinking, group_with, groups_of, slices
from tests.channels.small_models import Function, normal


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_transformer_encoder_layer():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    _, plan, _ = check_shrinking(model, normal(2, 4, 8))
    assert set(plan.kept) == {"0.linear1.weight", "0.linear1.bias", "0.linear2.weight"}
