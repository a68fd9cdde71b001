"""What the contract gives to plugins, and what it refuses: stage by stage, services, losses, open points."""

import importlib.metadata
import json
import logging
import subprocess
import sys
from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    Choice,
    ChoiceOf,
    ChoicePoint,
    ConfigError,
    InitArgs,
    Initializer,
    InitializerConfig,
    Phase,
    Plan,
    PluginError,
    Section,
    Stage,
    TableStatistics,
    UsageError,
    callable_choice,
    choice,
    create_compressed_model,
    hookimpl,
    mask_weight,
    register_default_init_args,
)
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.registry import Registry, use_registry
from compress_core.transforms import add_weight_transform, raw_parameter
from tests.conftest import ROOT, declared_entry_points
from tests.registry.test_registry import contributing, plugin


class Base(Algorithm):
    """Masks every second element of each weight."""

    name = "base"
    stage = Stage.SPARSITY

    @hookimpl
    def compress_plan(self, model, context):
        return context.plan_weights(model, self)

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            weight = raw_parameter(model, name)
            mask_weight(model, name, (torch.arange(weight.numel()) % 2).reshape(weight.shape), key=self.name)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def images(count=8):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def sections(*names):
    return {"compression": [{"algorithm": name} for name in names], "input_info": {"sample_size": [2, 3, 6, 6]}}


def pruned(config):
    """Lets the small models of this page lose channels."""
    for section in config["compression"]:
        if section["algorithm"] == "filter_pruning":
            section.setdefault("params", {}).update(multiple_of=1, prune_first_conv=True)
    return config


def fresh(*classes, **hooks):
    registry = Registry()
    registry.find_entry_points(declared_entry_points())
    if classes:
        registry.register(contributing(*classes), "test")
    if hooks:
        registry.register(plugin(**hooks), "test hooks")
    return registry


# Data: any registered loader serves any initializer.


@pytest.mark.parametrize("register", [register_default_init_args, None], ids=["default args", "InitArgs"])
def test_calibration_as_the_hook_shows_it_gets_any_registered_data(register):
    seen = []

    class Calibrated(Base):
        @hookimpl
        def compress_calibrate(self, model, context):
            path, _ = context.section(self)
            data = context.calibration_data(path)
            for batch, size in data.batches(16):
                seen.append(size)
                data.call(model, batch)

    loader = [(images(), torch.zeros(8))] * 3
    with use_registry(fresh(Calibrated)):
        from compress_core import CompressionConfig

        config = CompressionConfig.from_dict(sections("base"))
        config = register(config, loader) if register else config.register_extra_structs([InitArgs(loader)])
        create_compressed_model(net(), config)
    assert seen == [8, 8]


# Plugins are loaded when they are wanted, and a broken one ends nobody.


def entry_point(tmp_path, monkeypatch, name, code):
    (tmp_path / f"module_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.metadata.EntryPoint(name, f"module_{name}", ENTRY_POINT_GROUP)


def test_plugin_that_exits_on_import_stops_nobody(tmp_path, monkeypatch, caplog):
    registry = Registry()
    registry.find_entry_points(
        [*declared_entry_points(), entry_point(tmp_path, monkeypatch, "quits", "raise SystemExit(3)")]
    )
    with use_registry(registry), caplog.at_level(logging.WARNING):
        create_compressed_model(net(), sections("magnitude_sparsity"))
        assert not registry.failures
        with pytest.raises(ConfigError, match="quits could not be loaded: SystemExit: 3"):
            create_compressed_model(net(), sections("quits"))
    assert [str(failure.plugin) for failure in registry.failures] == ["quits"]
    assert len([r for r in caplog.records if "quits" in r.getMessage()]) == 1


def test_interrupting_an_import_is_not_a_broken_plugin(tmp_path, monkeypatch):
    registry = Registry()
    registry.find_entry_points([entry_point(tmp_path, monkeypatch, "slow_one", "raise KeyboardInterrupt")])
    with pytest.raises(KeyboardInterrupt):
        registry.load_all()


def test_config_that_does_not_name_a_plugin_does_not_import_it(tmp_path, monkeypatch):
    points = [entry_point(tmp_path, monkeypatch, "elsewhere", "raise RuntimeError('imported')")]
    registry = Registry()
    registry.find_entry_points([*points, *declared_entry_points()])
    adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}
    config = {
        "compression": [
            {"algorithm": "magnitude_sparsity", "initializer": adapt, "params": {"schedule": "exponential"}},
            {
                "algorithm": "filter_pruning",
                "params": {"filter_importance": "L1", "multiple_of": 1, "prune_first_conv": True},
            },
        ],
        "input_info": {"sample_size": [2, 3, 6, 6]},
    }
    with use_registry(registry):
        create_compressed_model(net(), config, init_loader=[images()])
    assert not registry.failures
    assert "compress_quantization.plugin" in {point.value for point in registry._pending}
    registry.load_all()
    assert [str(failure.error) for failure in registry.failures] == ["imported"]


