"""Shared initializers of third parties: the same rules as for algorithms."""

import pytest
from pydantic import Field

from compress_core import ConfigError, Initializer, InitializerConfig, PluginError, create_compressed_model, hookimpl
from compress_core.registry import Registry
from tests.plugin_helpers import algorithm, contributing, plugin
from tests.zoo import ResidualNet

CALLS = []


class WarmUpConfig(InitializerConfig):
    steps: int = Field(1, description="how many")


class WarmUp(Initializer):
    name = "warm_up"
    Config = WarmUpConfig

    @hookimpl
    def compress_initialize(self, model):
        CALLS.append((self.config.steps, self.paths))


def bringing(*classes):
    return plugin(compress_initializers=lambda self: list(classes))


def sections(*steps):
    names = ("magnitude_sparsity", "mine")
    return [
        {"algorithm": name, **({} if s is None else {"initializer": {"warm_up": {"steps": s}}})}
        for name, s in zip(names, steps, strict=False)
    ]


def test_initializer_runs_once_for_who_asked_and_not_at_all_otherwise(registry):
    registry.register(bringing(WarmUp), "demo")
    CALLS.clear()
    create_compressed_model(ResidualNet(), {"compression": sections(None)})
    assert CALLS == []
    create_compressed_model(ResidualNet(), {"compression": sections(3)})
    assert CALLS == [(3, ("compression.0.magnitude_sparsity.initializer.warm_up",))]


def test_requests_that_differ_are_refused(registry):
    from compress_core import Plan

    registry.register(bringing(WarmUp), "demo")
    mine = algorithm(compress_plan=hookimpl(lambda self: Plan(("x",))))
    registry.register(contributing(mine), "demo2")
    create_compressed_model(ResidualNet(), {"compression": sections(3, 3)})
    with pytest.raises(ConfigError, match=r"compression\.1\.mine\.initializer\.warm_up: differs from"):
        create_compressed_model(ResidualNet(), {"compression": sections(3, 4)})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"compress_initialise": hookimpl(lambda self: None)}, "Did you mean compress_initialize"),
        ({"compress_observe": lambda self: None}, r"compress_observe\(\) lacks the decorator"),
        ({"Config": dict}, "Config must be a subclass of compress_core.InitializerConfig"),
        ({"compress_initialize": None}, r"must implement compress_initialize\(\)"),
        ({"name": "magnitude_sparsity"}, "the name 'magnitude_sparsity' is that of an algorithm"),
        ({"name": "batchnorm_adaptation"}, "'batchnorm_adaptation' is contributed by .* already"),
    ],
)
def test_registration_is_strict(registry, members, message):
    bad = type("Bad", (WarmUp,), {"name": "bad", **members})
    with pytest.raises(PluginError, match=message):
        registry.register(bringing(bad), "demo")


def test_error_in_an_initializer_is_attributed(registry):
    def fail(self):
        raise ZeroDivisionError

    registry.register(bringing(type("Bad", (WarmUp,), {"compress_initialize": hookimpl(fail)})), "demo")
    with pytest.raises(ZeroDivisionError) as caught:
        create_compressed_model(ResidualNet(), {"compression": sections(3)})
    assert any("'warm_up', demo" in note for note in caught.value.__notes__)


def test_value_that_is_read_in_training_counts_where_that_is_declared(registry):
    from compress_core import AlgorithmConfig, Plan

    class Config(AlgorithmConfig):
        weight: float = Field(1.0, description="factor")

    members = {
        "Config": Config,
        "compress_plan": hookimpl(lambda self: Plan(("x",))),
        "compress_loss": hookimpl(lambda self, model: model.fc.weight.sum() * self.config.weight),
    }
    registry.register(
        contributing(algorithm(**members), algorithm(name="late", reads_later=("weight",), **members)), "demo"
    )
    with pytest.raises(ConfigError, match=r"mine\.weight: the value 2\.0 can have no effect"):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine", "weight": 2.0}})
    controller, model = create_compressed_model(ResidualNet(), {"compression": {"algorithm": "late", "weight": 2.0}})
    assert controller.loss().item() == pytest.approx(2 * model.fc.weight.sum().item(), rel=1e-5)


def test_registry_without_plugins_is_usable():
    assert Registry().initializers() == {}
