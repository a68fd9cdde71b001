import importlib.metadata
import logging
import sys
import types

import pluggy
import pytest

from compress_core import (
    AlgorithmConfig,
    ConfigError,
    Plan,
    PluginError,
    Stage,
    create_compressed_model,
    hookimpl,
)
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.registry import Registry
from compress_core.registry.checks import hook_names, new_manager
from tests.conftest import declared_entry_points
from tests.plugin_helpers import Nothing, algorithm, contributing, plugin
from tests.zoo import ResidualNet


def test_contribution_is_attributed():
    registry = Registry()
    registry.register(contributing(Nothing), "demo")
    assert registry.algorithm("nothing").cls is Nothing
    assert registry.algorithm("nothing").plugin.name == "demo"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (contributing, "implements no hook"),
        (Nothing, "is the class Nothing; register an instance"),
        (types.ModuleType("empty"), "implements no hook; mark its implementations with @compress_core.hookimpl"),
        (plugin(compress_algoritms=lambda self: []), "hook that does not exist. Did you mean compress_algorithms"),
        (
            type("P", (), {"compress_algorithms": lambda self: []})(),
            r"compress_algorithms\(\) lacks the decorator @hookimpl",
        ),
        (
            type("P", (), {"compress_algoritms": lambda self: []})(),
            r"compress_algoritms\(\) looks like a hook.*Did you mean compress_algorithms",
        ),
        (
            plugin(compress_plan=lambda self, modle: None),
            "argument 'modle' that the hook does not have. Did you mean 'model'",
        ),
        (plugin(compress_plan=lambda self, model=None: None), "'model' a default, so it would never be passed"),
        (plugin(compress_plan=lambda self, **kwargs: None), r"takes \*kwargs, which is never filled"),
        (
            type("P", (), {"plan": hookimpl(specname="compress_plan")(lambda self: None)})(),
            "uses specname='compress_plan'",
        ),
    ],
)
def test_strict_registration(bad, message):
    registry = Registry()
    with pytest.raises(PluginError, match=f"(?s)plugin 'bad'.*{message}"):
        registry.register(bad, "bad")
    assert registry.algorithms() == {}
    assert registry.plugins == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"name": "not a name"}, "must be an identifier"),
        ({"stage": 3}, "must be a compress_core.Stage"),
        ({"Config": dict}, "must be a subclass of compress_core.AlgorithmConfig"),
        ({"compress_commit": None}, r"must implement compress_commit\(\)"),
        ({"compress_comit": hookimpl(lambda self: None)}, "Did you mean compress_commit"),
        ({"compress_step": lambda self: None}, r"compress_step\(\) lacks the decorator"),
    ],
)
def test_algorithm_classes_are_checked(members, message):
    with pytest.raises(PluginError, match=message):
        Registry().register(contributing(algorithm(**members)), "bad")


def test_properties_are_not_computed_by_older_pluggy_either(monkeypatch):
    class Plugin:
        @property
        def state(self):
            raise AssertionError("computed")

        @hookimpl
        def compress_algorithms(self):
            return []

    def parse_of_pluggy_1_6(self, plugin, name):
        method = getattr(plugin, name)
        return getattr(method, f"{self.project_name}_impl", None) if callable(method) else None

    monkeypatch.setattr(pluggy.PluginManager, "parse_hookimpl_opts", parse_of_pluggy_1_6)
    manager = new_manager()
    manager.register(Plugin())
    assert manager.hook.compress_algorithms() == [[]]


def test_algorithm_that_is_none_is_refused():
    with pytest.raises(PluginError, match="not a subclass of Algorithm"):
        Registry().register(contributing(dict), "bad")


def test_broken_entry_point_is_one_warning_and_an_error_for_who_needs_it(registry, caplog):
    points = [importlib.metadata.EntryPoint("broken", "no_such_module_anywhere", ENTRY_POINT_GROUP)]
    with caplog.at_level(logging.WARNING):
        registry.load_entry_points(points)
    warnings = [record for record in caplog.records if "broken could not be loaded" in record.message]
    assert len(warnings) == 1
    config = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}}
    create_compressed_model(ResidualNet(), config)
    with pytest.raises(
        ConfigError,
        match=r"'wavelets' is not installed.*broken could not be loaded: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "wavelets"}})


def entry_points(module, *names):
    return [importlib.metadata.EntryPoint(name, module.__name__, ENTRY_POINT_GROUP) for name in names]


def plugin_module(monkeypatch, **members):
    module = types.ModuleType("plugin_of_several")
    module.compress_algorithms = hookimpl(lambda: [algorithm(name="one"), algorithm(name="two")])
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("first", ["one", "two"])
def test_plugin_with_several_entry_points_is_called_by_its_own_name_whichever_is_loaded(monkeypatch, first):
    registry = Registry()
    module = plugin_module(monkeypatch, plugin_name="both")
    registry.find_entry_points(entry_points(module, "one", "two"))
    assert str(registry.algorithm(first).plugin) == "both"
    assert {name: str(found[0].plugin) for name, found in registry.algorithms().items()} == {
        "one": "both",
        "two": "both",
    }
    assert registry.failures == []


@pytest.mark.parametrize("name", ["", "  ", None, 3, ["both"]])
def test_plugin_name_that_is_no_text_is_refused(monkeypatch, name):
    registry = Registry()
    registry.load_entry_points(entry_points(plugin_module(monkeypatch, plugin_name=name), "one"))
    (failure,) = registry.failures
    assert "plugin_name" in str(failure)
    assert repr(name) in str(failure)
    assert registry.algorithms() == {}


def test_the_learned_kinds_of_sparsity_are_one_plugin_with_a_name_of_its_own():
    for name in ("rb_sparsity", "movement_sparsity", "const_sparsity"):
        registry = Registry()
        registry.find_entry_points(declared_entry_points())
        assert registry.algorithm(name).plugin.name == "learned_sparsity"


def test_two_plugins_for_one_name_are_an_error_for_who_uses_it(registry):
    registry.register(contributing(algorithm()), "first")
    registry.register(contributing(algorithm()), "second")
    with pytest.raises(ConfigError, match="contributed by first and second; uninstall all but one"):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine"}})
    create_compressed_model(ResidualNet(), {"compression": {"algorithm": "magnitude_sparsity"}})


def test_algorithm_without_targets_is_an_error(registry):
    registry.register(contributing(Nothing), "demo")
    with pytest.raises(ConfigError, match=r"compression\.nothing: finds nothing to compress"):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "nothing"}})


