"""Builds the JSON schema of configs for all installed algorithms."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from compress_core.config.document import RootSection
from compress_core.registry.registry import Registry

_TEMPLATE = "#/$defs/{model}"


def json_schema(registry: Registry) -> dict[str, Any]:
    """Returns the schema of a config (JSON Schema 2020-12).

    Args:
        registry: The installed plugins; an algorithm that two plugins contribute is left out.
    """
    names = [name for name, found in registry.algorithms().items() if len(found) == 1]
    classes = {name: registry.section_class(name) for name in names}
    roots: list[Any] = [(RootSection, "validation"), *((cls, "validation") for cls in classes.values())]
    references, definitions = models_json_schema(roots, ref_template=_TEMPLATE)
    schema: dict[str, Any] = definitions["$defs"].pop(
        references[(RootSection, "validation")]["$ref"].rpartition("/")[2]
    )
    one = {"anyOf": [references[(cls, "validation")] for cls in classes.values()]}
    schema["properties"]["compression"] = {
        "description": "an algorithm's section, or a list of them",
        "anyOf": [one, {"type": "array", "items": one}],
    }
    _allow_lists_of_one(schema)
    for definition in definitions["$defs"].values():
        _allow_lists_of_one(definition)
    # Keys that the core does not know belong to the user's own program.
    schema.update({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress-core config"})
    schema.update({"additionalProperties": True, "$defs": definitions["$defs"]})
    return schema


def _allow_lists_of_one(schema: dict[str, Any]) -> None:
    """Lets the schema accept a single scope or input without a list, as the validators do."""
    for name, entry in schema.get("properties", {}).items():
        if entry.get("type") == "array" and (name.endswith("_scopes") or name == "input_info"):
            kept = {key: entry.pop(key) for key in ("type", "items")}
            entry["anyOf"] = [kept, kept["items"]]
