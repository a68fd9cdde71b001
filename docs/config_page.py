"""The page of the config schema: every key with its type, default and description, as the installed plugins say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from compress_core.registry import Registry
from compress_core.registry.schema import json_schema

Schema = dict[str, Any]
COMMON = ("algorithm", "initializer", "ignored_scopes", "target_scopes", "validate_scopes")
# The page that explains an algorithm or an initializer.
EXPLAINED = {
    "batchnorm_adaptation": "adaptation.md",
    "const_sparsity": "learned_sparsity.md#const_sparsity",
    "data_free_correction": "reconstruction.md#without-data",
    "filter_pruning": "filter_pruning.md",
    "knowledge_distillation": "knowledge_distillation.md",
    "magnitude_sparsity": "magnitude_sparsity.md",
    "movement_sparsity": "learned_sparsity.md#movement_sparsity",
    "quantization": "quantization.md",
    "rb_sparsity": "learned_sparsity.md#rb_sparsity",
    "weight_reconstruction": "reconstruction.md",
}
_BOUNDS = {
    "minimum": "at least",
    "ge": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "le": "at most",
    "exclusiveMaximum": "below",
}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "object",
}


def config_page(registry: Registry) -> str:
    """Returns the page.

    Args:
        registry: The plugins whose sections are on it.
    """
    schema = json_schema(registry)
    definitions: dict[str, Schema] = schema["$defs"]
    lines = [
        "# Config schema",
        "",
        "Made from the schema that configs are checked with, by `python -m docs.make_reference`; the command",
        "`compress-core schema` prints it for everything that is installed. [Config](../config.md) explains how a",
        "config is put together. In a key, `[]` is an entry of a list, and `*` a name of your choice.",
        "",
        "## Top level",
        "",
        *_table(_rows({"properties": schema["properties"]}, definitions)),
        "## Every section",
        "",
        "Each algorithm takes these keys in its section, besides its own.",
        "",
    ]
    names = {name: registry.section_class(name) for name in sorted(registry.algorithms())}
    first = definitions[next(iter(names.values())).__name__]
    common = {key: first["properties"][key] for key in COMMON}
    common["algorithm"] = {"enum": list(names), "description": common["algorithm"]["description"]}
    lines += _table(_rows({**first, "properties": common}, definitions, deep=False))
    lines += ["## Algorithms", ""]
    shared = sorted(registry.initializers())
    for name, section in names.items():
        own = dict(definitions[section.__name__])
        own["properties"] = {key: value for key, value in own["properties"].items() if key not in COMMON}
        initializer = dict(definitions[_reference(definitions[section.__name__]["properties"]["initializer"])])
        initializer["properties"] = {k: v for k, v in initializer["properties"].items() if k not in shared}
        rows = [*_rows(own, definitions), *_rows(initializer, definitions, "initializer.")]
        lines += [f"### `{name}`", "", *_explained(name), *(_table(rows) if rows else ["No keys of its own.", ""])]
    lines += ["## Shared initializers", "", "Under `initializer` in the section of every algorithm.", ""]
    for name in shared:
        section = definitions[
            _reference(definitions[_reference(first["properties"]["initializer"])]["properties"][name])
        ]
        lines += [f"### `{name}`", "", *_explained(name), *_table(_rows(section, definitions))]
    return "\n".join(lines).rstrip() + "\n"


def _explained(name: str) -> list[str]:
    if name not in EXPLAINED:
        return []
    return [f"Explained under [{EXPLAINED[name].partition('.')[0].replace('_', ' ')}](../{EXPLAINED[name]}).", ""]


def _rows(section: Schema, definitions: dict[str, Schema], prefix: str = "", deep: bool = True) -> Iterator[list[str]]:
    for key, field in section["properties"].items():
        # A single object that stands for a list of one has no rows of its own.
        nested: dict[str, str] = {}
        for suffix, name in _sections(field) if key != "compression" else ():
            nested.setdefault(name, suffix)
        kind = " or ".join(dict.fromkeys("list of objects" if "[]" in s else "object" for s in nested.values()))
        if key == "compression":
            kind = "object or list of objects"
        default = _default(key, field, section)
        yield [f"`{prefix}{key}`", kind or _type(field), default, field.get("description", "").strip()]
        for name, suffix in nested.items() if deep else ():
            yield from _rows(definitions[name], definitions, f"{prefix}{key}{suffix}.", deep)


def _sections(field: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yields what a field holds: "" or "[]" for an object or a list of objects, and the name of their section."""
    if "$ref" in field:
        yield suffix, str(field["$ref"]).rpartition("/")[2]
    for option in (*field.get("anyOf", ()), *field.get("oneOf", ()), *field.get("allOf", ())):
        yield from sorted(_sections(option, suffix))
    if isinstance(field.get("items"), dict):
        yield from _sections(field["items"], "[]")
    if isinstance(field.get("additionalProperties"), dict):
        yield from _sections(field["additionalProperties"], suffix + ".*")


def _reference(field: Schema) -> str:
    return next(name for _, name in _sections(field))


def _type(field: Schema) -> str:
    if "anyOf" in field:
        options = [_type(option) for option in field["anyOf"] if option.get("type") != "null"]
        one_or_many = len(options) == 2 and options[0] == f"list of: {options[1]}"
        return f"{options[1]}, or a list of it" if one_or_many else " or ".join(dict.fromkeys(options))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(_type(item) for item in field['prefixItems'])}]"
        return f"list of: {_type(field['items'])}" if field.get("items") else "list"
    if isinstance(field.get("additionalProperties"), dict):
        return f"object: name -> {_type(field['additionalProperties'])}"
    bounds = [f"{word} {_json(field[key])}" for key, word in _BOUNDS.items() if key in field]
    return ", ".join([_TYPES.get(field.get("type", ""), "any"), *bounds])


def _default(key: str, field: Schema, section: Schema) -> str:
    if key in section.get("required", ()):
        return "required"
    return f"`{_json(field['default'])}`" if field.get("default") is not None else ""


def _json(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _table(rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    return [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]
