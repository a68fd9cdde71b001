"""Which channels must stay, and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.channels import (
    InputSpec,
    channel_groups,
    input_specs,
    operation_costs,
    prove,
    removable_groups,
    shrinkage,
)
from compress_core.channels.rules import RULES, rule
from compress_core.trace import trace
from tests.channel_helpers import check_shrinking, group_with, groups_of, mask, slices
from tests.channels.small_models import Function, normal


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(4), "normalized over"),
        (nn.GroupNorm(1, 6), "all channels are normalized together"),
        (nn.GroupNorm(2, 6, affine=False), "the number of groups is written in the code"),
    ],
    ids=["layer", "one group", "no tensors"],
)
def test_normalization_over_channels(norm, reason):
    if isinstance(norm, nn.LayerNorm):
        model, x = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)), normal(2, 3)
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 1)), normal(2, 3, 4, 4)
    found = groups_of(model, x)
    assert not found.prunable
    assert reason in str(group_with(found, "0.weight", 0).obstacle)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_channels_that_are_normalized_together_go_together(groups):
    norm = nn.GroupNorm(groups, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 2, 1))
    (group,) = groups_of(model, normal(2, 3, 4, 4)).prunable
    assert slices(group) == {
        key: [i // (6 // groups) for i in range(6)]
        for key in ["0.weight.0", "0.bias.0", "1.weight.0", "1.bias.0", "3.weight.1"]
    }
    check_shrinking(model, normal(2, 3, 4, 4))
    assert norm.num_channels == model[0].out_channels < 6
    assert norm.num_channels == norm.num_groups * (6 // groups)


def test_groups_of_channels_whose_number_is_in_the_code_stay():
    def forward(self, x):
        return self.out(F.group_norm(self.stem(x), 2, self.norm.weight, self.norm.bias))

    model = Function(forward, stem=nn.Conv2d(3, 8, 1), norm=nn.GroupNorm(2, 8), out=nn.Conv2d(8, 2, 1)).eval()
    found_trace = trace(model, normal(2, 3, 4, 4))
    specs = input_specs(found_trace.forwards[0])
    groups, broken = removable_groups(model, channel_groups(found_trace).prunable, specs)
    assert not groups
    assert "computes something else" in broken[0][1]


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


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(10, 6, mode=mode), nn.Linear(6, 3)

        def forward(self, rows):
            return self.head(self.bag(rows))

    model, rows = Bags(), torch.arange(8).reshape(2, 4)
    for training in (False, True):
        found = groups_of(model, rows, training=training)
        (group,) = found.prunable
        assert set(slices(group)) == {"bag.weight.1", "head.weight.1"}
        assert "rows are chosen by number" in str(group_with(found, "bag.weight", 0).obstacle)
    check_shrinking(model, rows)
    assert model.bag.embedding_dim == model.head.in_features < 6


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


class OwnLinear(nn.Module):
    """A layer as GPT-2 has it: it knows its sizes, and its forward uses one of them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.outputs, self.calls = inputs, outputs, 1
        self.weight, self.bias = nn.Parameter(normal(inputs, outputs)), nn.Parameter(normal(outputs))

    def forward(self, x):
        product = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return product.view(*x.shape[:-1], self.outputs)


def test_sizes_that_a_layer_of_ones_own_knows_follow():
    model = nn.Sequential(OwnLinear(3, 12), nn.GELU(), OwnLinear(12, 1))
    check_shrinking(model, normal(2, 5, 3))
    assert model[0].weight.shape == (3, model[0].outputs)
    assert model[2].weight.shape == (model[2].inputs, 1) == (model[0].outputs, 1)
    assert model[0].outputs < 12
    assert (model[0].inputs, model[2].outputs, model[0].calls) == (3, 1, 1)


def test_a_size_that_two_dimensions_share_is_not_guessed():
    model = nn.Sequential(nn.Linear(3, 12), OwnLinear(12, 12), nn.Linear(12, 2)).eval()
    found_trace = trace(model, normal(2, 5, 3))
    specs = input_specs(found_trace.forwards[0])
    groups, broken = removable_groups(model, channel_groups(found_trace).prunable, specs)
    (kept,), ((failed, reason),) = groups, broken
    assert {"1.weight.0", "1.weight.1"} <= {*slices(kept), *slices(failed)}
    assert "fails in '1'" in reason and "A size is written in its code" in reason


class Checked(nn.Module):
    """A block that knows the number of its channels and checks it, without tensors of its own."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels + 2, 1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


def test_the_number_of_channels_that_a_block_checks_follows():
    model = nn.Sequential(nn.Conv2d(3, 12, 1), Checked(12), nn.ReLU(), nn.Conv2d(14, 2, 1))
    check_shrinking(model, normal(2, 3, 4, 4))
    assert model[1].channels == model[0].out_channels < 12
    assert model[3].in_channels < 14
