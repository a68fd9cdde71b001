"""The wheel in an environment of its own, alone and with a third party's plugin installed beside it."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile

import pytest

from tests.conftest import ROOT
from tests.packaging.packages import PLUGINS, build_wheel, environment_without_us, install, run

pytestmark = pytest.mark.slow

JOB = """
import json, torch
from torch import nn
from compress_core import create_compressed_model
from compress_core.registry import default_registry

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
loader = [torch.randn(16, 3, 8, 8) for _ in range(4)]
adapt = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}
sections = [{"algorithm": name, "initializer": adapt} for name in %s]
controller, model = create_compressed_model(model, {"compression": sections}, init_loader=loader)
print(json.dumps({
    "plugins": {name: str(found[0].plugin) for name, found in default_registry().algorithms().items()},
    "initializers": sorted(default_registry().initializers()),
    "failures": [str(failure.error) for failure in default_registry().failures],
    "sections": list(controller.algorithms),
    "samples": controller.statistics().batchnorm_adaptation.report.samples,
    "state": {k: v["version"] for k, v in controller.get_compression_state()["algorithms"].items()},
    "plain": [type(m).__name__ for m in controller.strip()],
}))
"""


@pytest.fixture
def environment(tmp_path, wheel):
    python = environment_without_us(tmp_path / "env")
    install(python, wheel)
    return python


LEARNED = ("const_sparsity", "movement_sparsity", "rb_sparsity")  # of one plugin
ALGORITHMS = ("filter_pruning", "knowledge_distillation", "magnitude_sparsity", "quantization")
OTHERS = ("compress_learned_sparsity", "compress_weight_reconstruction")
PACKAGES = ("compress_core", *(f"compress_{name}" for name in ALGORITHMS), *OTHERS)


def test_wheel_holds_what_is_ours_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert "compress_quantization/profiles/cpu.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_alone_finds_the_built_in_plugins(environment, tmp_path):
    found = json.loads(run(environment, "-c", JOB % '["magnitude_sparsity"]', cwd=tmp_path))
    plugins = {**{name: name for name in ALGORITHMS}, **dict.fromkeys(LEARNED, "learned_sparsity")}
    assert found["plugins"] == {name: f"plugin '{plugin}' (compress-core 0.1.0)" for name, plugin in plugins.items()}
    assert found["initializers"] == ["batchnorm_adaptation", "data_free_correction", "weight_reconstruction"]
    assert found["failures"] == []
    assert found["samples"] == 32
    assert run(environment, "-c", "import compress_core; print(compress_core.__file__)", cwd=tmp_path).startswith(
        str(tmp_path)
    )


def test_third_party_plugin_is_found_configured_run_and_reported_like_a_built_in(environment, tmp_path):
    install(environment, build_wheel(PLUGINS / "random_sparsity", tmp_path))
    found = json.loads(run(environment, "-c", JOB % '["random_sparsity", "magnitude_sparsity"]', cwd=tmp_path))
    assert found["plugins"]["random_sparsity"] == "plugin 'random_sparsity' (random-sparsity 0.3.0)"
    assert found["failures"] == []
    assert found["sections"] == ["random_sparsity", "magnitude_sparsity"]
    assert found["state"] == {"random_sparsity": "0.3.0", "magnitude_sparsity": "0.1.0"}
    assert found["plain"] == ["Conv2d", "BatchNorm2d", "ReLU", "Flatten", "Linear"]
    command = environment.parent / "compress-core"
    assert re.search(
        r"algorithm +│ random_sparsity +│ random_sparsity +│ random-sparsity +│ 0.3.0", run(command, "algorithms")
    )
    assert "RandomSparsityConfig" in run(command, "schema")
    config = tmp_path / "config.json"
    config.write_text('{"compression": {"algorithm": "random_sparsity", "levle": 0.5}}')
    result = subprocess.run([command, "check", config], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "compression.random_sparsity.levle: unknown key (value 0.5). Did you mean 'level'?" in result.stderr


def test_pytest_works_in_a_checkout_that_was_never_installed(tmp_path):
    python = environment_without_us(tmp_path / "env")
    out = run(python, "-m", "pytest", "-q", "tests/config/test_document.py", cwd=ROOT)
    assert " passed" in out


def test_example_package_is_the_readmes_plugin():
    source = (PLUGINS / "random_sparsity" / "random_sparsity.py").read_text()
    assert f"```python\n{source}```" in (ROOT / "README.md").read_text()
