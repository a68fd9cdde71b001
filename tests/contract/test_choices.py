"""Open points take choices of any plugin."""

import importlib.metadata
import re
import sys
import types
from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import nn

from compress_core import (
    AlgorithmConfig,
    Choice,
    ChoiceOf,
    ChoicePoint,
    ConfigError,
    PluginError,
    Section,
    callable_choice,
    choice,
    create_compressed_model,
    hookimpl,
)
from compress_core.__main__ import main
from compress_core.registry import Registry, use_registry
from compress_core.transforms import raw_parameter
from tests.conftest import declared_entry_points
from tests.contract.algorithms import Base, fresh, images, net, pruned
from tests.plugin_helpers import plugin


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


def test_choice_that_does_not_fit_its_point_is_refused():
    registry = fresh(**score_hooks())
    bad = plugin(compress_choices=lambda self: [Choice("scored.score", "x", 3)])
    with pytest.raises(PluginError, match=r"'x' of 'scored.score' must be callable, got int; it is a function"):
        registry.register(bad, "bad")


@pytest.mark.parametrize("point", ["scored.scor", "scoerd.score", "scored.other", "undotted"])
def test_choice_for_a_point_that_is_likely_misspelt_is_left_out_with_a_warning_and_can_be_found(point, caplog, capsys):
    registry = fresh(**score_hooks())
    registry.register(plugin(compress_choices=lambda self: [Choice(point, "most", torch.max)]), "other")
    found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    why = "Did you mean 'scored.score'" if point in ("scored.scor", "scoerd.score") else "There are: .*scored.score"
    expected = rf"^other: the choice 'most' of '{point}' is left out: '{point}' is no choice point of what .*{why}"
    assert len(found) == 1 and re.search(expected, found[0])
    with use_registry(registry):
        assert main(["choices"]) == 0
        assert re.search(rf"(?s)Left out.*most.*other.*'{point}' is no choice point", capsys.readouterr().out)
        with pytest.raises(
            ConfigError, match=rf"there is no 'most' among scored.score.*'most' of '{point}' is left out"
        ):
            create_compressed_model(net(), {"compression": {"algorithm": "scored", "params": {"score": "most"}}})


class Mine(Base):
    name = "mine"


def test_choice_for_a_plugin_that_is_not_installed_waits_for_it_without_a_word(caplog):
    registry = fresh()
    registry.register(
        plugin(
            compress_algorithms=lambda self: [Mine],
            compress_choices=lambda self: [Choice("scored.score", "most", torch.max), Choice("scored.score", "no", 3)],
        ),
        "other",
    )
    assert registry.algorithm("mine").cls is Mine
    assert [(left.choice.name, left.is_suspect) for left in registry.unplaced()] == [("most", False), ("no", False)]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    registry.register(plugin(**score_hooks()), "owner")
    assert list(registry.choices("scored.score")) == ["most", "sum"]
    # What does not fit its point is said as soon as there is one.
    (left,) = registry.unplaced()
    assert "'no' of 'scored.score' must be callable, got int" in left.reason and left.is_suspect
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [str(left)]


def module_of(name, other):
    module = types.ModuleType(f"plugin_{name}")

    @hookimpl
    def compress_choice_points():
        return [ChoicePoint(f"{name}.kind", "a function", callable_choice)]

    @hookimpl
    def compress_choices():
        return [Choice(f"{other}.kind", "x", max)]

    module.compress_choice_points, module.compress_choices = compress_choice_points, compress_choices
    return module


def test_two_plugins_can_add_to_each_others_points(monkeypatch):
    for name, other in (("one", "two"), ("two", "one")):
        monkeypatch.setitem(sys.modules, f"plugin_{name}", module_of(name, other))
    registry = Registry()
    group = "compress_core.plugins"
    registry.load_entry_points([importlib.metadata.EntryPoint(n, f"plugin_{n}", group) for n in ("one", "two")])
    assert not registry.failures and not registry.unplaced()
    assert list(registry.choices("one.kind")) == list(registry.choices("two.kind")) == ["x"]


@pytest.mark.parametrize("missing", ["filter_pruning", "magnitude_sparsity"])
def test_a_built_in_plugin_with_choices_for_another_loads_without_it(missing, caplog):
    registry = Registry()
    registry.load_entry_points([point for point in declared_entry_points() if point.name != missing])
    assert not registry.failures and "weight_reconstruction" in registry.initializers()
    left = registry.unplaced()
    assert left and all(found.choice.point.startswith(f"{missing}.") and not found.is_suspect for found in left)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


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
