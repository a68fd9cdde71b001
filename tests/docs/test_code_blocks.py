"""All code of the pages runs: each block of Python, each config, each command line.

Tutorials run while the site is built (`make docs`); what some other test runs is listed with it. Nothing is left out.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys

import json5
import pytest

from compress_core import check_config
from compress_core.__main__ import make_parser
from tests.conftest import ROOT
from tests.docs.setups import CHECKS, SETUPS

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

RECIPES = ["recipes/timm.md", "recipes/torchvision.md", "recipes/ultralytics.md"]

# Blocks that another test runs, because they need a library, several runs, or a process of their own.
ELSEWHERE = {
    ("checkpoints.md", 0): "tests/docs/test_documents.py",
    ("loops.md", 0): "tests/integrations/test_docs.py",
    ("loops.md", 1): "tests/integrations/test_docs.py",
    ("loops.md", 2): "tests/integrations/test_docs.py",
    ("plugins.md", 1): "tests/plugins/quantization/devices/test_documents.py",
    ("plugins.md", 2): "tests/docs/test_documents.py",
    **{(page, n): "tests/docs/test_recipes.py" for page in RECIPES for n in range(6)},
}
NEEDS = {("export.md", 3): "executorch"}

# The languages of blocks; `text` is output, and commands stand in blocks without a language.
LANGUAGES = {
    "",
    "json",
    "python",
    "text",
    "{image} pictures/report.png",
    "{toctree}",
    "{include} ../CHANGELOG.md",
    "{code-cell}",
    "{code-cell} ipython3",
}


def blocks(page, language):
    return [text for _, found, text in BLOCK.findall((DOCS / page).read_text()) if found == language]


def pages_with(language, but="reference/"):
    return [page for page in PAGES if blocks(page, language) and not page.startswith(but)]


def test_every_block_has_a_language_that_is_run_or_is_output():
    found = {language for page in PAGES for _, language, _ in BLOCK.findall((DOCS / page).read_text())}
    assert found <= LANGUAGES


def test_what_is_listed_is_there():
    there = {(page, n) for page in PAGES for n in range(len(blocks(page, "python")))}
    assert {key for key in SETUPS if isinstance(key, tuple)} | set(CHECKS) | set(NEEDS) <= there
    assert {page for page, _ in ELSEWHERE} <= {page for page, _ in there}
    assert {key for key in SETUPS if isinstance(key, str)} <= set(PAGES)
    for test in ELSEWHERE.values():
        assert (ROOT / test).exists()


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COMPRESS_QUANTIZATION_KERNELS", "eager")
    space = {"__name__": "page"}
    if page in SETUPS:
        SETUPS[page](space, monkeypatch)
    for number, source in enumerate(blocks(page, "python")):
        key = page, number
        if key in ELSEWHERE or (key in NEEDS and importlib.util.find_spec(NEEDS[key]) is None):
            continue
        if key in SETUPS:
            SETUPS[key](space, monkeypatch)
        exec(compile(source, f"{page}, block {number}", "exec"), space)
        if key in CHECKS:
            CHECKS[key](space)


def test_tutorials_leave_no_code_to_the_reader():
    tutorials = [page for page in PAGES if blocks(page, "{code-cell}")]
    assert tutorials == [page for page in PAGES if page.startswith("tutorials/") and page != "tutorials/index.md"]
    for page in tutorials:
        assert "file_format: mystnb" in (DOCS / page).read_text()
        assert not blocks(page, "python")


@pytest.mark.parametrize("page", pages_with("json"))
def test_configs_are_valid(page, tmp_path):
    for number, text in enumerate(blocks(page, "json")):
        if text.lstrip().startswith('"'):  # a part of a section
            name = "knowledge_distillation" if page == "knowledge_distillation.md" else "magnitude_sparsity"
            text = f'{{"algorithm": "{name}", {text}}}'
        document = json5.loads(text)
        if "algorithm" in document:
            document = {"compression": document}
        assert "compression" in document, f"{page}, block {number}"
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document))
        check_config(path)


def command_lines():
    for page in PAGES:
        if page.startswith("tutorials/"):
            continue
        text = (DOCS / page).read_text()
        for block in blocks(page, ""):
            yield from ((page, line.removeprefix("$ ")) for line in block.splitlines())
        yield from ((page, line) for line in re.findall(r"`((?:compress-core|python -m) [^`\n]+)`", text))


COMMANDS = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_command_lines_name_commands_and_options_that_exist():
    parser, seen = make_parser(), 0
    for page, line in command_lines():
        if not line.startswith(("compress-core ", "python -m ")):
            continue
        words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
        if words[:1] == ["compress-core"] and page != "reference/cli.md" and "COMMAND" not in words:
            if words[2:] or words[1] in ("algorithms", "choices", "schema"):
                parser.parse_args(words[1:])
            else:  # a command that is only named
                assert words[1] in COMMANDS, f"{page}: {line}"
            seen += 1
        elif words[:2] == ["python", "-m"] and words[2:]:
            module = words[2]
            assert module.isupper() or module.endswith(".NAME") or importlib.util.find_spec(module), f"{page}: {line}"
            seen += 1
    assert seen > 60
