"""Transforms follow when channels of their weights go: as they declare, with decisions frozen, proven in place."""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_core import Stage, create_compressed_model, mask_weight
from compress_core.channels import Shrinkage, ShrinkError, channel_groups, input_specs, planned_shrinkage, shrink_model
from compress_core.testing.fingerprint import fingerprint
from compress_core.trace import trace
from compress_core.transforms import (
    ActivationTransform,
    ModuleOutput,
    WeightTransform,
    add_activation_transform,
    add_weight_transform,
    get_activation_transform,
    get_weight_transform,
    raw_parameter,
)
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.quantizers import NativeFakeQuantize


class Undeclared(nn.Module):
    """Maps each value to the nearest entry of a trained codebook; says nothing about itself."""

    def __init__(self):
        super().__init__()
        self.entries = nn.Parameter(torch.linspace(-0.3, 0.3, 15))

    def forward(self, weight):
        return self.entries[(weight.unsqueeze(-1) - self.entries).abs().argmin(-1)]


class DerivedUndeclared(Undeclared, WeightTransform):
    pass


class Codebook(DerivedUndeclared):
    follows: ClassVar = {"entries": "fixed"}


class TopK(WeightTransform):
    """Keeps the half of a weight whose learned scores are largest."""

    follows: ClassVar = {"scores": "weight"}

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.rand_like(weight))

    def mask(self):
        return self.scores >= self.scores.flatten().topk(self.scores.numel() // 2).values[-1]

    def forward(self, weight):
        return weight * self.mask()


class DependentTopK(TopK):
    depends_on_whole_tensor = True


class FreezingTopK(DependentTopK):
    follows: ClassVar = {"scores": "weight", "frozen": "weight"}

    def forward(self, weight):
        return weight * (self.mask() if self.depends_on_whole_tensor else self.frozen)

    def freeze_decision(self, weight):
        self.register_buffer("frozen", self.mask())
        self.depends_on_whole_tensor = False


class Clusters(WeightTransform):
    """Like k-means of one step: values above and below the mean become the mean of their kind. It holds no tensor."""

    def forward(self, weight):
        high = weight >= weight.mean()
        return torch.where(high, weight[high].mean(), weight[~high].mean())


class FreezingClusters(Clusters):
    depends_on_whole_tensor = True
    follows: ClassVar = {"high": "weight", "means": "fixed"}

    def forward(self, weight):
        if self.depends_on_whole_tensor:
            return super().forward(weight)
        return torch.where(self.high, self.means[1], self.means[0])

    def freeze_decision(self, weight):
        high = weight >= weight.mean()
        self.register_buffer("high", high)
        self.register_buffer("means", torch.stack([weight[~high].mean(), weight[high].mean()]))
        self.depends_on_whole_tensor = False


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 4))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


def pruned(*sections, model=None):
    section = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.4,
        "params": {"prune_first_conv": True, "multiple_of": 1},
    }
    config = {
        "input_info": {"sample_size": list(X.shape)},
        "target_device": "TRIAL",
        "compression": [section, *sections],
    }
    return create_compressed_model(mlp() if model is None else model, config, init_loader=[(X, torch.zeros(8))] * 2)


def add(model, transform, name="2.weight"):
    add_weight_transform(model, name, transform, stage=Stage.PRECISION, key="mine")
    if isinstance(transform, TopK):
        # The channels that go have the largest scores: without them others would be chosen.
        mask = getattr(get_weight_transform(model, name, "filter_pruning"), "mask", torch.ones(()))
        with torch.no_grad():
            transform.scores.add_(1 - mask)
    return transform


def evaluated(model):
    with torch.no_grad():
        return model.eval()(X)


def check_strip_and_shrink(controller, model, atol=1e-6):
    """Both leave outputs as they are, though tensors are smaller; returns the stripped model."""
    expected = evaluated(model)
    before = fingerprint(model)
    small = controller.strip()
    assert fingerprint(model) == before
    assert raw_parameter(small, "2.weight").shape == (4, 9)
    torch.testing.assert_close(evaluated(small), expected, rtol=0, atol=atol)
    controller.shrink()
    assert raw_parameter(model, "2.weight").shape == (4, 9)
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=atol)
    return small


def check_refused(controller, model, match, module="2"):
    """Neither is possible, and nothing has changed."""
    expected = evaluated(model)
    before = fingerprint(model)
    for remove in (controller.strip, lambda: controller.strip(do_copy=False), controller.shrink):
        with pytest.raises(ShrinkError, match=match) as caught:
            remove()
        assert caught.value.module == module
        assert fingerprint(model) == before
    assert torch.equal(evaluated(model), expected)


