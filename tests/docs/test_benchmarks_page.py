"""The benchmarks page and the decision table hold what the results hold."""

import re

import pytest

from docs.make_benchmarks import BENCHMARKS, CHOOSE, PAGE, benchmarks_page, choose_page
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_pages_are_made_of_the_results_as_they_are():
    assert PAGE.read_text() == benchmarks_page(), "run: python -m docs.make_benchmarks"
    assert CHOOSE.read_text() == choose_page(), "run: python -m docs.make_benchmarks"


def test_every_file_of_results_is_on_the_page():
    assert {path.stem for path in RESULTS.glob("*.json")} == {name for b in BENCHMARKS for name in b.files}


def test_every_script_is_on_the_page():
    """Those that draw, fetch, or are parts of others have no table."""
    text = PAGE.read_text()
    no_table = {"load_from_nncf", "distillation_against_nncf", "trace_zoo", "plot_bn_adaptation", "plot_reconstruction"}
    scripts = {
        p.stem for p in (ROOT / "benchmarks").glob("*.py") if re.search("^def main", p.read_text(), re.MULTILINE)
    }
    missing = {name for name in scripts if not re.search(rf"`(python -m benchmarks\.)?{name}[ `]", text)}
    assert missing == no_table | {"runtime_peers"} & scripts


@pytest.mark.parametrize("command", sorted({b.command for b in BENCHMARKS}))
def test_commands_have_the_options_that_they_name(command):
    name, *rest = command.split()
    package = ROOT / "benchmarks" / name.replace(".", "/")
    source = (package / "__main__.py" if package.is_dir() else package.with_suffix(".py")).read_text()
    for option in rest:
        assert not option.startswith("--") or f'"{option}"' in source, option
