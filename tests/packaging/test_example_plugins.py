"""The example plugins as users have them: wheels in one environment beside the core's, without this checkout."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.packaging.packages import PLUGINS, build_wheel, environment_without_us, install, run

pytestmark = pytest.mark.slow

PROJECTS = sorted(path.parent for path in PLUGINS.glob("compress-*/pyproject.toml"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheel):
    folder = tmp_path_factory.mktemp("plugins")
    python = environment_without_us(folder / "env")
    install(python, wheel, *(build_wheel(project, folder) for project in PROJECTS))
    return python


def test_the_commands_list_what_they_bring(environment, tmp_path):
    command = environment.parent / "compress-core"
    algorithms = run(command, "algorithms", cwd=tmp_path)
    for name in ("nm_sparsity", "palettize", "lowrank", "bias_correction"):
        assert f"compress-{name.replace('_', '-')}" in line_of(algorithms, name)
    choices = run(command, "choices", cwd=tmp_path)
    for name in ("hoyer", "cosine", "compress_extras.scale_shift"):
        assert "compress-extras" in line_of(choices, name)


def line_of(text, name):
    return next(line for line in text.splitlines() if name in line.split())


def test_entry_points_are_named_after_what_they_bring(environment, tmp_path):
    names = [
        name
        for project in PROJECTS
        for name in tomllib.loads((project / "pyproject.toml").read_text())["project"]["entry-points"][
            "compress_core.plugins"
        ]
    ]
    code = (
        "import json; from compress_core.registry import default_registry as registry; r = registry();"
        "print(json.dumps([[*r.algorithms(), *r.initializers(), *(n for p in r.points() for n in r.choices(p))],"
        "[str(f.error) for f in r.failures]]))"
    )
    brought, failures = json.loads(run(environment, "-c", code, cwd=tmp_path))
    assert failures == []
    assert set(names) <= set(brought)


def test_their_own_tests_pass(environment, tmp_path):
    for project in PROJECTS:
        shutil.copytree(project / "tests", tmp_path / project.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import compress_core, compress_palettize as p; print(compress_core.__file__, p.__file__)"
    for path in run(environment, "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(environment.parent.parent)
    # Compiling takes seconds each time; palettize alone has a transform of its own.
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "palettize or not compile"]
    out = run(environment, "-m", "pytest", *options, ".", cwd=tmp_path)
    assert " passed" in out


def test_four_algorithms_of_two_authors_from_creation_to_the_plain_model(environment, tmp_path):
    shutil.copy(Path(__file__).with_name("combined_job.py"), tmp_path)
    found = json.loads(run(environment, "combined_job.py", cwd=tmp_path).splitlines()[-1])
    assert found["algorithms"] == ["lowrank", "filter_pruning", "nm_sparsity", "quantization"]
    targets = found["targets"]
    assert targets["lowrank"] == ["5.weight"]
    assert {"5.0.weight", "5.1.weight"} <= set(targets["nm_sparsity"])
    assert "0.weight" in targets["filter_pruning"]
    assert found["losses"][1] < found["losses"][0]
    assert found["resumed_differs_by"] == 0
    assert found["corrected"] == ["0", "3", "5", "9"]
    assert found["plain"][5] == "Sequential"
    assert found["shapes"]["0.weight"][0] < 16
    assert found["shapes"]["3.weight"][1] == found["shapes"]["0.weight"][0]
    zeros, blocks = found["zeros_of_blocks"]
    assert zeros >= 2
    assert blocks == found["shapes"]["3.weight"][0] // 4
    assert found["outputs"] == [16, 4]
