"""What a plan says of sizes is what a creation does."""

import pytest
import torch
from torch import nn

from compress_core import (
    create_compressed_model,
    plan_compression,
)
from compress_core.contract.footprint import Footprint
from tests.plan_helpers import LEARNED, SPARSE, config_of, cost, created
from tests.sections import SECTIONS, pruning, quantization, sparsity
from tests.zoo import ZOO, images, trained_model

# What the plan says is what happens.


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
@pytest.mark.parametrize("sections", [key for key in SECTIONS if "pruning" in key or key == "all"])
def test_pruned_models_are_as_large_as_planned(sections, name):
    inputs = (images(1),)
    section = [{**SECTIONS[sections][0], "params": {**SECTIONS[sections][0]["params"], "pruning_steps": 2}}]
    sections = [*section, *SECTIONS[sections][1:]]
    plan = plan_compression(trained_model(name), {"compression": sections}, (images(),))
    full = trained_model(name).eval()
    assert plan.before.parameters == sum(p.numel() for p in full.parameters())
    assert plan.before.operations == cost(full, inputs)
    for found, epochs in ((plan.at_start, 0), (plan.at_end, 3)):
        _, stripped = created(name, sections, epochs)
        assert found.parameters == sum(p.numel() for p in stripped.parameters())
        assert found.operations == cost(stripped.eval(), inputs)
        shapes = {name: tuple(p.shape) for name, p in stripped.named_parameters()}
        assert {name: tensor.shape for name, tensor in found.tensors.items()} == shapes
    assert plan.at_end.parameters < plan.at_start.parameters < plan.before.parameters


@pytest.mark.parametrize("target", [0.2, 0.5])
@pytest.mark.parametrize("key", ["pruning_target", "pruning_flops_target", "pruning_parameters_target"])
@pytest.mark.parametrize("is_global", [False, True])
def test_each_kind_of_target_is_planned(key, target, is_global):
    params = {key: target, "all_weights": is_global, "prune_first_conv": True, "multiple_of": 1, "pruning_steps": 1}
    sections = [{"algorithm": "filter_pruning", "params": params}]
    plan = plan_compression(trained_model("resnet"), {"compression": sections}, images())
    _, stripped = created("resnet", sections, 2)
    assert plan.at_end.parameters == sum(p.numel() for p in stripped.parameters())
    assert plan.at_end.operations == cost(stripped.eval(), (images(1),))
    assert any("weights as they are now" in line for line in plan.remarks()) == is_global


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("sections", [key for key in SECTIONS if "sparsity" in key])
def test_sparse_models_have_as_many_zeros_as_planned(sections, name):
    plan = plan_compression(trained_model(name), {"compression": SECTIONS[sections]}, ZOO[name][1]())
    for found, epochs in ((plan.at_start, 0), (plan.at_end, 60)):
        _, stripped = created(name, SECTIONS[sections], epochs)
        assert found.nonzero == sum(int(p.count_nonzero()) for p in stripped.parameters())
        assert found.parameters == plan.before.parameters
        assert found.size == plan.before.size


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("importance", ["abs", "normed_abs"])
def test_each_layer_has_as_many_zeros_as_planned(importance, mode):
    params = {"weight_importance": importance, "sparsity_level_setting_mode": mode, "sparsity_target": 0.7}
    sections = [{"algorithm": "magnitude_sparsity", "params": params}]
    plan = plan_compression(trained_model("resnet"), {"compression": sections})
    controller, _ = created("resnet", sections)
    controller.set_sparsity_level(0.7)
    for layer in controller.statistics().magnitude_sparsity.layers:
        tensor = plan.at_end.tensors[layer.name]
        assert (tensor.density, tensor.is_average) == (1 - layer.zeros / layer.weights, False)


SCHEDULES = {
    "polynomial": {"schedule": "polynomial", "sparsity_target_epoch": 8},
    "exponential": {"schedule": "exponential", "sparsity_target_epoch": 8},
    "multistep": {"schedule": "multistep", "multistep_steps": [2, 8], "multistep_sparsity_levels": [0.2, 0.4, 0.6]},
    "adaptive": {"schedule": "adaptive", "step": 0.1, "patience": 2},
}