def test_error_in_a_hook_keeps_its_type_and_names_the_plugin(registry):
    def fail(self):
        raise ZeroDivisionError("mine")

    registry.register(contributing(algorithm(compress_plan=hookimpl(fail))), "demo")
    with pytest.raises(ZeroDivisionError) as caught:
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine"}})
    assert caught.value.__notes__ == ["raised in compress_plan() of 'mine', demo"]


def test_wrong_result_type_names_the_plugin(registry):
    registry.register(contributing(algorithm(compress_plan=hookimpl(lambda self: ["conv1"]))), "demo")
    with pytest.raises(
        PluginError, match=r"compress_plan\(\) of the algorithm 'mine' \(demo\) returned a list, not a Plan"
    ):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine"}})


def test_undeclared_change_in_place_is_refused_and_undone(registry):
    def commit(self, model):
        model.conv1.weight.data.mul_(2)

    members = {
        "compress_plan": hookimpl(lambda self: Plan(("conv1.weight",))),
        "compress_commit": hookimpl(commit),
    }
    registry.register(contributing(algorithm(**members)), "demo")
    model = ResidualNet()
    before = model.conv1.weight.clone()
    with pytest.raises(PluginError, match=r"written to the model's tensors.*conv1.weight.*changes_in_place = True"):
        create_compressed_model(model, {"compression": {"algorithm": "mine"}})
    assert torch_equal(model.conv1.weight, before)
    registry.register(contributing(algorithm(name="declared", changes_in_place=True, **members)), "demo2")
    create_compressed_model(model, {"compression": {"algorithm": "declared"}})
    assert torch_equal(model.conv1.weight, before * 2)


def torch_equal(left, right):
    return bool((left == right).all())


def test_pipeline_order_is_by_stage_then_by_the_config(registry):
    calls = []

    def make(name, stage):
        def commit(self):
            calls.append(self.name)

        return algorithm(
            name=name,
            stage=stage,
            compress_plan=hookimpl(lambda self: Plan(("x",))),
            compress_commit=hookimpl(commit),
        )

    classes = [
        make("c", Stage.PRECISION),
        make("b", Stage.SPARSITY),
        make("a", Stage.STRUCTURE),
        make("b2", Stage.SPARSITY),
    ]
    registry.register(contributing(*classes), "demo")
    sections = [{"algorithm": name} for name in ("c", "b2", "b", "a")]
    controller, _ = create_compressed_model(ResidualNet(), {"compression": sections})
    assert calls == ["a", "b2", "b", "c"]
    assert list(controller.algorithms) == calls


def test_observer_sees_every_algorithm_and_must_not_answer(registry):
    seen = []

    class Observer:
        @hookimpl
        def compress_commit(self, algorithm, plan):
            seen.append((algorithm.name, len(plan.targets)))

    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    create_compressed_model(ResidualNet(), config, observers=[Observer()])
    assert seen == [("magnitude_sparsity", 3)]

    class Answering:
        @hookimpl
        def compress_plan(self):
            return Plan(("x",))

    with pytest.raises(PluginError, match="an observer must return None"):
        create_compressed_model(ResidualNet(), config, observers=[Answering()])


def test_every_hook_says_when_it_is_called():
    from compress_core.contract import hookspecs

    for name in hook_names():
        doc = getattr(hookspecs, name).__doc__
        assert doc and len(doc.split()) > 10, name


def test_config_class_defaults_to_the_base(registry):
    registry.register(contributing(Nothing), "demo")
    assert issubclass(registry.section_class("nothing"), AlgorithmConfig)
    assert (
        "batchnorm_adaptation" in registry.section_class("nothing").model_fields["initializer"].annotation.model_fields
    )
