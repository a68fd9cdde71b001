"""What a plan cannot know, and plugins that the core does not know."""

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionError,
    PluginError,
    hookimpl,
    mask_weight,
    plan_compression,
)
from compress_core.testing import fingerprint
from compress_core.transforms import raw_parameter
from tests.plan_helpers import IMAGES, LEARNED, config_of
from tests.plugin_helpers import algorithm, contributing
from tests.sections import SECTIONS, quantization, sparsity
from tests.zoo import images, trained_model

# What cannot be known is said.


@pytest.mark.parametrize(
    ("params", "known"),
    [
        ({"filter_importance": "reconstruction"}, True),
        ({"filter_importance": "reconstruction", "all_weights": True}, False),
        ({"interlayer_ranking_type": "adapted_ranking"}, False),
        ({"interlayer_ranking_type": "learned_ranking"}, False),
    ],
)
@pytest.mark.parametrize("with_data", [True, False])
def test_channels_that_data_choose(params, known, with_data):
    common = {"multiple_of": 1, "prune_first_conv": True}
    sections = [{"algorithm": "filter_pruning", "pruning_init": 0.25, "params": {**common, **params}}]
    config = config_of(sections, (images(),)) if with_data else {**IMAGES, "compression": sections}
    plan = plan_compression(trained_model("resnet"), config)
    assert any("is decided from data when the model is created" in line for line in plan.remarks())
    assert bool(plan.at_end.open) != known
    if known:  # in each group so many, whichever they are
        plain = [{"algorithm": "filter_pruning", "pruning_init": 0.25, "params": common}]
        expected = plan_compression(trained_model("resnet"), {"compression": plain}, images())
        assert plan.at_end.figures() == expected.at_end.figures()
        assert plan.at_start.figures() == expected.at_start.figures()


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("name", ["activation", "reconstruction", "second_order"])
def test_zeros_that_data_choose_are_as_many(name, mode):
    section = sparsity(weight_importance=name, sparsity_level_setting_mode=mode, sparsity_target=0.6)
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": [section]})
    plain = sparsity(sparsity_level_setting_mode=mode, sparsity_target=0.6)
    expected = plan_compression(trained_model("resnet"), {**IMAGES, "compression": [plain]})
    assert plan.at_end.nonzero == expected.at_end.nonzero
    assert plan.at_start.nonzero == expected.at_start.nonzero
    assert any(f"'{name}'" in line and "decided from data" in line for line in plan.remarks())


@pytest.mark.parametrize(
    ("kind", "more"), [("hawq", {}), ("autoq", {}), ("sensitivity", {"budget": {"average_bits": 4}})]
)
def test_bits_that_data_choose(kind, more):
    section = quantization()
    section["initializer"] = {**section["initializer"], "precision": {"type": kind, **more}}
    config = {**IMAGES, "target_device": "TRIAL", "compression": [section]}
    plan = plan_compression(trained_model("resnet"), config)
    assert any(f"chosen from data when the model is created: '{kind}'" in line for line in plan.remarks())
    assert any(" or " in target.at_end for target in plan.algorithms[0].targets)


def test_zeros_that_training_distributes_are_told_of_all_weights_together():
    plan = plan_compression(trained_model("resnet"), {"compression": LEARNED["rb"]})
    assert {target.at_end for target in plan.algorithms[0].targets} == {"its part of 40.0% zeros in all"}
    assert all(
        entry["at_end"]["density"] is None
        for entry in plan.to_dict()["parameters"].values()
        if len(entry["at_end"]["shape"]) > 1
    )


def test_a_budget_of_time_says_that_it_was_measured():
    params = {"pruning_latency_target": 0.1, "prune_first_conv": True, "multiple_of": 1}
    sections = [{"algorithm": "filter_pruning", "params": params}]
    model = trained_model("resnet")
    before = fingerprint(model)
    try:
        plan = plan_compression(model, {**IMAGES, "compression": sections})
    except CompressionError as error:  # so small a network may not become faster at all
        assert "latency" in str(error)
    else:
        assert any("creation measures again" in line for line in plan.remarks())
    assert fingerprint(model) == before


def test_training_decides():
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": LEARNED["movement"]})
    assert {target.at_end for target in plan.algorithms[0].targets} == {"masked as training decides"}
    assert plan.at_end.figures()["nonzero"] is None
    assert plan.at_end.figures()["parameters"] == plan.before.parameters
    assert "training decides" in plan.to_str()


