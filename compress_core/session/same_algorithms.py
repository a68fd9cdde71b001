"""Compares the algorithms of a saved compression state with those of a controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_core.errors import StateError


def check_same_algorithms(
    saved: Any, here: Mapping[str, Any], what: str, remedy: str, keys: tuple[str, ...] = ("plan",)
) -> None:
    """Refuses a saved compression state that is of other algorithms, or of the same with other plans.

    Args:
        saved: The compression state that was saved.
        here: What `controller.get_compression_state()` returns now.
        what: Where the state was saved, such as "the checkpoint 'run.pt'".
        remedy: What to do if it differs.
        keys: What has to be the same: `plan`, and once the weights are loaded `state`, which may be measured on them.

    Raises:
        StateError: They differ; the message names the place.
    """
    algorithms = saved.get("algorithms") if isinstance(saved, Mapping) else None
    if not isinstance(algorithms, dict) or here["format"] != saved.get("format"):
        raise StateError(f"{what} has a compression state that this version does not read")
    mine = here["algorithms"]
    if mine.keys() != algorithms.keys():
        raise StateError(
            f"{what} is of the algorithms {list(algorithms)}, the controller has {list(mine)}; "
            "use the config that it was saved with"
        )
    for name, key in ((name, key) for name in mine for key in keys):
        place = _difference(*(_compared(entry[name], key) for entry in (algorithms, mine)))
        if place is not None:
            raise StateError(
                f"{what} was saved with another {key} of '{name}' than the controller has ({place}). {remedy}"
            )


def differing(saved: Mapping[str, Any], here: Mapping[str, Any], key: str) -> list[str]:
    """Returns the names of the algorithms of which two compression states hold another `key`."""
    algorithms, mine = saved["algorithms"], here["algorithms"]
    return [name for name in mine if _difference(algorithms[name].get(key), mine[name].get(key)) is not None]


def _compared(entry: Any, key: str) -> Any:
    """Returns what has to be the same in two entries of one algorithm; why a layer was skipped may be said anew."""
    found = entry.get(key) if isinstance(entry, dict) else None
    return {k: v for k, v in found.items() if k != "skipped"} if key == "plan" and isinstance(found, dict) else found


def _difference(saved: Any, here: Any, place: str = "") -> str | None:
    """Returns where two values from JSON differ first, or None."""
    if isinstance(saved, dict) and isinstance(here, dict) and saved.keys() == here.keys():
        inner = ((f"{place}.{key}" if place else str(key), saved[key], here[key]) for key in here)
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        inner = ((f"{place}[{number}]", *pair) for number, pair in enumerate(zip(saved, here, strict=True)))
    elif type(saved) is type(here) and saved == here:
        return None
    else:
        return f"{place or 'all of it'}: {_short(saved)} saved, {_short(here)} here"
    return next((found for where, a, b in inner if (found := _difference(a, b, where)) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
