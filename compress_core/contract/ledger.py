"""The ledger: what each value of the config did to which modules."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compress_core.config.errors import shown
from compress_core.config.sections import AlgorithmConfig, Section
from compress_core.contract.statistics import Statistics, Table
from compress_core.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

# Keys of every section that the core itself reads.
_ALWAYS_USED = ("algorithm", "validate_scopes")


@dataclass(frozen=True)
class LedgerEntry:
    """One value of the config.

    Attributes:
        path: Its path in the config.
        value: The value itself.
        effect: What it did, in words.
        modules: Dotted names of what it changed.
    """

    path: str
    value: Any
    effect: str
    modules: tuple[str, ...] = ()


class Ledger(Statistics):
    """Records the effect of each value in the config.

    A value without an effect means that the model is not what the config says, so such values are reported.
    """

    def __init__(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self._entries.values())

    def __repr__(self) -> str:
        return f"Ledger({len(self._entries)} values)"

    def __getitem__(self, path: str) -> LedgerEntry:
        return self._entries[path]

    def record(self, path: str, value: Any, effect: str, modules: Iterable[str] = ()) -> None:
        """Records what a value did; a second entry for a path replaces the first."""
        self._entries[path] = LedgerEntry(path, value, effect, tuple(modules))

    def close_section(
        self,
        path: str,
        config: AlgorithmConfig,
        targets: Iterable[str],
        *,
        read_later: Sequence[str] = (),
        strict: bool,
    ) -> None:
        """Records every value of an algorithm's section that has no entry yet, and reports values that were never read.

        Args:
            path: Config path of the section.
            config: The section.
            targets: Dotted names of what the algorithm changed.
            read_later: Values that will be read in training.
            strict: Whether a value without effect is an error; otherwise it is a warning.

        Raises:
            ConfigError: A value was given but never read, so it cannot have had an effect.
        """
        self.refuse_unread(path, config, read_later=read_later, strict=strict)
        modules = tuple(targets)
        for leaf, value, _ in config.given_leaves():
            if f"{path}.{leaf}" not in self._entries:
                self.record(f"{path}.{leaf}", value, f"used by {config.algorithm}", modules)

    def close_planned_section(
        self,
        path: str,
        config: AlgorithmConfig,
        targets: Iterable[str],
        *,
        read_later: Sequence[str] = (),
        calibrates: bool,
        strict: bool,
    ) -> None:
        """Records every value of a section of which only the plan was made; see `close_section`.

        Args:
            path: Config path of the section.
            config: The section.
            targets: Dotted names of what the algorithm would change.
            read_later: Values that will be read in training.
            calibrates: Whether the creation goes on to read the section, in calibration.
            strict: Whether a value without effect is an error; otherwise it is a warning.

        Raises:
            ConfigError: A value was given but never read, and the creation would not read it either.
        """
        for leaf, value, was_read in config.given_leaves() if calibrates else ():
            is_known = was_read or leaf in read_later or leaf in _ALWAYS_USED or f"{path}.{leaf}" in self._entries
            if not is_known:
                self.record(f"{path}.{leaf}", value, "not read by the plan: calibration reads it, or nothing does")
        self.close_section(path, config, targets, read_later=read_later, strict=strict)

    def refuse_unread(
        self, path: str, config: AlgorithmConfig, *, read_later: Sequence[str] = (), strict: bool
    ) -> None:
        """Reports values of a section that were given but neither read nor recorded.

        Raises:
            ConfigError: There are such values and `strict` is true; otherwise they are warnings.
        """
        problems = []
        for leaf, value, was_read in config.given_leaves():
            full = f"{path}.{leaf}"
            if was_read or leaf in read_later or leaf in _ALWAYS_USED or full in self._entries:
                continue
            self.record(full, value, "no effect")
            problems.append(
                Problem(
                    full,
                    f"the value {shown(value)} can have no effect with the other settings of this section. Remove it, "
                    'or set "unused_values": "warn" at the top of the config.',
                )
            )
        if problems and strict:
            raise ConfigError(problems)
        for problem in problems:
            logger.warning("config: %s", problem)

    def close_root(self, root: Section) -> None:
        """Records the top-level keys of the config; an unused one is not an error, it may describe model or hardware.

        Args:
            root: The top-level keys.
        """
        for path, value, was_read in root.given_leaves():
            if path not in self._entries and not any(entry.startswith(f"{path}.") for entry in self._entries):
                self.record(path, value, "used" if was_read else "no algorithm of this config uses it")
                if not was_read:
                    logger.info("config: no algorithm of this config uses '%s'", path)

    def tables(self) -> list[Table]:
        """Returns one table with a row for each value."""
        rows = [(e.path, shown(e.value), e.effect, len(e.modules)) for e in self]
        return [Table("What the config did", ("path", "value", "effect", "modules"), rows)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the entries by path."""
        return {e.path: {"value": _json_able(e.value), "effect": e.effect, "modules": list(e.modules)} for e in self}


def _json_able(value: Any) -> Any:
    # A config that is a dict may contain functions, such as a guard; they are recorded by name.
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value
