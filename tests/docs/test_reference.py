"""The reference is what the code says, and leaves no name, hook, argument, point, choice, key or option out."""

import argparse
import importlib
import pkgutil
import re
import typing

import pytest

from compress_core.__main__ import make_parser
from compress_core.config.document import RootSection
from compress_core.config.sections import Section
from compress_core.registry.checks import hook_names
from docs.make_reference import INTERNAL, PACKAGES, TARGET, names_of, reference
from tests.conftest import ROOT


def page(path):
    return (TARGET / path).read_text()


def entry(text, name, level=2):
    return text.split(f"\n{'#' * level} `{name}`\n")[1].split(f"\n{'#' * level} ")[0]


def test_pages_are_made_from_the_code_as_it_is(registry):
    made = reference(registry)
    assert {str(path.relative_to(TARGET)) for path in TARGET.rglob("*.md")} == set(made)
    for path, text in made.items():
        assert page(path) == text, f"{path}; run: python -m docs.make_reference"


def test_page_holds_every_hook_with_its_arguments():
    text = page("hooks.md")
    for name, arguments in hook_names().items():
        assert f"\n{name}({', '.join(arguments)})\n" in text
        assert all(f"- `{argument}`: " in entry(text, name) for argument in arguments), name


def test_page_holds_every_point_with_its_choices(registry):
    text = page("choices.md")
    assert set(registry.points()) >= {"level_schedule", "channels.rule", "filter_pruning.importance"}
    for name in registry.points():
        assert all(f"`{choice}`" in entry(text, name) for choice in registry.choices(name)), name


@pytest.mark.parametrize("package", [package for package, _ in PACKAGES])
def test_page_holds_every_exported_name_with_an_explanation(package):
    text = page(f"api/{package}.md")
    for name in names_of(package):
        explained = re.sub(r"```.*?```", "", entry(text, name), flags=re.DOTALL).strip()
        assert explained, f"{package}.{name} has no docstring"


def test_every_package_that_exports_names_has_a_page_or_is_internal():
    found = {"compress_core"}
    for path in [ROOT / "compress_core", *(ROOT / "plugins").glob("*/compress_*")]:
        for module in pkgutil.walk_packages([str(path)], f"{path.name}."):
            source = ROOT / ("" if path.name == "compress_core" else path.parent.relative_to(ROOT))
            file = source.joinpath(*module.name.split("."))
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            if not file.exists():  # a folder of data
                continue
            if re.search(r"^__all__ = \[\n? *\"", file.read_text(), re.MULTILINE):
                found.add(module.name)
    paged = {package for package, _ in PACKAGES}
    assert found <= paged | INTERNAL
    assert found >= INTERNAL
    assert {package for package in paged if hasattr(importlib.import_module(package), "__all__")} <= found


def fields(section, prefix=""):
    """Yields the path of each key, as it is written on the page, from pydantic's fields and not from the schema."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for suffix, nested in sections_in(field.annotation):
            yield from fields(nested, f"{prefix}{name}{suffix}.")


def sections_in(annotation, suffix=""):
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield suffix, annotation
    origin = typing.get_origin(annotation)
    suffix += {list: "[]", dict: ".*"}.get(origin, "")
    for argument in typing.get_args(annotation):
        yield from sections_in(argument, suffix)


def test_page_holds_every_key_of_the_config(registry):
    text = page("config.md")
    top = set(re.findall(r"^\| `([\w.*\[\]]+)` \|", entry_of(text, "Top level"), re.MULTILINE))
    assert top == {*fields(RootSection), "compression"}
    common = set(re.findall(r"^\| `([\w.*\[\]]+)` \|", entry_of(text, "Every section"), re.MULTILINE))
    shared = set(registry.initializers())
    for name in registry.algorithms():
        documented = set(re.findall(r"^\| `([\w.*\[\]]+)` \|", entry(text, name, 3).split("\n## ")[0], re.MULTILINE))
        keys = {
            key
            for key in fields(registry.section_class(name))
            if not (key.startswith("initializer.") and key.split(".")[1] in shared)
        }
        assert documented == keys - common, name
    for name in shared:
        documented = set(re.findall(r"^\| `([\w.*\[\]]+)` \|", entry(text, name, 3), re.MULTILINE))
        assert documented == set(fields(registry.initializers()[name].cls.Config)), name


def entry_of(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_page_holds_every_command_with_its_options():
    text = page("cli.md")
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(re.findall(r"^## `([\w-]+)`$", text, re.MULTILINE)) == set(commands.choices)
    for name, command in commands.choices.items():
        part = entry(text, name)
        for action in command._actions:
            for option in action.option_strings or [action.metavar or action.dest.upper()]:
                assert option in ("-h", "--help") or f"`{option}" in part, f"{name} {option}"
