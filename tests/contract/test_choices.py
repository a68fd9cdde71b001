"""Open points take choices of any plugin."""

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
from compress_core.registry import use_registry
from compress_core.transforms import raw_parameter
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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Choice("scored.scor", "x", torch.sum),
            r"'scored.scor', which is not a choice point. Did you mean 'scored.score'",
        ),
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