def test_importing_the_package_imports_no_plugin():
    code = "import sys, compress_core; print([m for m in sys.modules if m.startswith('compress_') and 'core' not in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


# Strict registration.


def config_with(**fields):
    return type("C", (AlgorithmConfig,), {"__annotations__": dict.fromkeys(fields, float), **fields})


class AsyncStep(Base):
    @hookimpl
    async def compress_step(self, clock):
        return None


class GeneratorStep(Base):
    @hookimpl
    def compress_step(self, clock):
        yield clock


class InitializersHook(Base):
    @hookimpl
    def compress_initialize(self, model):
        return None


class Misspelt(Base):
    config_type = config_with()


class MisspeltReads(Base):
    read_later = ("a",)


class WrongReads(Base):
    Config = config_with(rate=Field(0.5, description="rate"))
    reads_later = ("params.rate",)


class Undescribed(Base):
    Config = config_with(rate=0.5)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (AsyncStep, r"compress_step\(\) is async"),
        (GeneratorStep, r"compress_step\(\) is a generator"),
        (InitializersHook, r"compress_initialize\(\) would never be called here: a class derived from .*Initializer"),
        (Misspelt, r"Misspelt.config_type is not read by anybody. Did you mean 'Config'\?"),
        (MisspeltReads, r"MisspeltReads.read_later is not read by anybody. Did you mean 'reads_later'\?"),
        (WrongReads, r"WrongReads.reads_later names 'params.rate', which is no value of C"),
        (Undescribed, r"C.rate has no description"),
    ],
)
def test_slip_of_the_pen_is_refused_at_registration(cls, message):
    with pytest.raises(PluginError, match=message):
        Registry().register(contributing(cls), "test")


def test_everything_that_is_wrong_is_told_at_once():
    class Much(AsyncStep, Undescribed):
        stage = "early"

    with pytest.raises(PluginError) as raised:
        Registry().register(contributing(Much), "test")
    assert all(part in str(raised.value) for part in ("Much.stage", "is async", "has no description"))


def test_attribute_that_resembles_nothing_is_the_plugins_own():
    class Own(Base):
        levels = (1, 2)
        patterns = "2:4"

    Registry().register(contributing(Own), "test")


# Stage by stage.


class Replacing(Algorithm):
    name = "replacing"
    stage = Stage.STRUCTURE
    replaces_modules = True

    @hookimpl
    def compress_plan(self, model):
        return Plan(("4.weight",))

    @hookimpl
    def compress_commit(self, model):
        model[4] = nn.Sequential(nn.Linear(8 * 16, 3), nn.Linear(3, 4))


