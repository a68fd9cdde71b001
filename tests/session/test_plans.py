"""`plan_compression`: what it says is what the creation does, and the model is not touched."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress_core import (
    CompressionError,
    DataError,
    ModelError,
    PluginError,
    create_compressed_model,
    hookimpl,
    mask_weight,
    plan_compression,
    register_default_init_args,
)
from compress_core.contract.footprint import Footprint
from compress_core.testing import fingerprint
from compress_core.transforms import raw_parameter
from tests.instants import Instants
from tests.plugin_helpers import algorithm, contributing
from tests.sections import SECTIONS, pruning, quantization, sparsity
from tests.zoo import ZOO, ResidualNet, images, trained_model

SPARSE = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}}
IMAGES = {"input_info": {"sample_size": [2, 3, 8, 8]}}
LEARNED = {
    "const": [{"algorithm": "const_sparsity"}],
    "rb": [{"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.4}}],
    "movement": [
        {
            "algorithm": "movement_sparsity",
            "params": {
                "warmup_start_epoch": 1,
                "warmup_end_epoch": 3,
                "importance_regularization_factor": 0.1,
                "enable_structured_masking": False,
            },
        }
    ],
    "distillation": [{"algorithm": "knowledge_distillation", "type": "mse"}, sparsity()],
}
ALL = {**SECTIONS, **LEARNED}


def cost(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def config_of(sections, inputs):
    """A config with data, for the creation."""
    config = {"target_device": "TRIAL", "compression": [*sections]}
    return register_default_init_args(config, [(inputs[0], torch.zeros(len(inputs[0])))])


def created(name, sections, epochs=0):
    """The stripped model of a creation; the schedule is followed for some epochs, without training."""
    model, inputs = trained_model(name), ZOO[name][1]()
    controller, model = create_compressed_model(model, config_of(sections, inputs))
    for _ in range(epochs):
        controller.scheduler.epoch_step()
    return controller, controller.strip()


# The law: nothing is touched.


@pytest.mark.parametrize(("name", "training"), [("resnet", True), ("transformer", False)])
@pytest.mark.parametrize("sections", ALL)
def test_a_plan_touches_nothing(sections, name, training):
    model, inputs = trained_model(name), ZOO[name][1]()
    model.train(training)
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *arguments: None)
    before = fingerprint(model)
    try:
        plan_compression(model, {"target_device": "TRIAL", "compression": ALL[sections]}, inputs)
    except CompressionError:  # a network without convolutions has nothing to prune, for example
        assert name == "transformer"
    assert fingerprint(model) == before


@pytest.mark.parametrize("number", [1, 10, 300, 3000, 20000, 60000])
def test_a_plan_that_is_interrupted_touches_nothing(number):
    model = trained_model("resnet").train()
    before = fingerprint(model)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Instants(saving=True, wanted=number, action=stop):
        plan_compression(model, {"compression": SECTIONS["all"]}, images())
    assert fingerprint(model) == before


def test_a_forward_that_counts_its_calls_leaves_no_trace():
    seen = []

    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            seen.append(x.shape)
            return super().forward(x)

    model = Counting(nn.Linear(4, 4))
    plan_compression(model, {"compression": [quantization()]}, torch.rand(2, 4))
    assert (Counting.calls, seen) == (0, [])


def test_a_model_that_cannot_be_copied_is_refused():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one")

    with pytest.raises(ModelError, match=r"copy of the model.*there is only one"):
        plan_compression(Single(4, 4), SPARSE)


def test_data_that_are_given_are_not_read_but_for_an_example():
    class Loader:
        batches = 0

        def __iter__(self):
            for _ in range(100):
                Loader.batches += 1
                yield images(), torch.zeros(4)

    config = register_default_init_args({"compression": SECTIONS["all"]}, Loader())
    plan_compression(trained_model("resnet"), config)
    assert Loader.batches == 1


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


# Without an example input.


def test_what_needs_no_trace_is_planned_without_an_example():
    plan = plan_compression(trained_model("resnet"), SPARSE)
    assert plan.at_start.nonzero < plan.before.nonzero
    assert plan.before.figures()["operations"] is None
    assert "no example input" in plan.to_str()


@pytest.mark.parametrize("sections", [[pruning()], [quantization()], [sparsity(), quantization()]])
def test_what_needs_a_trace_is_refused_as_by_the_creation(sections):
    with pytest.raises(DataError) as planned:
        plan_compression(trained_model("resnet"), {"compression": sections})
    with pytest.raises(DataError) as made:
        create_compressed_model(trained_model("resnet"), {"compression": sections})
    assert str(planned.value) == str(made.value)


@pytest.mark.parametrize(
    "config",
    [
        {"compression": {"algorithm": "magnitude_sparsty"}},
        {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 2}},
        {"compression": {"algorithm": "magnitude_sparsity", "ignored_scopes": ["nowhere"]}},
        {"compression": {"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep", "power": 2}}},
        {**IMAGES, "compression": [pruning(pruning_flops_target=0.99)]},
        {**IMAGES, "compression": [quantization(scope_overrides={"weights": {"nowhere": {"bits": 4}}})]},
        {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"batchnorm_adaptation": {"method": "x"}}}},
    ],
)
def test_errors_of_the_config_are_those_of_the_creation(config):
    data = [(images(), torch.zeros(4))]
    with pytest.raises(CompressionError) as planned:
        plan_compression(trained_model("resnet"), config)
    with pytest.raises(CompressionError) as made:
        create_compressed_model(trained_model("resnet"), config, init_loader=data)
    assert (type(planned.value), str(planned.value)) == (type(made.value), str(made.value))


def test_a_compressed_model_is_refused():
    _, model = create_compressed_model(trained_model("resnet"), SPARSE)
    with pytest.raises(ModelError, match="compressed already"):
        plan_compression(model, SPARSE)


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


# The report.


def test_the_report_is_the_same_in_all_its_forms():
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": SECTIONS["all"]})
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert values["before"]["parameters"] == plan.before.parameters
    assert values["at_end"]["operations"] == plan.at_end.operations
    assert [entry["name"] for entry in values["algorithms"]] == ["filter_pruning", "magnitude_sparsity", "quantization"]
    assert "compression.0.filter_pruning.pruning_init" in values["ledger"]
    total = sum(math.prod(entry["at_end"]["shape"]) for entry in values["parameters"].values())
    assert total == values["at_end"]["parameters"]
    text, complete = plan.to_str(), plan.to_str(complete=True)
    for algorithm_ in plan.algorithms:
        assert f"{algorithm_.name}: would change" in text
        for target in algorithm_.targets:
            assert target.name in complete
        for name, reason in algorithm_.skipped.items():
            assert name in complete
            assert reason.split()[0] in text
    assert str(plan) == text


def test_a_notebook_shows_the_page_or_without_jinja2_the_tables(monkeypatch):
    from compress_core.pages import page

    plan = plan_compression(trained_model("resnet"), SPARSE)
    shown = plan._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert shown.count("<") == 2  # the page is an attribute of the frame
    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "<iframe" not in plan._repr_html_()
    assert "would change" in plan._repr_html_()


def test_the_page_has_a_row_for_each_parameter(tmp_path):
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": SECTIONS["all"]})
    plan.write_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    for name, _ in trained_model("resnet").named_parameters():
        assert f">{name}</th>" in text


def test_a_plan_holds_no_model(registry):
    import gc
    import weakref

    made = []

    class Watched(ResidualNet):
        def __deepcopy__(self, memo):
            twin = ResidualNet()
            made.append(weakref.ref(twin))
            return twin

    plan = plan_compression(Watched(), SPARSE)
    gc.collect()
    assert plan
    assert made
    assert all(reference() is None for reference in made)
