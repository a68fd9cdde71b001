"""Transforms of activations and those of the built-in algorithms when channels go."""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_core import Stage, mask_weight
from compress_core.channels import Shrinkage, channel_groups, input_specs, planned_shrinkage, shrink_model
from compress_core.testing.fingerprint import fingerprint
from compress_core.trace import trace
from compress_core.transforms import (
    ActivationTransform,
    ModuleOutput,
    add_activation_transform,
    get_activation_transform,
    get_weight_transform,
    raw_parameter,
)
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.quantizers import NativeFakeQuantize
from tests.channels.following_helpers import (
    Codebook,
    FreezingClusters,
    FreezingTopK,
    X,
    add,
    check_refused,
    check_strip_and_shrink,
    evaluated,
    mlp,
    pruned,
    zero,
)


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
    mask = torch.rand(4, 15, generator=torch.Generator().manual_seed(0)) > 0.5
    mine = mask_weight(model, "2.weight", mask)
    column = mask_weight(model, "2.weight", mask[:, :1], key="column")
    own = get_weight_transform(model, "2.weight", "filter_pruning")
    check_strip_and_shrink(controller, model)
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]["1"]
    assert torch.equal(mine.mask, mask[:, kept])
    assert torch.equal(column.mask, mask[:, :1])
    assert torch.equal(own.mask, torch.ones(own.mask.shape, dtype=torch.bool))


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
