"""Writes docs/reference.md: every exported name, hook, open point and choice, from their docstrings.

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

from compress_core.contract import hookspecs
from compress_core.registry import Registry
from compress_core.registry.checks import hook_names

TARGET = Path(__file__).parent / "reference.md"
PACKAGES = (
    ("compress_core", "What a training script and a plugin import."),
    ("compress_core.transforms", "How a model is changed, and how every change is undone."),
    ("compress_core.channels", "Which channels belong together, and the model without some of them."),
    ("compress_core.trace", "How a model is read."),
    ("compress_core.pages", "What pages such as reports are made of."),
    ("compress_core.config", "Building blocks of config sections."),
    ("compress_core.nncf", "NNCF's names, for scripts that were written for it."),
    ("compress_core.testing", "The conformance kit."),
)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Public way|Without it|Why):\s*$")


def reference(registry: Registry) -> str:
    """Returns the page.

    Args:
        registry: The built-in plugins.
    """
    lines = [
        "# Reference",
        "",
        "Made from the docstrings by `python -m docs.make_reference`; a test holds it to them. How the parts play",
        "together: [plugins.md](plugins.md).",
        "",
        "## Hooks",
        "",
    ]
    for name in hook_names():
        lines += _entry(name, getattr(hookspecs, name), level=3)
    lines += ["## Open points", ""]
    for name, point in registry.points().items():
        choices = ", ".join(f"`{key}`" for key in registry.choices(name)) or "none built in"
        lines += [f"### `{name}`", "", f"A value is {point.description}. Choices: {choices}.", ""]
    for package, summary in PACKAGES:
        lines += [f"## {package}", "", summary, ""]
        module = importlib.import_module(package)
        for name in sorted(module.__all__, key=str.lower):
            lines += _entry(name, getattr(module, name), level=3)
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
    elif isinstance(value, dict):
        yield from [f"A table of {', '.join(f'`{key}`' for key in value)}.", ""]
    else:
        yield from [f"`{re.sub('compress_core[a-z_.]*[.]', '', str(value))}`", ""]
    if inspect.isclass(value):
        for key, member in sorted(vars(value).items()):
            if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
                text = inspect.getdoc(member) or ""
                function = member.__func__ if isinstance(member, classmethod) else member
                arguments = _signature(key, function) if inspect.isfunction(function) else key
                yield f"- `{arguments}`: {text.split(chr(10), 1)[0]}"
        yield ""


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
    return f"{name}({', '.join(shown)})"


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
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date, and write nothing")
    options = parser.parse_args()
    registry = Registry()
    registry.load_entry_points()
    text = reference(registry)
    if options.check:
        return int(TARGET.read_text() != text)
    TARGET.write_text(text)
    print(f"{TARGET}: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