def test_later_algorithms_plan_on_replaced_modules():
    with use_registry(fresh(Replacing, Base)):
        controller, model = create_compressed_model(net(), pruned(sections("filter_pruning", "base", "replacing")))
        assert list(controller.algorithms) == ["replacing", "filter_pruning", "base"]
        assert controller._lifecycle.plans["base"].targets == ("0.weight", "4.0.weight", "4.1.weight")
        config = pruned(sections("quantization", "magnitude_sparsity", "filter_pruning", "replacing"))
        controller, model = create_compressed_model(net(), config)
        state, weights = json.loads(json.dumps(controller.get_compression_state())), model.state_dict()
        _, twin = create_compressed_model(net(), config, state)
        twin.load_state_dict(weights)
        assert torch.equal(model.eval()(images()), twin.eval()(images()))
        assert torch.allclose(controller.strip()(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("declared", [True, False])
def test_whoever_throws_away_what_others_have_added_is_refused(declared):
    class Late(Replacing):
        name = "late"
        stage = Stage.PRECISION
        replaces_modules = declared
        changes_in_place = True

    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        use_registry(fresh(Late)),
        pytest.raises(PluginError, match=r"compress_commit\(\) of the algorithm 'late'.*thrown away 1 transforms"),
    ):
        create_compressed_model(model, sections("magnitude_sparsity", "late"))
    assert type(model[4]) is nn.Linear
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_writing_without_saying_so_names_the_algorithm():
    class Writer(Base):
        name = "writer"

        @hookimpl
        def compress_commit(self, model, plan):
            model[0].weight.data.mul_(2)

    with (
        use_registry(fresh(Writer)),
        pytest.raises(PluginError, match=r"of the algorithm 'writer' .*has written to.*0\.weight"),
    ):
        create_compressed_model(net(), sections("writer"))


def test_plan_that_is_no_json_is_refused_by_name():
    class Odd(Base):
        name = "odd"

        @hookimpl
        def compress_plan(self, model):
            return Plan(("0.weight",), details={"scores": torch.ones(2)})

    with use_registry(fresh(Odd)), pytest.raises(PluginError, match=r"compress_plan\(\) of the algorithm 'odd'.*JSON"):
        create_compressed_model(net(), sections("odd"))


# What earlier stages have left, and the uncompressed model.


def test_weights_as_earlier_stages_have_left_them():
    seen = {}

    class Looking(Base):
        name = "looking"
        stage = Stage.PRECISION

        @hookimpl
        def compress_commit(self, model, plan, context):
            for name in plan.targets:
                seen[name] = context.weight(model, name).clone()
                seen[f"{name} before sparsity"] = context.weight(model, name, before=Stage.SPARSITY).clone()
                mask_weight(model, name, torch.zeros(()), key=self.name, stage=self.stage)

    with use_registry(fresh(Looking, Base)):
        _, model = create_compressed_model(net(), sections("looking", "base"))
    raw = raw_parameter(model, "4.weight")
    assert torch.equal(seen["4.weight"], raw * (torch.arange(raw.numel()) % 2).reshape(raw.shape))
    assert torch.equal(seen["4.weight before sparsity"], raw)
    assert not model[4].weight.any()


class Teaching(Base):
    name = "teaching"
    needs_uncompressed = "training"
    needs_batch = True

    @hookimpl
    def compress_loss(self, batch, context):
        with torch.no_grad():
            wanted = context.teacher(*batch.args, **batch.kwargs)
        return (batch.outputs - wanted).square().mean()


def test_teacher_is_the_uncompressed_model_and_belongs_to_nobody_else():
    x, plain = images(), net()
    wanted = plain.eval()(x)
    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(plain.train(), sections("teaching"))
    teacher = controller.context.teacher
    assert torch.equal(teacher(x), wanted) and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(teacher is not module for module in model.modules())
    assert not any("teacher" in name for name in model.state_dict())
    with pytest.raises(UsageError, match="the loss of 'teaching' needs a forward of the model in training mode"):
        controller.loss()
    outputs = model(x)
    expected = (outputs - wanted).square().mean()
    assert torch.equal(controller.loss(), expected) and controller.loss().requires_grad
    assert torch.equal(controller.loss(outputs * 2, x), (2 * outputs - wanted).square().mean())
    model.eval()(x * 3)
    assert torch.equal(controller.loss(), expected)  # a forward in eval mode does not count


def test_teacher_has_to_be_given_when_a_state_is_resumed():
    with use_registry(fresh(Teaching)):
        controller, _ = create_compressed_model(net(), sections("teaching"))
        state = controller.get_compression_state()
        with pytest.raises(UsageError, match=r"teaching: needs the uncompressed model.*uncompressed_model="):
            create_compressed_model(net(), sections("teaching"), state)
        teacher = net()
        again, _ = create_compressed_model(
            nn.Sequential(*net()), sections("teaching"), state, uncompressed_model=teacher
        )
        assert torch.equal(again.context.teacher(images()), teacher.eval()(images()))
        assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_batch_of_a_compiled_model_is_recorded(way):
    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(net(), sections("teaching"))
    called = torch.compile(model, fullgraph=True, backend="eager") if way == "compiled" else model
    for count in (2, 3):
        outputs = called(images(count))
        with torch.no_grad():
            wanted = controller.context.teacher(images(count))
        assert torch.allclose(controller.loss(), (outputs - wanted).square().mean())


def test_recorder_is_in_no_copy_and_gone_after_strip():
    import copy
    import pickle

    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(net(), sections("teaching"))
    model(images())
    twin = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    twin(images() * 5)
    assert torch.equal(controller._recorder.batch.args[0], images())
    assert not controller.strip()._forward_hooks


def test_view_of_the_uncompressed_model_during_creation():
    x, seen = images(), {}

    class Viewing(Base):
        name = "viewing"
        needs_uncompressed = "creation"

        @hookimpl
        def compress_calibrate(self, model, context):
            with context.uncompressed() as plain, torch.no_grad():
                seen[self.name] = plain.eval()(x)
                seen["same object"] = plain is model

    class Undeclared(Viewing):
        name = "undeclared"
        needs_uncompressed = "no"

    with use_registry(fresh(Viewing, Replacing, Undeclared)):
        wanted = net().eval()(x)
        create_compressed_model(net(), sections("viewing"))
        assert torch.equal(seen["viewing"], wanted) and seen["same object"]
        controller, _ = create_compressed_model(net(), sections("viewing", "replacing"))
        assert torch.equal(seen["viewing"], wanted) and not seen["same object"]
        with pytest.raises(PluginError, match="while the model is being created"), controller.context.uncompressed():
            pass
        with pytest.raises(PluginError, match=r"nobody has declared.*needs_uncompressed = 'creation'"):
            create_compressed_model(net(), sections("undeclared"))


# Losses.


@pytest.mark.parametrize("loss", [torch.ones(3), torch.tensor(1)], ids=["vector", "whole number"])
def test_loss_that_is_no_scalar_is_refused_by_name(loss):
    class Odd(Base):
        name = "odd"

        @hookimpl
        def compress_loss(self):
            return loss

    with use_registry(fresh(Odd)):
        controller, _ = create_compressed_model(net(), sections("odd"))
    with pytest.raises(PluginError, match=r"compress_loss\(\) of the algorithm 'odd'.*not a floating-point scalar"):
        controller.loss()


# Initializers.


class Counting(Initializer):
    name = "counting"
    Config = InitializerConfig
    struct = InitArgs

    def __init__(self, config, paths):
        super().__init__(config, paths)
        self.sizes = []

    @hookimpl
    def compress_initialize(self, model, context):
        data = context.calibration_data(self.paths[0], InitArgs)
        self.sizes.append(sum(size for _, size in data.batches(100)))
        if len(self.sizes) == 3:
            model[0].weight.data.zero_()
            raise RuntimeError("third time")

    def statistics(self):
        return TableStatistics({"sizes": list(self.sizes)})


def test_shared_initializer_runs_again_with_other_data_all_or_nothing():
    config = {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"counting": {}}}}
    with use_registry(fresh(compress_initializers=lambda self: [Counting])):
        controller, model = create_compressed_model(net(), config, init_loader=[images()])
    assert controller.statistics().counting.to_dict() == {"sizes": [8]}
    assert controller.initialize("counting", loader=[images(), images(3)]).to_dict() == {"sizes": [8, 11]}
    before = raw_parameter(model, "0.weight").clone()
    with pytest.raises(RuntimeError, match="third time") as raised:
        controller.initialize("counting")
    assert torch.equal(raw_parameter(model, "0.weight"), before)
    assert any("run_again() of 'counting'" in note for note in raised.value.__notes__)
    with pytest.raises(UsageError, match="takes no options, got speed"):
        controller.initialize("counting", speed=2)
    with pytest.raises(UsageError, match="there is no initializer 'other' in this config"):
        controller.initialize("other")