def test_what_the_creation_runs_afterwards_is_named():
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": SECTIONS["all"]})
    assert set(plan.afterwards) == {"quantization", "batchnorm_adaptation", "weight_reconstruction"}
    assert plan.afterwards["batchnorm_adaptation"] == "runs on data"
    assert "calibrated" in plan.afterwards["quantization"]


def test_a_guard_without_its_metric_is_said():
    section = sparsity() | {"initializer": {"batchnorm_adaptation": {"guard": True}}}
    plan = plan_compression(trained_model("resnet"), {"compression": [section]})
    assert "the creation will need more" in plan.afterwards["batchnorm_adaptation"]


def test_an_algorithm_without_targets_says_that_it_adds_a_loss():
    plan = plan_compression(trained_model("resnet"), {"compression": LEARNED["distillation"]})
    found = next(entry for entry in plan.algorithms if entry.name == "knowledge_distillation")
    assert found.targets == ()
    assert "adds a loss" in found.remarks[0]


# Plugins that the core does not know.


def _masking(**members):
    @hookimpl
    def compress_plan(self, model, context):
        return context.plan_weights(model, self)

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            mask_weight(model, name, torch.zeros_like(raw_parameter(model, name)), key=self.name)

    return algorithm(**{"compress_plan": compress_plan, "compress_commit": compress_commit, **members})


def planned_with(registry, cls, model=None, **config):
    registry.register(contributing(cls), "theirs")
    return plan_compression(model or trained_model("resnet"), {**config, "compression": [{"algorithm": "mine"}]})


def test_a_plugin_that_says_nothing_of_its_effect_is_named(registry):
    plan = planned_with(registry, _masking())
    assert plan.algorithms[0].remarks == ("says nothing of its effect on size, so the figures are without it",)
    assert [target.name for target in plan.algorithms[0].targets] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert plan.at_end.figures() == plan.before.figures()
    assert "mine: says nothing of its effect on size" in plan.to_str()


def test_a_plugin_tells_its_effect(registry):
    @hookimpl
    def compress_effect(self, footprint, at_end):
        names = ["conv1.weight", "conv2.weight", "fc.weight"]
        return footprint.with_levels(dict.fromkeys(names, 1.0 if at_end else 0.5)).noted("as we say")

    plan = planned_with(registry, _masking(compress_effect=compress_effect))
    weights = sum(p.numel() for p in trained_model("resnet").parameters() if p.ndim > 1)
    assert plan.before.nonzero - plan.at_end.nonzero == weights
    assert plan.algorithms[0].targets[0].at_start == "50.0% zeros"
    assert plan.algorithms[0].targets[0].at_end == "100.0% zeros"
    assert plan.algorithms[0].remarks == ("as we say",)


@pytest.mark.parametrize("hook", ["compress_plan", "compress_commit"])
def test_a_plugin_that_asks_for_data(hook, registry):
    @hookimpl
    def asks(self, model, context):
        context.calibration_data(context.section(self)[0])

    plan = planned_with(registry, _masking(**{hook: asks}))
    assert plan.algorithms[0].remarks == ("compression.0.mine: is decided from data when the model is created",)
    assert set(plan.at_end.figures().values()) == {None}


def test_a_plugin_that_replaces_modules_is_counted(registry):
    @hookimpl
    def compress_plan(self):
        from compress_core import Plan

        return Plan(("fc.weight",))

    @hookimpl
    def compress_commit(self, model):
        model.fc = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(1, 5))

    cls = algorithm(compress_plan=compress_plan, compress_commit=compress_commit, replaces_modules=True)
    model = trained_model("resnet")
    plan = planned_with(registry, cls, model, **IMAGES)
    assert plan.before.parameters - plan.at_end.parameters == (8 * 5 + 5) - (8 + 5 + 5)
    assert plan.before.operations - plan.at_end.operations == 2 * (8 * 5) - 2 * (8 + 5)
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("returned", [7, "much", {}])
def test_a_plugin_that_returns_something_else_is_refused(returned, registry):
    @hookimpl
    def compress_effect(self):
        return returned

    with pytest.raises(PluginError, match=r"compress_effect\(\) of the algorithm 'mine'.*not a Footprint"):
        planned_with(registry, _masking(compress_effect=compress_effect))
