"""The long forms of tests that try many cases, and the table at their end: `make soak`.

COMPRESS_CORE_SOAK says how much of the long form is tried: 1 is all of it, 0.1 a tenth; without it, tests are short.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import pytest
from tabulate import tabulate

VARIABLE = "COMPRESS_CORE_SOAK"
SHARE = float(os.environ.get(VARIABLE) or 0)


def count(short: int, long: int) -> int:
    """Returns how many cases to try: `short` in `make test`, up to `long` in `make soak`, and never fewer than that."""
    return max(short, round(SHARE * long))


@dataclass
class Tried:
    """What one test counts: cases that it has begun, and those that did not hold, where it goes on behind them."""

    cases: int = 0
    failed: int = 0


@pytest.fixture
def tried(request) -> Tried:
    request.node.tried = Tried()
    return request.node.tried


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("soak")
    if marker is not None and (call.when == "call" or report.failed):
        found = getattr(item, "tried", Tried())
        failed = max(found.failed, int(report.failed))
        report.user_properties.append(("soak", [marker.args[0], max(found.cases, 1), failed, report.duration]))


def pytest_terminal_summary(terminalreporter):
    if not SHARE:
        return
    rows = defaultdict(lambda: [0, 0, 0.0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "soak" and not getattr(report, "skipped", False):
                    kind, cases, failed, seconds = value
                    row = rows[kind]
                    row[0], row[1], row[2] = row[0] + cases, row[1] + failed, row[2] + seconds
    table = [(kind, cases, cases - failed, failed, round(seconds)) for kind, (cases, failed, seconds) in rows.items()]
    terminalreporter.section(f"soak, {SHARE:g} of the long form")
    terminalreporter.write_line(tabulate(table, ("kind", "cases tried", "held", "failed", "seconds")))
