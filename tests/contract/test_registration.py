"""Plugins are loaded when they are wanted, and held to the contract."""

import importlib.metadata
import logging
import subprocess
import sys

import pytest
from pydantic import Field

from compress_core import (
    AlgorithmConfig,
    ConfigError,
    PluginError,
    create_compressed_model,
    hookimpl,
)
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.registry import Registry, use_registry
from tests.conftest import ROOT, declared_entry_points
from tests.contract.algorithms import Base, images, net, sections
from tests.plugin_helpers import contributing


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
        (Misspelt, r"Misspelt.config_type is never read. Did you mean 'Config'\?"),
        (MisspeltReads, r"MisspeltReads.read_later is never read. Did you mean 'reads_later'\?"),
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

    registry = Registry()
    registry.register(contributing(Own), "test")
    assert registry.algorithm("base").cls is Own
