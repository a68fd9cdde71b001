"""Batch-norm adaptation as a user meets it: what it touches, when it runs, how it is repeated."""

import copy
import itertools
import json
import logging

import pytest
import torch
from torch import nn

from compress_core import (
    BNAdaptationInitArgs,
    ConfigError,
    DataError,
    ModelError,
    Stage,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from compress_core.transforms import add_weight_transform
from tests.bn_helpers import OneNorm, changed_tensors, config, data
from tests.zoo import MobileNet, ResidualNet, images, trained


@pytest.mark.parametrize("method", ["paired", "exact", "momentum"])
def test_nothing_but_the_statistics_moves(method):
    model = trained(MobileNet(), (images(),))
    model.features[4].eval()  # frozen by the user
    model.classifier.eval()
    model.register_buffer("counter", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: module.counter.add_(1) and None)
    before = fingerprint(model)
    create_compressed_model(model, config(level=0.0, method=method), init_loader=data())
    # Level 0 on the plain model: apart from classes and transforms, only statistics of two layers may differ.
    changed = changed_tensors(before, fingerprint(model))
    allowed = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in changed} <= allowed
    assert {name.rpartition(".")[0] for name in changed} <= {"features.1", "features.7"}
    if method != "paired":
        assert {name.rpartition(".")[0] for name in changed} == {"features.1", "features.7"}
    after = fingerprint(model)
    for key in ("torch rng", "python rng", "numpy rng"):
        assert after[key] == before[key]
    for name, record in before["modules"].items():
        assert after["modules"][name]["training"] == record["training"], name
        assert after["modules"][name]["hooks"] == record["hooks"], name
        simple = {k: v for k, v in after["modules"][name]["simple"].items() if k in record["simple"]}
        assert simple == record["simple"], name


def test_frozen_and_ignored_layers_stay():
    for freeze in ("eval", "momentum", "root scope", "own scope"):
        model = trained(ResidualNet(), (images(),))
        document = config(method="exact")
        if freeze == "eval":
            model.bn1.eval()
        elif freeze == "momentum":
            model.bn1.momentum = 0.0
        elif freeze == "root scope":
            document["ignored_scopes"] = ["bn1", "fc"]
            document["compression"]["validate_scopes"] = False
        else:
            document["compression"]["initializer"]["batchnorm_adaptation"]["ignored_scopes"] = "bn1"
        before = copy.deepcopy(model)
        create_compressed_model(model, document, init_loader=data())
        assert torch.equal(model.bn1.running_mean, before.bn1.running_mean), freeze
        assert not torch.equal(model.bn2.running_mean, before.bn2.running_mean), freeze


def test_layer_that_is_not_reached_stays_and_is_reported():
    class Unused(OneNorm):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(3)

    model = Unused()
    with torch.no_grad():
        model.other.running_mean.add_(1)
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    layers = {layer.name: layer for layer in controller.statistics().batchnorm_adaptation.report.layers}
    assert layers["other"].values == 0
    assert torch.equal(model.other.running_mean, torch.ones(3))


def test_section_without_batch_norm_in_the_model():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"batchnorm_adaptation: the model has no batch norm.*remove this section"):
        create_compressed_model(model, config(), init_loader=[torch.randn(4, 3)])
    create_compressed_model(model, config(samples=0))


