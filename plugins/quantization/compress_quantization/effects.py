"""Determines, for the ledger, which quantizers a value of the section applied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def applied_to(leaf: str, entries: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Returns the quantizers that a value applied to.

    Args:
        leaf: Path of the value: in an override or a range, an entry, or a list of scopes.
        entries: Path of an override, range, scope or entry -> the quantizers that it has matched.

    Returns:
        Their names; None for a value that applies to all quantizers.
    """
    # Scopes may contain dots, so a path may match several overrides; the one with the longest scope is right.
    above = max((path for path in entries if _is_in(leaf, path)), key=len, default=None)
    paths = [path for path in entries if path == above or _is_in(path, leaf)]
    return list(dict.fromkeys(name for path in paths for name in entries[path])) if paths else None


def _is_in(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")