@pytest.mark.parametrize("method", ["check", "statistics", "load_state"])
def test_errors_of_every_method_of_an_initializer_are_attributed(method):
    class Failing(Counting):
        name = "failing"

    def fail(self, *args):
        raise ValueError("no")

    setattr(Failing, method, fail)
    config = {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"failing": {}}}}
    with use_registry(fresh(compress_initializers=lambda self: [Failing])), pytest.raises(ValueError) as raised:
        controller, _ = create_compressed_model(net(), config, init_loader=[images()])
        controller.statistics()
        state = {**json.loads(json.dumps(_state_without(controller))), "initializers": {}}
        create_compressed_model(net(), config, state)
    assert any(f"{method}() of 'failing', test hooks" in note for note in raised.value.__notes__)


def _state_without(controller):
    controller._lifecycle.initializers.pop("failing")
    return controller.get_compression_state()


def test_what_changes_weights_comes_before_what_measures_statistics():
    order = []

    def initializer(name, phase):
        def compress_initialize(self):
            order.append(name)

        members = {"name": name, "Config": InitializerConfig, "compress_initialize": hookimpl(compress_initialize)}
        return type(name.title(), (Initializer,), members | ({} if phase is None else {"phase": phase}))

    classes = [initializer("a", Phase.STATISTICS), initializer("z", None), initializer("b", Phase.WEIGHTS)]
    section = {"algorithm": "magnitude_sparsity", "initializer": {"a": {}, "b": {}, "z": {}}}
    with use_registry(fresh(compress_initializers=lambda self: classes)):
        create_compressed_model(net(), {"compression": section})
    assert order == ["b", "z", "a"]