# Tensors of weight transforms.


def test_a_codebook_as_long_as_the_weight_has_inputs_stays_whole():
    controller, model = pruned()
    transform = add(model, Codebook())
    entries = transform.entries.detach().clone()
    check_strip_and_shrink(controller, model)
    assert torch.equal(transform.entries, entries)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (Undeclared, "derive the class from compress_core.transforms.WeightTransform and declare follows"),
        (DerivedUndeclared, "removed; declare follows"),
    ],
)
def test_a_tensor_that_is_not_declared_is_refused_by_name(make, remedy):
    controller, model = pruned()
    add(model, make())
    check_refused(
        controller, model, rf"'mine' \({make.__name__}\) of '2.weight' .*'entries', of shape \(15,\).*{remedy}"
    )


def test_a_nested_tensor_is_declared_by_its_dotted_name():
    class Nested(WeightTransform):
        def __init__(self):
            super().__init__()
            self.inside = Codebook()

        def forward(self, weight):
            return self.inside(weight)

    controller, model = pruned()
    add(model, Nested())
    check_refused(controller, model, "'inside.entries'")
    Nested.follows = {"inside.entries": "fixed"}
    check_strip_and_shrink(controller, model)


def test_a_tensor_that_is_no_buffer_cannot_follow():
    class Hidden(WeightTransform):
        def __init__(self):
            super().__init__()
            self.factor = torch.ones(4, 15)

        def forward(self, weight):
            return weight * self.factor

    controller, model = pruned()
    add(model, Hidden())
    check_refused(controller, model, r"'factor', of shape \(4, 15\)")
    Hidden.follows = {"factor": "weight"}
    check_refused(controller, model, "'factor' as a plain attribute.*register_buffer")


def test_one_element_has_nothing_to_lose():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([[2.0]]))

        def forward(self, weight):
            return weight * self.factor

    controller, model = pruned()
    add(model, Scaled())
    check_strip_and_shrink(controller, model)


class Factor(WeightTransform):
    """Multiplies by a tensor of random numbers."""

    def __init__(self, *shape, view=None):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(shape))
        self.view = view

    def forward(self, weight):
        return weight * (self.factor if self.view is None else self.factor.view(self.view))


class ByWeight(Factor):
    follows: ClassVar = {"factor": "weight"}


class ByChannel(Factor):
    follows: ClassVar = {"factor": "channels"}


@pytest.mark.parametrize(
    ("name", "transform", "left"),
    [
        ("2.weight", lambda: ByWeight(4, 15), (4, 9)),
        ("2.weight", lambda: ByWeight(1, 15), (1, 9)),
        ("2.weight", lambda: ByWeight(15), (9,)),
        ("2.weight", lambda: ByWeight(4, 1), (4, 1)),
        ("0.weight", lambda: ByWeight(15, 6), (9, 6)),
        ("0.weight", lambda: ByChannel(15, view=(-1, 1)), (9,)),
        ("0.weight", lambda: ByChannel(15, 1), (9, 1)),
        ("0.bias", lambda: ByChannel(15), (9,)),
        ("2.weight", lambda: ByChannel(4, 1), (4, 1)),
    ],
)
def test_words(name, transform, left):
    controller, model = pruned()
    transform = add(model, transform(), name)
    values = transform.factor.detach().flatten().tolist()
    check_strip_and_shrink(controller, model)
    assert transform.factor.shape == left
    assert set(transform.factor.flatten().tolist()) <= set(values)


