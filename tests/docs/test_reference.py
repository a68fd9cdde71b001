"""The reference is what the docstrings say, and leaves no name, hook, argument, point or choice out."""

import importlib
import re

from compress_core.registry.checks import hook_names
from docs.make_reference import PACKAGES, TARGET, reference


def test_page_is_made_from_the_docstrings_as_they_are(registry):
    assert TARGET.read_text() == reference(registry), "run: python -m docs.make_reference"


def test_page_holds_every_hook_with_its_arguments():
    text = TARGET.read_text()
    for name, arguments in hook_names().items():
        assert f"\n{name}({', '.join(arguments)})\n" in text
        entry = text.split(f"### `{name}`\n")[1].split("\n### ")[0]
        assert all(f"- `{argument}`: " in entry for argument in arguments), name


def test_page_holds_every_point_with_its_choices(registry):
    text = TARGET.read_text()
    assert set(registry.points()) >= {"level_schedule", "channels.rule", "filter_pruning.importance"}
    for name in registry.points():
        entry = text.split(f"### `{name}`\n")[1].split("\n### ")[0]
        assert all(f"`{choice}`" in entry for choice in registry.choices(name)), name


def test_page_holds_every_exported_name_with_an_explanation():
    text = TARGET.read_text()
    for package, _ in PACKAGES:
        part = text.split(f"\n## {package}\n")[1].split("\n## ")[0]
        for name in importlib.import_module(package).__all__:
            entry = part.split(f"### `{name}`\n")[1].split("\n### ")[0]
            explained = re.sub(r"```.*?```", "", entry, flags=re.DOTALL).strip()
            assert explained, f"{package}.{name} has no docstring"
