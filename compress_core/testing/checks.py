"""All checks, run one by one or together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest

from tabulate import tabulate

from compress_core.config.errors import did_you_mean
from compress_core.testing import compile as compiling
from compress_core.testing import composition, copies, leftovers, rollback, state, structure, training
from compress_core.testing.case import Case
from compress_core.testing.tags import TAGS, Check

_SUBJECTS = (structure, training, state, copies, leftovers, rollback, composition, compiling)
_CHECKS = tuple(value for subject in _SUBJECTS for value in vars(subject).values() if isinstance(value, Check))


def conformance_checks(tags: Iterable[str] | None = None) -> Sequence[Check]:
    """Returns the checks.

    Args:
        tags: Those of a case (`tags_of(case)`): checks that are not for it are left out. By default all, which skip
            themselves.

    Raises:
        ValueError: There is no such tag.
    """
    if tags is None:
        return _CHECKS
    given = frozenset(tags)
    for tag in given - TAGS.keys():
        raise ValueError(f"there is no tag '{tag}'.{did_you_mean(tag, TAGS)} There are: {', '.join(TAGS)}")
    return tuple(one for one in _CHECKS if not one.reason_to_skip(given))


@dataclass(frozen=True)
class CheckResult:
    """How one check has come out.

    Attributes:
        name: Of the check.
        outcome: What has happened.
        message: Why it failed or was skipped; empty when it passed.
        seconds: How long it took.
    """

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    message: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """How all checks have come out.

    Attributes:
        results: In the order in which they ran.
    """

    results: Sequence[CheckResult]

    @property
    def failed(self) -> dict[str, str]:
        """Name of each check that failed -> what it says."""
        return {result.name: result.message for result in self.results if result.outcome == "failed"}

    def to_str(self) -> str:
        """Returns the report as a table, with the time that each check took."""
        rows = [(r.name, r.outcome, f"{r.seconds:.2f} s", r.message.partition("\n")[0]) for r in self.results]
        total = sum(result.seconds for result in self.results)
        table = tabulate(rows, ("check", "outcome", "time", "message"), maxcolwidths=[None, None, None, 80])
        return f"{table}\n{len(self.results)} checks, {len(self.failed)} failed, {total:.1f} s"


def run_checks(case: Case, checks: Iterable[Check] | None = None) -> Report:
    """Runs checks on a case, all of them although some fail.

    Args:
        case: What to check.
        checks: Which; by default all.

    Raises:
        ValueError: `Case(expected_failures=...)` names a check that there is not.
    """
    known = [one.__name__ for one in _CHECKS]
    for name in case.expected_failures:
        if name not in known:
            raise ValueError(f"expected_failures names '{name}', which is no check.{did_you_mean(name, known)}")
    return Report([_run_one(case, one) for one in (_CHECKS if checks is None else checks)])


def _run_one(case: Case, one: Check) -> CheckResult:
    begun, outcome, message = time.perf_counter(), "passed", ""
    try:
        one(case)
    except SkipTest as skipped:
        outcome, message = "skipped", str(skipped)
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        outcome, message = "failed", "\n".join([f"{type(error).__name__}: {error}", *notes])
    return CheckResult(one.__name__, outcome, message, time.perf_counter() - begun)  # type: ignore[arg-type]