def test_output_channels_of_a_square_weight_are_not_its_inputs():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    controller, model = pruned(model=model)
    transform = add(model, ByChannel(6, view=(-1, 1)))
    factor, expected = transform.factor.detach().clone(), evaluated(model)
    controller.shrink()
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]
    assert kept["0"] != kept["1"]
    assert torch.equal(transform.factor, factor[kept["0"]])
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.ConvTranspose2d(6, 8, 2), 8),
        (nn.Conv2d(6, 8, 2), 8),
    ],
)
def test_output_channels_of_convolutions(layer, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    found = trace(model, (x,))
    pairs = [(group, {0, 2}) for group in channel_groups(found).prunable]
    assert len(pairs) == 2
    zero(model, pairs)
    view = (1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    transform = add(model, ByChannel(size, view=view))
    factor, expected = transform.factor.detach().clone(), model(x)
    shrink_model(model, pairs, input_specs(found.forwards[0]))
    assert torch.equal(transform.factor, factor[[1, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(model(x), expected)


def zero(model, pairs):
    with torch.no_grad():
        for group, channels in pairs:
            for member in group.members:
                gone = [i for i, channel in enumerate(member.channels.tolist()) if channel in channels]
                tensor = dict(model.named_parameters())[member.parameter]
                tensor.index_fill_(member.dim, torch.tensor(gone), 0)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (ByWeight(3, 5, view=(1, 15)), r"'factor', of shape \(3, 5\), follows as 'weight', but does not broadcast"),
        (ByChannel(15), r"'factor', of shape \(15,\), follows as 'channels', but the weight has 4 output channels"),
    ],
)
def test_declared_words_that_cannot_be_true(transform, message):
    controller, model = pruned()
    add(model, transform)
    check_refused(controller, model, message)


def test_an_unknown_word_is_refused():
    class Misspelt(Factor):
        follows: ClassVar = {"factor": "wieght"}

    controller, model = pruned()
    add(model, Misspelt(4, 15))
    check_refused(controller, model, "'wieght'; there are 'weight', 'channels', 'fixed'")


class Transposed(Factor):
    """Holds the weight's factors the other way round, which no word says."""

    def forward(self, weight):
        return weight * self.factor.T

    def shrunk_dims(self, name, tensor, shape, kept):
        return {1 - dim: indices for dim, indices in kept.items()} if name == "factor" else None


def test_what_words_cannot_say():
    controller, model = pruned()
    transform = add(model, Transposed(15, 4))
    check_strip_and_shrink(controller, model)
    assert transform.factor.shape == (9, 4)


@pytest.mark.parametrize("wrong", [{0: [99]}, {0: [3, 1]}, {5: [0]}, {0: []}])
def test_wrong_answers_are_refused(wrong):
    class Wrong(Transposed):
        def shrunk_dims(self, name, tensor, shape, kept):
            return wrong

    controller, model = pruned()
    add(model, Wrong(15, 4))
    check_refused(controller, model, "says by shrunk_dims that of its tensor 'factor'")


def test_a_transform_of_two_weights_that_lose_other_channels():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    controller, model = pruned(model=model)
    transform = add(model, ByWeight(6, 6))
    add(model, transform, "0.weight")
    check_refused(controller, model, "shares its tensor 'factor' with another weight", module="2")


def test_a_codebook_of_two_weights():
    controller, model = pruned()
    transform = add(model, Codebook())
    add(model, transform, "0.weight")
    # Both layers are masked: what the codebook makes of zeros is zero, as 0 is one of its entries.
    check_strip_and_shrink(controller, model)
    assert len(transform.entries) == 15


def test_the_optimizer_and_the_average_follow():
    controller, model = pruned()
    transform = add(model, ByWeight(4, 15))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()(X).square().mean().backward()
    optimizer.step()
    ema = copy.deepcopy(model)
    expected = evaluated(ema)
    controller.shrink(optimizer, ema)
    assert optimizer.state[transform.factor]["momentum_buffer"].shape == (4, 9)
    torch.testing.assert_close(evaluated(ema), expected, rtol=0, atol=1e-6)
    model.train()(X).square().mean().backward()
    optimizer.step()


# Decisions on the whole tensor.


def test_top_k_that_cannot_be_frozen_is_refused_with_the_remedy():
    controller, model = pruned()
    add(model, DependentTopK(raw_parameter(model, "2.weight")))
    check_refused(controller, model, r"'mine' \(DependentTopK\) of '2.weight' depends on the whole .*freeze_decision")


@pytest.mark.parametrize("make", [TopK, lambda weight: Clusters()])
def test_what_does_not_say_that_it_depends_on_the_whole_tensor_is_found_by_the_proof(make):
    controller, model = pruned()
    add(model, make(raw_parameter(model, "2.weight")))
    check_refused(controller, model, "computes something else from '2' on", module="2")


@pytest.mark.parametrize("make", [FreezingTopK, lambda weight: FreezingClusters()])
def test_frozen_decisions_are_cut_with_the_weight(make):
    controller, model = pruned()
    transform = add(model, make(raw_parameter(model, "2.weight")))
    computed = get_computed(model)
    small = check_strip_and_shrink(controller, model)
    assert not transform.depends_on_whole_tensor
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]["1"]
    assert torch.equal(get_computed(model), computed[:, kept])
    assert torch.equal(small[2].weight, computed[:, kept])


def get_computed(model):
    with torch.no_grad():
        return model.eval()[2].weight.clone()


def test_a_frozen_decision_goes_through_the_average_and_training():
    controller, model = pruned()
    transform = add(model, FreezingTopK(raw_parameter(model, "2.weight")))
    ema = copy.deepcopy(model)
    with torch.no_grad():
        get_weight_transform(ema, "2.weight", "mine").scores.copy_(torch.rand(4, 15))  # decides otherwise
    expected = evaluated(ema)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    controller.shrink(optimizer, ema)
    assert transform.training
    torch.testing.assert_close(evaluated(ema), expected, rtol=0, atol=1e-6)
    model.train()(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(pickle.loads(pickle.dumps(model)).eval()(X), model.eval()(X))


class NotFrozen(FreezingTopK):
    def freeze_decision(self, weight):
        self.register_buffer("frozen", self.mask())


class FrozenOtherwise(FreezingTopK):
    def freeze_decision(self, weight):
        super().freeze_decision(weight)
        self.frozen.logical_not_()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NotFrozen, "still depends on the whole tensor after freeze_decision"),
        (FrozenOtherwise, "computes something else after freeze_decision"),
    ],
)
def test_freezing_that_does_not_do_it_is_refused(cls, message):
    controller, model = pruned()
    add(model, cls(raw_parameter(model, "2.weight")))
    check_refused(controller, model, message)


