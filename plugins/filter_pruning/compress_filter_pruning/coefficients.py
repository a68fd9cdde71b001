"""The file of ranking coefficients: a JSON object, name of a weight -> [a, b]."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_core import ConfigError
from compress_core.files import file_error, replaced_file
from compress_filter_pruning.ranking import problem_with
from compress_filter_pruning.statistics import Coefficients

_MOST_BYTES = 1 << 24


def check_folder(path: str, place: str) -> None:
    """Refuses a file that could not be written after a search of hours.

    Raises:
        ConfigError: There is no such folder, or it cannot be written to; or the path is that of a folder.
    """
    target = None if "\0" in path else Path(path).resolve()
    if target is None or target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ConfigError(f"'{path}' cannot be written: give a file in an existing folder that is writable", path=place)


def write_coefficients(path: str, coefficients: Coefficients) -> None:
    """Writes coefficients, completely or not at all.

    Raises:
        FileError: The file cannot be written.
    """
    text = json.dumps({name: list(pair) for name, pair in coefficients.items()}, indent=1) + "\n"
    with replaced_file(path) as file:
        file.write(text.encode())


def read_coefficients(path: str, names: Sequence[str], place: str) -> dict[str, tuple[float, float]]:
    """Reads what `write_coefficients` wrote.

    Args:
        path: The file.
        names: The weights that need coefficients.
        place: Path of the config value, for messages.

    Raises:
        FileError: The file cannot be read.
        ConfigError: It does not hold two finite numbers for each of these weights, and nothing else.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise file_error("cannot read", path, error) from error
    found, problem = _parsed(content)
    if problem is None:
        problem = problem_with(found, names)
    if problem is not None:
        raise ConfigError(
            f"'{path}' holds no ranking of this model: {problem}. Give a file that save_ranking_coeffs_path wrote for "
            "the same model and the same scopes",
            path=place,
        )
    return {name: (float(found[name][0]), float(found[name][1])) for name in names}


def _parsed(content: bytes) -> tuple[dict[str, Any], str | None]:
    if len(content) > _MOST_BYTES:
        return {}, f"it is larger than {_MOST_BYTES >> 20} MB"
    try:
        found = json.loads(content, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        return {}, f"it is not JSON ({str(error)[:80]})"
    return (found, None) if isinstance(found, dict) else ({}, "it is not an object with names of weights")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
