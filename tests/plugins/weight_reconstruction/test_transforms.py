"""What a weight may be is the transforms' to say."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_core import Algorithm, Stage, create_compressed_model, hookimpl
from compress_core.registry import use_registry
from compress_core.transforms import (
    ProjectingTransform,
    WeightGrid,
    WeightMask,
    WeightTransform,
    add_weight_transform,
    raw_parameter,
    transformed_weight,
)
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from tests.contract.algorithms import fresh
from tests.plugins.weight_reconstruction.helpers import (
    batches,
    copied,
    output_error,
    section,
    seeded,
    trained_convnet,
)


class Thirds(ProjectingTransform):
    """A third party's grid: multiples of a third."""

    follows: ClassVar = {}
    step = 1 / 3

    def allowed_values(self, weight):
        return WeightGrid(torch.tensor(self.step), torch.tensor(0), -9, 9)

    def forward(self, weight):
        return (weight / self.step).round().clamp(-9, 9) * self.step


class Blocks(ProjectingTransform):
    """A third party's mask, of whole blocks, which is no WeightMask."""

    follows: ClassVar = {"kept": "weight"}

    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", kept)

    def support(self, weight):
        return self.kept

    def forward(self, weight):
        return torch.where(self.kept, weight, 0.0)


class Shrunk(WeightTransform):
    """Not a projection, and says nothing."""

    def forward(self, weight):
        return 0.9 * weight


def blocks(weight):
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept.flatten(1)[:, ::2] = False
    return Blocks(kept)


def making(*made, stage=Stage.SPARSITY):
    """An algorithm that adds transforms to every weight."""

    class Mine(Algorithm):
        name = "mine"

        @hookimpl
        def compress_plan(self, model, context):
            return context.plan_weights(model, self)

        @hookimpl
        def compress_commit(self, model, plan):
            for name in plan.targets:
                for number, make in enumerate(made):
                    key = self.name if not number else f"{self.name}{number}"
                    add_weight_transform(model, name, make(raw_parameter(model, name)), stage=stage, key=key)

    Mine.stage = stage
    return Mine


def run(model, algorithm, data, *others):
    mine = {"algorithm": "mine", "initializer": {"weight_reconstruction": {"num_samples": 64}}}
    with use_registry(fresh(algorithm)):
        controller, _ = create_compressed_model(model, {"compression": [mine, *others]}, init_loader=data)
    return controller.statistics().weight_reconstruction.report


def test_a_third_partys_mask_is_reconstructed():
    model, data = trained_convnet(), batches(3, 8, 8)
    original = copied(model)
    report = run(model, making(blocks), data)
    assert not report.left_alone and len(report.layers) == 4
    assert report.output_error[1] < 0.5 * report.output_error[0]
    for name in ("stem.weight", "conv2.weight"):
        assert not transformed_weight(model, name).flatten(1)[:, ::2].any()
    assert output_error(model, original, batches(3, 8, 8, seed=5)) < report.output_error[0]


def test_a_third_partys_grid_is_rounded_to():
    model, data = trained_convnet(), batches(3, 8, 8)
    report = run(model, making(lambda weight: Thirds()), data)
    assert not report.left_alone
    assert report.output_error[1] < report.output_error[0]
    for layer in report.layers:
        stored = raw_parameter(model, layer.name).detach()
        torch.testing.assert_close(stored, transformed_weight(model, layer.name))
        assert layer.after <= layer.before


def test_mask_then_grid_compose():
    model, data = trained_convnet(), batches(3, 8, 8)
    report = run(model, making(blocks, lambda weight: Thirds()), data)
    assert not report.left_alone and report.output_error[1] < report.output_error[0]
    for layer in report.layers:
        weight = transformed_weight(model, layer.name)
        assert not weight.flatten(1)[:, ::2].any()
        torch.testing.assert_close((3 * weight).round() / 3, weight)


