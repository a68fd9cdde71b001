"""How the tests of packages build wheels and make environments that hold nothing of this checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.conftest import ROOT

PLUGINS = ROOT / "examples" / "plugins"


def run(*command, **keywords):
    """Runs a command that has to succeed; returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=environment, check=False, **keywords
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(project, folder):
    """Builds a project with this environment's hatchling."""
    name = tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"]
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    return next(folder.glob(f"{name.replace('-', '_')}-*.whl"))


def ours():
    """Returns the names of everything in a site-packages folder that may come from this checkout."""
    projects = [ROOT, *(path.parent for path in PLUGINS.glob("*/pyproject.toml"))]
    packages = {path.name for path in (ROOT / "plugins").glob("*/compress_*")}
    for project in projects:
        packages.add(tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"].replace("-", "_"))
    names = "|".join(sorted(packages))
    # Editable installations are .pth files, with a finder or a folder of metadata beside them.
    return re.compile(rf"_?({names})(\.|-|$)|__editable__|_editable_impl|.*\.pth$")


def environment_without_us(folder):
    """Makes an environment that holds our dependencies, but nothing of this checkout; returns its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)  # pip takes seconds, and installs from outside as well
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Further folders come from .pth files, as where environments share their dependencies.
    for packages in (Path(path) for path in sys.path if Path(path).name == "site-packages"):
        for path in packages.iterdir():
            if not ours().match(path.name) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def install(python, *wheels):
    """Installs wheels into an environment that has their dependencies."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", *wheels)