def test_plan_without_a_target_tells_why():
    class Picky(Base):
        name = "picky"

        @hookimpl
        def compress_plan(self):
            return Plan((), {"0.weight": "is no matrix"})

    with (
        use_registry(fresh(Picky)),
        pytest.raises(ConfigError, match=r"picky: finds nothing to compress.*1 left alone: '0\.weight' is no matrix"),
    ):
        create_compressed_model(net(), sections("picky"))


# Open points.


class ScoredParams(Section):
    score: Annotated[str, ChoiceOf("scored.score")] = Field("sum", description="how weights are scored")


class ScoredConfig(AlgorithmConfig):
    params: ScoredParams = Field(default_factory=ScoredParams, description="settings")


class Scored(Base):
    name = "scored"
    Config = ScoredConfig

    @hookimpl
    def compress_commit(self, model, plan):
        self.scores = [choice(self.config.params.score, "scored.score")(raw_parameter(model, n)) for n in plan.targets]


def score_hooks(*choices):
    return {
        "compress_algorithms": lambda self: [Scored],
        "compress_choice_points": lambda self: [
            ChoicePoint("scored.score", "a function (weight) -> number", callable_choice)
        ],
        "compress_choices": lambda self: [Choice("scored.score", "sum", torch.sum), *choices],
    }


def test_choice_of_another_plugin_is_used_listed_and_cannot_be_overridden():
    registry = fresh(**score_hooks())
    registry.register(plugin(compress_choices=lambda self: [Choice("scored.score", "most", torch.max)]), "other")
    with use_registry(registry):
        config = {"compression": {"algorithm": "scored", "params": {"score": "most"}}}
        controller, model = create_compressed_model(net(), config)
        assert controller.algorithms["scored"].scores[0] == model[0].weight.max()
        schema = registry.section_class("scored").model_json_schema()
        assert schema["$defs"]["ScoredParams"]["properties"]["score"]["enum"] == ["most", "sum"]
        config["compression"]["params"]["score"] = "mots"
        with pytest.raises(ConfigError, match=r"params\.score.*there is no 'mots'.*Did you mean 'most'\?.*most, sum"):
            create_compressed_model(net(), config)
    with pytest.raises(PluginError, match=r"'most' of 'scored.score' is contributed by other already"):
        registry.register(plugin(compress_choices=lambda self: [Choice("scored.score", "most", torch.min)]), "third")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Choice("scored.scor", "x", torch.sum), r"'scored.scor', which is no open point. Did you mean 'scored.score'"),
        (Choice("scored.score", "x", 3), r"'x' of 'scored.score' must be callable, got int; it is a function"),
    ],
)
def test_choice_that_fits_nowhere_is_refused(bad, message):
    registry = fresh(**score_hooks())
    with pytest.raises(PluginError, match=message):
        registry.register(plugin(compress_choices=lambda self: [bad]), "bad")