def test_a_transform_that_says_nothing_is_left_alone_with_the_reason():
    model, data = trained_convnet(), batches(3, 8, 8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = run(model, making(lambda weight: Shrunk()), data)
    assert set(report.left_alone) == {"stem.weight", "conv1.weight", "conv2.weight", "fc.weight"}
    assert report.left_alone["fc.weight"] == "its transform 'mine' (Shrunk) does not say which weights it allows"
    assert all(torch.equal(raw_parameter(model, name), value) for name, value in before.items())
    assert not report.layers


def test_two_grids_are_left_alone():
    report = run(trained_convnet(), making(lambda w: Thirds(), lambda w: Thirds()), batches(3, 8, 8))
    assert report.left_alone["fc.weight"] == "its transform 'mine1' is a second grid"


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("sparse", [False, True])
def test_quantized_weights_stay_on_their_grid_and_get_better(bits, mode, sparse):
    data, original = batches(3, 8, 8), trained_convnet()
    sections = [
        {"algorithm": "quantization", "weights": {"bits": bits, "mode": mode}, "activations": {"bits": 8}},
    ]
    if sparse:
        sections.append(section(level=0.5, num_samples=0))
    errors = []
    for samples in (0, 64):
        sections[0]["initializer"] = {"weight_reconstruction": {"num_samples": samples}}
        sections[0]["initializer"]["batchnorm_adaptation"] = {"num_bn_adaptation_samples": 64}
        model = copied(original)
        create_compressed_model(model, {"compression": sections, "target_device": "TRIAL"}, init_loader=data)
        errors.append(output_error(model, original, batches(3, 8, 8, seed=5)))
        for name in ("stem.weight", "conv1.weight", "fc.weight"):
            values = transformed_weight(model, name)
            assert all(len(row.unique()) <= 2**bits for row in values)
            if samples and not sparse:
                torch.testing.assert_close(raw_parameter(model, name).detach(), values)
    assert errors[1] < 0.8 * errors[0]


def test_filter_pruning_is_reconstructed_on_the_kept_channels():
    data, original = batches(3, 8, 8), trained_convnet()
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.4,
        "params": {"pruning_target": 0.4, "multiple_of": 1, "prune_first_conv": True},
    }
    errors = []
    for samples in (0, 64):
        pruning["initializer"] = {
            "weight_reconstruction": {"num_samples": samples},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 64},
        }
        model = copied(original)
        controller, _ = create_compressed_model(model, {"compression": pruning}, init_loader=data)
        errors.append(output_error(model, original, batches(3, 8, 8, seed=5)))
        controller.shrink()
        shrunk = output_error(model, original, batches(3, 8, 8, seed=5))
        assert shrunk == pytest.approx(errors[-1], rel=1e-4)
    assert errors[1] < 0.8 * errors[0]


def test_masks_declare_their_support():
    mask = WeightMask(torch.tensor([True, False]))
    assert torch.equal(mask.support(torch.ones(2)), torch.tensor([True, False]))
    assert mask.allowed_values(torch.ones(2)) is None
    assert torch.equal(mask.project(torch.ones(2)), torch.tensor([1.0, 0.0]))


def test_no_transform_is_a_model_without_anything_to_do():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4)))
    report = run(model, making(), batches(4))
    assert report.notes[-1] == "there is no weight to reconstruct" and not report.layers


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("kind", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
def test_a_quantizer_takes_another_step_and_keeps_its_zero_point(kind, logarithm):
    weight = torch.randn(4, 6)
    quantizer = kind((4, 1), bits=3, logarithm_scale=logarithm)
    quantizer.signed = True
    quantizer.set_range(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))
    before = quantizer.allowed_values(weight)
    wanted = before.scale * torch.tensor([[0.5], [0.8], [1.0], [1.3]])
    quantizer.set_scale(wanted)
    after = quantizer.allowed_values(weight)
    torch.testing.assert_close(after.scale, wanted)
    assert torch.equal(after.zero_point, before.zero_point)
    quantizer.enabled = False
    assert quantizer.allowed_values(weight) is None


def test_a_grid_that_two_weights_share_is_not_adjusted():
    class Shared(Thirds):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def allowed_values(self, weight):
            return WeightGrid(torch.tensor(self.step), torch.tensor(0), -9, 9, adjustable=True)

        def set_scale(self, scale):
            self.calls += 1

    for shared in (True, False):
        one = Shared()
        made = [one] if shared else []

        def make(weight, made=made, shared=shared):
            if not shared:
                made.append(Shared())
            return made[-1]

        run(trained_convnet(), making(make), batches(3, 8, 8))
        assert any(transform.calls for transform in made) != shared