@pytest.mark.parametrize("freeze", [1, 4, None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_that_is_cut_off_ends_where_the_masks_are_frozen(schedule, freeze):
    params = {**SCHEDULES[schedule], **({} if freeze is None else {"sparsity_freeze_epoch": freeze})}
    if schedule != "multistep":
        params["sparsity_target"] = 0.6
    sections = [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.1, "params": params}]
    plan = plan_compression(trained_model("resnet"), {"compression": sections})
    _, stripped = created("resnet", sections, 20)
    assert plan.at_end.nonzero == sum(int(p.count_nonzero()) for p in stripped.parameters())
    assert any("frozen in epoch" in line for line in plan.remarks()) == (freeze is not None)


@pytest.mark.parametrize(
    ("mode", "words"), [("early_exit", "may end before"), ("adaptive_compression_level", "searches the level")]
)
def test_accuracy_aware_training_is_said(mode, words):
    plan = plan_compression(trained_model("resnet"), {**SPARSE, "accuracy_aware_training": {"mode": mode}})
    assert any(words in line for line in plan.remarks())


def test_zeros_that_are_kept():
    model = trained_model("resnet")
    with torch.no_grad():
        model.conv2.weight[:4] = 0
    plan = plan_compression(model, {"compression": LEARNED["const"]})
    assert plan.before.nonzero == plan.at_end.nonzero == sum(int(p.count_nonzero()) for p in model.parameters())


def test_bits_of_weights_are_those_of_the_quantizers():
    sections = [
        quantization(
            per_channel=True,
            root={"bits": 4},
            scope_overrides={"weights": {"fc": {"bits": 8}}},
        )
    ]
    plan = plan_compression(trained_model("resnet"), {"target_device": "TRIAL", "compression": sections}, images())
    controller, _ = created("resnet", sections)
    quantizers = controller.algorithms["quantization"].weight_quantizers
    bits = {f"{name.partition('|')[0]}.weight": module.bits for name, module in quantizers.items()}
    assert (
        {name: plan.at_end.tensors[name].bits for name in bits}
        == bits
        == {
            "conv1.weight": 4,
            "conv2.weight": 4,
            "fc.weight": 8,
        }
    )
    scales = sum(module.scale.numel() for module in quantizers.values())
    others = sum(p.numel() for name, p in trained_model("resnet").named_parameters() if name not in bits)
    integers = sum(p.numel() for name, p in trained_model("resnet").named_parameters() if name in bits)
    assert plan.at_end.size == integers + 4 * others + 5 * scales


@pytest.mark.parametrize("sections", ["quantization, all off", "quantization, staged"])
def test_quantizers_that_begin_later_count_at_the_end_only(sections):
    plan = plan_compression(trained_model("resnet"), {"compression": SECTIONS[sections]}, images())
    later = sections.endswith("off")
    assert (plan.at_start.size == plan.before.size) == later
    assert plan.at_end.size < plan.before.size / 2


def _wide():
    """As large as the files of real networks, in which the weights count and not the graph."""

    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*block(3, 128), *block(128, 192), *block(192, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


@pytest.mark.slow
def test_files_are_as_large_as_planned(tmp_path):
    pytest.importorskip("onnxruntime")
    config = config_of([pruning(), quantization(per_channel=True)], (images(),))
    plan = plan_compression(_wide(), config)
    controller, _ = create_compressed_model(_wide(), config)
    file = tmp_path / "model.onnx"
    controller.export(file)
    assert file.stat().st_size == pytest.approx(plan.at_start.size, rel=0.03)


def test_a_model_in_training_tells_its_effect_as_well():
    sections = [pruning(pruning_steps=4), sparsity(), quantization()]
    before = Footprint.of_model(trained_model("resnet"))
    model, inputs = trained_model("resnet"), (images(),)
    controller, _ = create_compressed_model(model, config_of(sections, inputs))
    for _ in range(3):
        controller.scheduler.epoch_step()
        found = before
        for each in controller.algorithms.values():
            found = controller._lifecycle.effect(model, each, found, at_end=False)
        stripped = controller.strip()
        assert found.parameters == sum(p.numel() for p in stripped.parameters())
        assert found.operations == cost(stripped.eval(), (images(1),))