def test_absent_section_is_off_with_one_line_and_zero_is_off_without(caplog):
    for section, lines in (({}, 1), ({"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}, 0)):
        caplog.clear()
        model = trained(OneNorm(), (images(),))
        before = model.norm.running_mean.clone()
        document = config()
        document["compression"]["initializer"] = section
        with caplog.at_level(logging.INFO):
            create_compressed_model(model, document, init_loader=data())
        assert torch.equal(model.norm.running_mean, before)
        assert sum("no batchnorm_adaptation" in record.message for record in caplog.records) == lines


def test_empty_section_is_2000_samples():
    document = config()
    document["compression"]["initializer"] = {"batchnorm_adaptation": {}}
    controller, _ = create_compressed_model(OneNorm(), document, init_loader=data(32, 8) * 80)
    report = controller.statistics().batchnorm_adaptation.report
    assert (report.requested_samples, report.samples, report.method) == (2000, 2000, "paired")


def test_calls_of_adapt_batchnorm_do_not_add_up():
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    first = model.bn2.running_var.clone()
    controller.adapt_batchnorm(data(seed=9))
    assert not torch.equal(model.bn2.running_var, first)
    report = controller.adapt_batchnorm()
    assert torch.equal(model.bn2.running_var, first)
    assert (report.method, report.samples) == ("paired", 32)
    controller.adapt_batchnorm(BNAdaptationInitArgs(data()), num_samples=8, method="exact")
    assert controller.statistics().batchnorm_adaptation.report.samples == 8


def test_adapt_batchnorm_after_training_uses_exact(caplog):
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    trained(model, (images(),))
    with caplog.at_level(logging.INFO):
        assert controller.adapt_batchnorm().method == "exact"
    assert "using 'exact' for 'paired'" in caplog.text


@pytest.mark.parametrize("keywords", [{"num_samples": 0}, {"num_samples": 1.5}, {"method": "best"}, {"loader": []}])
def test_adapt_batchnorm_refuses_nonsense_and_leaves_statistics(keywords):
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=r"adapt_batchnorm\(\)"):
        controller.adapt_batchnorm(**keywords)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_failing_adaptation_leaves_statistics():
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loader():
        yield data()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        controller.adapt_batchnorm(loader())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_requests_of_several_algorithms_are_one_run(registry):
    from compress_core import hookimpl
    from tests.plugin_helpers import algorithm, contributing

    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def commit(self, model):
        add_weight_transform(model, "conv.weight", Scale(), stage=Stage.PRECISION, key=self.name)

    other = algorithm(
        stage=Stage.PRECISION,
        compress_plan=hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        compress_commit=hookimpl(commit),
    )
    registry.register(contributing(other), "demo")
    forwards = itertools.count()  # which goes on in forwards that leave no trace
    model = trained(OneNorm(), (images(),))
    model.register_forward_hook(lambda *_: (next(forwards), None)[1])
    first = config(16)["compression"]
    second = {"algorithm": "mine", "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 24}}}
    controller, _ = create_compressed_model(model, {"compression": [second, first]}, init_loader=data(32, 8))
    assert controller.statistics().batchnorm_adaptation.report.samples == 24
    assert next(forwards) == 2 * 3  # one run: three batches, with and without transforms
    second["initializer"]["batchnorm_adaptation"]["method"] = "exact"
    with pytest.raises(ConfigError, match="adaptation runs once for all, choose one"):
        create_compressed_model(OneNorm(), {"compression": [second, first]}, init_loader=data())


def test_pairing_with_an_algorithm_that_changes_weights_in_place(registry):
    """Before and after commit give the same as bypassing: the change is the same, only the way it is made differs."""
    from compress_core import Plan, hookimpl
    from tests.plugin_helpers import algorithm, contributing

    def commit(self, model):
        with torch.no_grad():
            for name in ("conv1", "conv2"):
                model.get_submodule(name).weight.mul_(0.5)

    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def commit_transforms(self, model):
        for name in ("conv1", "conv2"):
            add_weight_transform(model, f"{name}.weight", Scale(), stage=Stage.SPARSITY, key=self.name)

    plan = hookimpl(lambda self: Plan(("conv1.weight", "conv2.weight")))
    in_place = algorithm(name="in_place", changes_in_place=True, compress_plan=plan, compress_commit=hookimpl(commit))
    by_transform = algorithm(name="by_transform", compress_plan=plan, compress_commit=hookimpl(commit_transforms))
    registry.register(contributing(in_place, by_transform), "demo")
    results = {}
    start = trained(ResidualNet(), (images(),))
    for name in ("in_place", "by_transform"):
        model = copy.deepcopy(start)
        section = {"algorithm": name, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}}
        create_compressed_model(model, {"compression": section}, init_loader=iter(data()))
        results[name] = model
    for key in ("bn1", "bn2"):
        ours, theirs = (getattr(results[name], key) for name in ("in_place", "by_transform"))
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ours.running_var, getattr(start, key).running_var, rtol=1e-2)


def test_statistics_show_the_drift():
    model = trained(ResidualNet(), (images(),))
    old = model.bn1.running_mean.double().clone()
    scale = (model.bn1.running_var.double() + model.bn1.eps).sqrt()
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    drift = controller.statistics().batchnorm_adaptation.report.layers[0]
    assert drift.name == "bn1"
    assert drift.values == 32 * 64
    assert drift.mean_shift == pytest.approx(float(((model.bn1.running_mean - old).abs() / scale).max()), rel=1e-6)
    text = controller.statistics().to_str()
    assert "Drift of the running statistics" in text


class Metric:
    """A metric that says what it is told, and behaves badly otherwise."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, model):
        assert not model.training
        model.train()
        torch.rand(3)
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("metric", "kept"), [((0.5, 0.6), True), ((0.5, 0.5), True), ((0.6, 0.5), False), ((0.5, float("nan")), False)]
)
@pytest.mark.parametrize("registered", [True, False])
def test_guard_rolls_back_what_made_the_metric_worse(metric, kept, registered):
    model = trained(ResidualNet(), (images(),))
    before = fingerprint(model)
    evaluate = Metric(*metric)
    document = config(guard=True if registered else evaluate)
    if registered:
        document = register_default_init_args(document, data(), model_eval_fn=evaluate)
    controller, _ = create_compressed_model(model, document, init_loader=None if registered else data())
    changed = {name.rpartition(".")[2] for name in changed_tensors(before, fingerprint(model))}
    assert changed == ({"running_mean", "running_var"} if kept else set())
    verdict = controller.statistics().batchnorm_adaptation.report.guard
    assert (verdict.before, verdict.kept) == (metric[0], kept)
    assert model.training
    assert torch.equal(torch.get_rng_state(), torch.frombuffer(bytearray(before["torch rng"]), dtype=torch.uint8))
    assert ("no: rolled back" in controller.statistics().to_str()) is not kept
    json.dumps([controller.get_compression_state(), controller.statistics().to_dict()])


def test_guard_without_a_function_or_a_number_is_an_error_and_undone():
    model = trained(ResidualNet(), (images(),))
    before = fingerprint(model)
    with pytest.raises(
        DataError, match=r"batchnorm_adaptation\.guard: is true, but no function is registered.*model_eval_fn="
    ):
        create_compressed_model(model, config(guard=True), init_loader=data())
    with pytest.raises(DataError, match=r"guard: the function must return one number, larger is better, got tuple"):
        create_compressed_model(model, config(guard=lambda m: (1, 2)), init_loader=data())
    assert fingerprint(model) == before


def test_layer_frozen_at_creation_stays_frozen_in_eval_mode():
    model = trained(ResidualNet(), (images(),))
    model.bn1.eval()
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = model.bn1.running_mean.clone()
    model.eval()
    controller.adapt_batchnorm()
    assert torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("width", [8, 4])
def test_batch_norm_that_a_commit_replaces_is_paired_by_name(registry, width):
    from compress_core import Plan, hookimpl
    from tests.plugin_helpers import algorithm, contributing

    def commit(self, model):
        replacement = nn.BatchNorm2d(width)
        if width == 8:
            replacement.load_state_dict(model.bn1.state_dict())
        model.bn1 = replacement
        with torch.no_grad():
            model.conv1.weight.mul_(0.5)

    members = {"compress_plan": hookimpl(lambda self: Plan(("bn1",))), "compress_commit": hookimpl(commit)}
    registry.register(contributing(algorithm(changes_in_place=True, **members)), "demo")
    model = trained(ResidualNet(), (images(),))
    old = model.bn1.running_var.clone()
    document = {"compression": {"algorithm": "mine", "initializer": {"batchnorm_adaptation": {}}}}
    if width == 4:
        with pytest.raises(ModelError, match="batch norm 'bn1' was replaced by one that cannot be paired"):
            create_compressed_model(model, document, init_loader=data())
        return
    create_compressed_model(model, document, init_loader=data())
    torch.testing.assert_close(model.bn1.running_var, old / 4, rtol=1e-3, atol=1e-5)  # half the input, a quarter of it