def test_one_decision_for_two_weights_cannot_be_frozen():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    controller, model = pruned(model=model)
    transform = add(model, FreezingTopK(raw_parameter(model, "2.weight")))
    add(model, transform, "0.weight")
    before = fingerprint(model)
    with pytest.raises(ShrinkError, match="is a transform of other weights as well"):
        controller.shrink()
    assert fingerprint(model) == before


def test_layers_that_lose_nothing_need_no_declaration():
    model = nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 5), nn.ReLU(), nn.Linear(5, 4))
    controller, model = pruned(model=model)
    assert controller.pruned_module_groups == {0: ["0"], 1: ["2"]}
    controller.set_pruning_level({0: 0.4, 1: 0.0})
    untouched = add(model, DependentTopK(raw_parameter(model, "4.weight")), "4.weight")
    expected = evaluated(model)
    controller.shrink()
    assert untouched.depends_on_whole_tensor
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=1e-6)


# Activation transforms.


class ByActivation(ActivationTransform):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)


class Slopes(ByActivation):
    """A factor for each channel."""

    follows: ClassVar = {"values": "channels"}

    def forward(self, x):
        return x * self.values


class Levels(ByActivation):
    """Rounds to entries of a codebook."""

    follows: ClassVar = {"values": "fixed"}

    def forward(self, x):
        return self.values[(x.detach().unsqueeze(-1) - self.values).abs().argmin(-1)]


class FixedSlopes(Slopes):
    follows: ClassVar = {"values": "fixed"}


class SilentSlopes(Slopes):
    follows = None


def activation(model, transform, module="0"):
    add_activation_transform(model, ModuleOutput(module), transform, stage=Stage.PRECISION, key="mine")
    return transform


def test_activation_transforms_follow_where_the_trace_finds_channels():
    controller, model = pruned()
    slopes = activation(model, Slopes(torch.rand(15)))
    levels = activation(model, Levels(torch.linspace(-1, 1, 15)), "1")
    first = slopes.values.detach().clone()
    check_strip_and_shrink(controller, model)
    assert slopes.values.shape == (9,)
    assert set(slopes.values.tolist()) <= set(first.tolist())
    assert levels.values.shape == (15,)


def test_activation_transforms_behind_a_weight_that_cannot_be_traced_follow():
    controller, model = pruned()
    add(model, Codebook(), "0.weight")
    slopes = activation(model, Slopes(torch.rand(15)))
    check_strip_and_shrink(controller, model)
    assert slopes.values.shape == (9,)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (SilentSlopes, r"'mine' \(SilentSlopes\) of .*'values', of shape \(15,\).*declare follows"),
        (FixedSlopes, r"'mine' \(FixedSlopes\) of .*'values' as 'fixed', but dimension 0 of it goes"),
    ],
)
def test_activation_transforms_that_do_not_say_or_say_wrong(cls, message):
    controller, model = pruned()
    activation(model, cls(torch.rand(15)))
    check_refused(controller, model, message, module="0")


# What the built-in algorithms add.