def test_every_built_in_open_point_takes_a_third_partys_choice():
    from compress_core.batchnorm.estimators import ExactEstimator
    from compress_quantization.ranges import min_max

    def linear(initial, target, duration):
        return lambda time: initial + (target - initial) * min(time / duration, 1.0)

    def last(filters):
        return torch.arange(len(filters), dtype=torch.float64)

    class Mine(ExactEstimator):
        """Like exact."""

    choices = [
        Choice("level_schedule", "linear", linear),
        Choice("filter_pruning.importance", "last", last),
        Choice("batchnorm_adaptation.method", "mine", Mine),
        Choice("quantization.range", "mine", min_max),
    ]
    adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8, "method": "mine"}}
    config = {
        "compression": [
            {
                "algorithm": "filter_pruning",
                "pruning_init": 0.5,
                "params": {"filter_importance": "last", "schedule": "linear", "pruning_target": 0.75},
                "initializer": adapt,
            },
            {
                "algorithm": "magnitude_sparsity",
                "params": {"schedule": "linear", "sparsity_target": 0.8, "sparsity_target_epoch": 4},
            },
            {"algorithm": "quantization", "initializer": {"range": {"type": "mine"}}},
        ],
        "input_info": {"sample_size": [2, 3, 6, 6]},
    }
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with use_registry(fresh(compress_choices=lambda self: choices)):
        controller, _ = create_compressed_model(model, pruned(config), init_loader=[images()])
        pruner = controller.algorithms["filter_pruning"]._pruner
        assert pruner.gone == [[0, 1, 2, 3]]  # the least important ones by `last`
        for level in (0.0, 0.2, 0.4):
            controller.scheduler.epoch_step()
            assert controller.sparsity_level == pytest.approx(level, abs=0.01)
        assert controller.statistics().batchnorm_adaptation.report.method == "mine"
    # The message of the controller lists what is installed, too.
    wrong = {"compression": config["compression"][1]}
    listed = r"params\.schedule.*Installed: adaptive, multistep, polynomial, baseline, exponential"
    with use_registry(fresh()), pytest.raises(ConfigError, match=listed):
        create_compressed_model(net(), wrong)


def test_subclass_with_an_importance_of_its_own_cannot_get_another_one_silently():
    with (
        use_registry(fresh()),
        pytest.raises(ConfigError, match=r"filter_importance.*no 'taylor'.*Installed: L1, L2, geometric_median"),
    ):
        create_compressed_model(
            net(), {"compression": {"algorithm": "filter_pruning", "params": {"filter_importance": "taylor"}}}
        )


# Frozen in depth.


def test_plugin_cannot_rewrite_another_section():
    class Meddling(Base):
        name = "meddling"

        @hookimpl
        def compress_configure(self, context):
            for section in context.config.sections:
                if section.algorithm == "quantization":
                    section.ignored_scopes.append("0")

    config = {"compression": [{"algorithm": "meddling"}, {"algorithm": "quantization", "ignored_scopes": ["4"]}]}
    with use_registry(fresh(Meddling)), pytest.raises(TypeError, match="a config cannot be changed") as raised:
        create_compressed_model(net(), config)
    assert any("compress_configure() of 'meddling'" in note for note in raised.value.__notes__)


def containers(value, path=""):
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from containers(value.__dict__[name], f"{path}.{name}")
    elif isinstance(value, (list, dict)):
        yield path, value
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            yield from containers(item, f"{path}.{key}")


