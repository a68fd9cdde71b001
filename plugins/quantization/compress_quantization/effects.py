"""Which quantizers a value of the section has had its effect on, for the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def applied_to(leaf: str, entries: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Returns the quantizers that a value has applied to.

    Args:
        leaf: Path of the value: in an override or a range, an entry, or a list of scopes.
        entries: Path of an override, range, scope or entry -> the quantizers that it has matched.

    Returns:
        Their names; None for a value that is for all quantizers.
    """
    # Scopes have dots in them: of the overrides that a path may be in, it is in the one with the longest scope.
    above = max((path for path in entries if _is_in(leaf, path)), key=len, default=None)
    paths = [path for path in entries if path == above or _is_in(path, leaf)]
    return list(dict.fromkeys(name for path in paths for name in entries[path])) if paths else None


def _is_in(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")
