"""`compress-core check`, `algorithms` and `schema`."""

import json
from pathlib import Path

import pytest

from compress_core.__main__ import main
from compress_core.registry.schema import json_schema
from tests.config.document_helpers import QUANTIZATION, SPARSITY


@pytest.mark.parametrize(
    ("file", "status", "part"),
    [(SPARSITY, 0, "valid"), (QUANTIZATION, 0, "valid"), (Path("none.json"), 1, "cannot read")],
)
def test_command_check(file, status, part, capsys):
    assert main(["check", str(file)]) == status
    captured = capsys.readouterr()
    assert part in captured.out + captured.err


def test_command_algorithms_and_schema(capsys, registry):
    assert main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert "magnitude_sparsity" in out
    assert "batchnorm_adaptation" in out
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(registry)


def test_command_algorithms_tells_of_broken_plugins(capsys, registry):
    import importlib.metadata

    registry.load_entry_points([importlib.metadata.EntryPoint("broken", "no_such_module", "compress_core.plugins")])
    assert main(["algorithms"]) == 1
    assert "broken could not be loaded: ModuleNotFoundError" in capsys.readouterr().err


def test_command_whose_reader_stops_reading():
    import subprocess
    import sys

    from tests.conftest import ROOT

    command = f"{sys.executable} -m compress_core schema | head -1; exit ${{PIPESTATUS[0]}}"
    paths = f"{ROOT}:{ROOT}/plugins/magnitude_sparsity"
    result = subprocess.run(
        ["bash", "-c", command],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "{\n"
    assert (result.returncode, result.stderr) == (0, "")
