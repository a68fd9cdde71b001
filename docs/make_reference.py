"""Writes docs/reference: every exported name, hook, choice, config key and command, from what the code says of them.

Usage: python -m docs.make_reference [--check]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress_core import Choice, ChoicePoint
from compress_core.__main__ import make_parser
from compress_core.contract import hookspecs
from compress_core.registry import Registry
from compress_core.registry.checks import hook_names
from docs.cli_page import cli_page
from docs.config_page import config_page

TARGET = Path(__file__).parent / "reference"
PACKAGES = (
    ("compress_core", "What a training script and a plugin import."),
    ("compress_core.accuracy_aware", "Training until the accuracy holds, and the search for the highest level."),
    ("compress_core.channels", "Which channels belong together, and the model without some of them."),
    ("compress_core.config", "Building blocks of config sections."),
    ("compress_core.export", "Files for runtimes, and what a plugin derives its own runtime from."),
    ("compress_core.integrations", "What the callbacks for training libraries share."),
    ("compress_core.integrations.accelerate", "The callback for accelerate."),
    ("compress_core.integrations.lightning", "The callback for Lightning."),
    ("compress_core.integrations.transformers", "The callback for Hugging Face's Trainer."),
    ("compress_core.nncf", "NNCF's names, for scripts that were written for it."),
    ("compress_core.pages", "What pages such as reports are made of."),
    ("compress_core.registry", "How plugins are found; `use_registry` gives a test plugins of its own."),
    ("compress_core.testing", "The conformance kit."),
    ("compress_core.trace", "How a model is read."),
    ("compress_core.transforms", "How a model is changed, and how every change is undone."),
    ("compress_quantization.precision", "What a method that chooses numbers of bits is given, and returns."),
    ("compress_quantization.ranges", "What a method that measures ranges is given, and returns."),
)
# They export names for the core or for their own package, and for nobody else.
INTERNAL = {
    "compress_core.contract.choices",
    "compress_core.contract.stages",
    "compress_core.export.runtimes",
    "compress_core.session.report",
    "compress_core.torch_internals",
    "compress_magnitude_sparsity.statistics",
    "compress_quantization.export",
    "compress_quantization.kernels",
    "compress_weight_reconstruction.solvers",
}
LINE = 96  # characters of code that fit into a page
MADE = "Made from the docstrings by `python -m docs.make_reference`; a test holds it to them."
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Public way|Without it|Why):\s*$")


def reference(registry: Registry) -> dict[str, str]:
    """Returns the pages by their paths within docs/reference.

    Args:
        registry: The built-in plugins.
    """
    pages = {f"api/{package}.md": _package(package, summary) for package, summary in PACKAGES}
    return {
        "index.md": _index(),
        "config.md": config_page(registry),
        "cli.md": cli_page(make_parser()),
        "hooks.md": _hooks(),
        "choices.md": _choices(registry),
        **pages,
    }


def names_of(package: str) -> list[str]:
    """Returns what a package exports: its `__all__`, or the public classes and functions that it defines."""
    module = importlib.import_module(package)
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == package
    ]
    return sorted(getattr(module, "__all__", defined), key=str.lower)


def _index() -> str:
    lines = [
        "# Reference",
        "",
        "Everything here is made from the code, by `python -m docs.make_reference`; tests hold it to that. How the",
        "parts play together is explained in [Config](../config.md) for users, and in",
        "[Writing a plugin](../plugins.md) for authors.",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        "config",
        "cli",
        "hooks",
        "choices",
        "```",
        "",
        "## API",
        "",
        "| package | what is in it |",
        "| --- | --- |",
        *(f"| [`{package}`](api/{package}.md) | {summary} |" for package, summary in PACKAGES),
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(f"api/{package}" for package, _ in PACKAGES),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _hooks() -> str:
    lines = [
        "# Hooks",
        "",
        f"What a plugin implements. {MADE}",
        "[Writing a plugin](../plugins.md#hooks) has a table of them in the order in which they are called.",
        "",
    ]
    for name in hook_names():
        lines += _entry(name, getattr(hookspecs, name), level=2)
    return "\n".join(lines).rstrip() + "\n"


def _choices(registry: Registry) -> str:
    lines = [
        "# Choices",
        "",
        "The points that plugins can add values to, and the built-in values. A config uses a value by its name.",
        "`compress-core choices` lists what is installed; [how to add one](../plugins.md#choice-points).",
        "",
    ]
    for name, point in registry.points().items():
        lines += [f"## `{name}`", "", f"A value is {point.description}.", ""]
        choices = registry.choices(name)
        if not choices:
            lines += ["Choices: none built in.", ""]
        elif any(found.choice.description for found in choices.values()):
            lines += ["| choice | meaning |", "| --- | --- |"]
            lines += [f"| `{key}` | {found.choice.description} |" for key, found in choices.items()]
            lines.append("")
        else:
            lines += [f"Choices: {', '.join(f'`{key}`' for key in choices)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _package(package: str, summary: str) -> str:
    lines = [f"# {package}", "", f"{summary} {MADE}", ""]
    module = importlib.import_module(package)
    for name in names_of(package):
        lines += _entry(name, getattr(module, name), level=2)
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{name}`"
    yield ""
    if signature := _signature(name, value):
        yield from ["```text", signature, "```", ""]
    if _has_own_doc(value):
        yield from _rendered(inspect.getdoc(value))
    elif name == "hookimpl":
        yield from ["Marks a method or a function as the implementation of a hook.", ""]
    elif typing.get_origin(value) is typing.Annotated:
        yield from [
            f"The type of a config field: `{inspect.formatannotation(typing.get_args(value)[0])}`, checked.",
            "",
        ]
    elif isinstance(value, ChoicePoint):
        yield from [f"The [choice point](../choices.md) `{value.name}`.", ""]
    elif isinstance(value, (list, tuple)) and all(isinstance(item, Choice) for item in value):
        yield from [f"The built-in choices: {', '.join(f'`{item.name}`' for item in value)}.", ""]
    elif isinstance(value, dict):
        yield from [f"A table of {', '.join(f'`{key}`' for key in value)}.", ""]
    else:
        yield from [f"`{re.sub('compress_core[a-z_.]*[.]', '', str(value))}`", ""]
    if inspect.isclass(value):
        yield from _members(name, value, level + 1)


def _members(owner: str, cls: type, level: int) -> Iterator[str]:
    """Those with one line of explanation as a list, then the others, each with its arguments."""
    longer = []
    for key, member in sorted(vars(cls).items()):
        if key.startswith("_") or not (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            continue
        function = member.__func__ if isinstance(member, classmethod) else member
        text = inspect.getdoc(member) or ""
        if "\n" in text:
            longer.append((key, function, text))
        else:
            line = " ".join(_signature(key, function).split()) if inspect.isfunction(function) else key
            yield f"- `{line.replace('( ', '(').replace(', )', ')')}`: {text}"
    yield ""
    for key, function, text in longer:
        yield f"{'#' * level} `{owner}.{key}`"
        yield ""
        if inspect.isfunction(function):
            yield from ["```text", _signature(key, function), "```", ""]
        yield from _rendered(text)


def _has_own_doc(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, (BaseException,)):
        return ""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return ""
    shown = [_parameter(parameter) for parameter in parameters if parameter.name not in ("self", "cls")]
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= LINE else "\n".join([f"{name}(", *(f"    {argument}," for argument in shown), ")"])


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = parameter.default
    if default is parameter.empty:
        return f"{star}{parameter.name}"
    text = repr(default)
    return f"{parameter.name}={text}" if len(text) < 30 and " at 0x" not in text else f"{parameter.name}=..."


def _rendered(doc: str | None) -> Iterator[str]:
    """Turns Google's sections into lists."""
    in_section = in_code = False
    for line in (doc or "").splitlines():
        if line.strip().startswith("```"):
            in_code = not in_code
        if not in_code and (match := _SECTION.match(line)):
            in_section = True
            yield f"**{match.group(1)}**"
            yield ""
        elif in_section and not in_code and re.match(r"^    \S", line) and not line.strip().startswith("```"):
            name, separator, rest = line.strip().partition(": ")
            yield f"- `{name}`: {rest}" if separator and re.fullmatch(r"\*{0,2}[\w.]+", name) else f"  {line.strip()}"
        else:
            in_section = in_section and (not line or line.startswith(" "))
            yield line[4:] if in_section else line
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the pages are up to date, and write nothing")
    options = parser.parse_args()
    registry = Registry()
    registry.load_entry_points()
    pages = {TARGET / path: text for path, text in reference(registry).items()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    left = [path for path in TARGET.rglob("*.md") if path not in pages]
    if options.check:
        return int(bool(stale or left))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path])
    for path in left:
        path.unlink()
    print(f"{TARGET}: {len(pages)} pages, {len(stale)} written, {len(left)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