@pytest.mark.parametrize("make", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
def test_quantizers_for_channels_follow(make):
    controller, model = pruned()
    x = torch.linspace(0.5, 1.5, 15)
    weights, activations = add(model, make((15, 1)), "0.weight"), activation(model, make((1, 15)))
    native = make((1, 15))
    for quantizer, shape in ((weights, (15, 1)), (activations, (1, 15)), (native, (1, 15))):
        quantizer.signed = True
        quantizer.set_range(-x.view(shape), 2 * x.view(shape))
    native = activation(model, NativeFakeQuantize(native), "1")
    before = {name: p.detach().clone() for name, p in weights.named_parameters()}
    scale = native.scale.clone()
    check_strip_and_shrink(controller, model)
    kept = controller.shrink_plan["tensors"]["0.weight"]["kept"]["0"]
    for name, values in before.items():
        assert torch.equal(weights.get_parameter(name), values[kept])
        assert torch.equal(activations.get_parameter(name), values[kept].view(1, 9))
    assert torch.equal(native.scale, scale[kept])
    assert native.zero_point.shape == (9,)


def test_masks_follow():
    controller, model = pruned()
    mask = (torch.rand(4, 15, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mine = mask_weight(model, "2.weight", mask)
    column = mask_weight(model, "2.weight", mask[:, :1], key="column")
    own = get_weight_transform(model, "2.weight", "filter_pruning")
    check_strip_and_shrink(controller, model)
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]["1"]
    assert torch.equal(mine.mask, mask[:, kept])
    assert torch.equal(column.mask, mask[:, :1])
    assert torch.equal(own.mask, torch.ones(own.mask.shape))


SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
QUANTIZATION = {
    "algorithm": "quantization",
    "weights": {"per_channel": True},
    "activations": {"per_channel": True},
    "initializer": {"range": {"num_init_samples": 16}},
}


@pytest.mark.parametrize("sections", [(SPARSITY,), (QUANTIZATION,), (SPARSITY, QUANTIZATION)])
@pytest.mark.parametrize("make", [None, Codebook, FreezingClusters])
def test_everything_together(sections, make):
    controller, model = pruned(*sections)
    if make is not None:
        add(model, make())
    check_strip_and_shrink(controller, model)
    found = controller.statistics().to_dict()["filter_pruning"]["certificate"]
    assert found["dtype"] == "float64"
    assert found["eval_difference"] < 1e-9
    assert found["train_difference"] < 1e-9


# Planning changes nothing; what copies and compiles goes on to.


def test_planning_leaves_the_model_and_random_numbers_alone():
    torch.manual_seed(0)
    model = mlp().eval()
    found = trace(model, (X,))
    (group,) = channel_groups(found).prunable
    zero(model, [(group, {1, 4})])
    transform = add(model.train(), FreezingTopK(raw_parameter(model, "2.weight")))
    before, state = fingerprint(model), torch.get_rng_state()
    planned, _ = planned_shrinkage(model, [(group, {1, 4})], input_specs(found.forwards[0]))
    assert "2.weight_transforms.weight.mine.frozen" in planned.kept
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert transform.training
    assert transform.depends_on_whole_tensor


def test_a_plan_is_followed_by_a_model_whose_decisions_are_not_frozen_yet():
    found = trace(mlp().eval(), (X,))
    (group,) = channel_groups(found).prunable
    models = [mlp().eval(), mlp().eval()]
    for model in models:
        zero(model, [(group, {1, 4})])
        add(model, FreezingTopK(raw_parameter(model, "2.weight")))
    planned, _ = shrink_model(models[0], [(group, {1, 4})], input_specs(found.forwards[0]))
    saved = Shrinkage.from_dict(json.loads(json.dumps(planned.to_dict())))
    saved.check(models[1])
    saved.apply(models[1])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(evaluated(models[1]), evaluated(models[0]))


def test_declared_transforms_copy_pickle_and_compile():
    controller, model = pruned()
    mask_weight(model, "2.weight")
    activation(model, SymmetricFakeQuantize((1, 15)), "1")
    expected = evaluated(model)
    assert torch.equal(evaluated(copy.deepcopy(model)), expected)
    assert torch.equal(evaluated(pickle.loads(pickle.dumps(model))), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluated(compiled), expected)
    controller.shrink()
    assert get_activation_transform(model, ModuleOutput("1"), "mine").scale.shape == (1, 9)
    torch.testing.assert_close(evaluated(torch.compile(model, fullgraph=True, backend="aot_eager")), evaluated(model))