def test_every_container_in_a_section_is_frozen_and_still_compares_copies_and_serializes(registry):
    import copy
    import pickle

    from compress_core import CompressionConfig

    raw = {
        "algorithm": "quantization",
        "scope_overrides": {"weights": {"0": {"bits": 4}}},
        "ignored_scopes": ["a"],
        "activations": {"unified_scale_ops": [["a", "b"]]},
        "initializer": {"precision": {"bitwidth_per_scope": [[4, "0|WEIGHT"]]}, "range": [{"target_scopes": ["0"]}]},
    }
    config = CompressionConfig.from_dict({"compression": raw, "target_scopes": ["0"]})
    found = dict(containers(config.sections[0])) | dict(containers(config.root))
    assert len(found) > 10
    for path, container in found.items():
        with pytest.raises(TypeError, match="cannot be changed"):
            container.clear()
        assert pickle.loads(pickle.dumps(container)) == container == copy.deepcopy(container), path
    dumped = json.loads(config.sections[0].model_dump_json(exclude_unset=True))
    assert dumped["ignored_scopes"] == ["a"] and dumped["activations"] == {"unified_scale_ops": [["a", "b"]]}
    config.source["compression"]["algorithm"] = "other"  # a copy: what a script makes another config of
    assert config.source["compression"]["algorithm"] == "quantization"
    assert CompressionConfig.from_dict(config.source).sections == config.sections


# The factor on gradients.


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


class Learning(Base):
    name = "learning"

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            add_weight_transform(model, name, Learned(), stage=self.stage, key=self.name)


def test_factor_on_gradients_reaches_a_third_party_or_is_refused():
    class Applying(Learning):
        name = "applying"
        applies_lr_multiplier = True
        factor = None

        @hookimpl
        def compress_calibrate(self, context):
            self.factor = context.lr_multiplier(self)

    with use_registry(fresh(Learning, Applying)):
        create_compressed_model(net(), sections("learning"))
        config = {**sections("learning"), "compression_lr_multiplier": 0.5}
        with pytest.raises(ConfigError, match="compression_lr_multiplier: 'learning' learns something"):
            create_compressed_model(net(), config)
        controller, _ = create_compressed_model(net(), {**sections("applying"), "compression_lr_multiplier": 0.5})
        assert controller.algorithms["applying"].factor == 0.5
        # Masks learn nothing: the factor is for others in the document.
        create_compressed_model(net(), {**sections("magnitude_sparsity"), "compression_lr_multiplier": 0.5})


# Being told that tensors are smaller.


def test_algorithms_are_told_that_channels_are_gone():
    told = []

    class Told(Base):
        name = "told"

        @hookimpl
        def compress_shrunk(self, model, shrinkage):
            told.append((model is self.model, tuple(model[0].weight.shape), dict(shrinkage.kept["0.weight"])))

    config = sections("told", "filter_pruning")
    pruned(config)["compression"][1]["pruning_init"] = 0.5
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with use_registry(fresh(Told)):
        controller, _ = create_compressed_model(model, config)
        controller.strip()
        controller.shrink()
        assert [entry[:2] for entry in told] == [(False, (4, 3, 3, 3)), (True, (4, 3, 3, 3))]
        assert told[0][2] == told[1][2] and len(told[0][2][0]) == 4
        twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        create_compressed_model(twin, config, json.loads(json.dumps(controller.get_compression_state())))
        assert told[2] == told[1]


def test_exports_keep_what_a_rewrite_notes_and_name_whose_rewrite_fails(tmp_path):
    onnx = pytest.importorskip("onnx")

    class Noting(Base):
        name = "noting"
        fails = False

        @hookimpl
        def compress_export(self, model):
            def rewrite(graph):
                if type(self).fails:
                    raise ValueError("no")
                graph.metadata_props["mine"] = "kept"
                graph.graph.node(0).metadata_props["mine"] = "kept"

            return rewrite

    with use_registry(fresh(Noting)):
        controller, _ = create_compressed_model(net(), sections("noting"))
        controller.export_onnx(tmp_path / "a.onnx")
        found = onnx.load(tmp_path / "a.onnx")
        assert {prop.key: prop.value for prop in found.metadata_props}["mine"] == "kept"
        assert [prop.value for prop in found.graph.node[0].metadata_props] == ["kept"]
        Noting.fails = True
        with pytest.raises(ValueError) as raised:
            controller.export_onnx(tmp_path / "b.onnx")
    assert any("'noting'" in note for note in raised.value.__notes__)
