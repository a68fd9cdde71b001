"""The kit finds bugs: each of many small algorithms has one, and a named check says what to change."""

from __future__ import annotations

import pytest
from pydantic import Field

from compress_core import AlgorithmConfig, Initializer, InitializerConfig, PluginError, hookimpl
from compress_core.registry import use_registry
from compress_core.testing import conformance_checks, run_checks
from tests.plugin_helpers import algorithm
from tests.testing.clean import Ramp, Warm, failures_of, make_case, registered
from tests.testing.seeded_bugs import BUGS, handles

# Compiling and exporting take seconds, these others tenths: they run for the clean algorithm, and for bugs that they have to find.
SLOW = ("compile", "export", "with_", "lets_go", "rolls_back", "independent")


def checks_for(name):
    quick = [check for check in conformance_checks() if not any(part in check.__name__ for part in SLOW)]
    return quick + [check for check in conformance_checks() if check.__name__ == name and check not in quick]


@pytest.mark.parametrize("settings", [{}, {"data": True}, {"initializer": True}], ids=str)
def test_clean_algorithm_passes_all_checks(settings):
    checks = None if not settings else checks_for("")
    with use_registry(registered(Ramp, Warm)):
        report = run_checks(make_case(**settings), checks)
    assert report.failed == {}
    passed = [result.name for result in report.results if result.outcome == "passed"]
    assert len(passed) >= len(report.results) - 4, report.to_str()


@pytest.mark.parametrize("name", BUGS)
def test_check_finds_the_bug_and_says_what_to_change(name):
    bug = BUGS[name]
    try:
        failed = failures_of(bug.classes(), checks_for(bug.check), **bug.settings)
    finally:
        while handles:
            handles.pop().remove()
    assert bug.check in failed, failed
    assert bug.says in failed[bug.check]


def test_there_are_enough_bugs_for_every_check():
    found = {bug.check for bug in BUGS.values()}
    assert len(BUGS) >= 30
    assert found <= {check.__name__ for check in conformance_checks()}


class Undescribed(AlgorithmConfig):
    level: float = Field(0.5)


class OtherConfig(AlgorithmConfig):
    level: float = Field(0.5, description="a level")


class Late(InitializerConfig):
    pass


async def wait(self, model):
    return None


REFUSED = {
    "a field without description": ({"Config": Undescribed, "reads_later": ()}, "level has no description"),
    "a slip in reads_later": ({"reads_later": ("decays",)}, "reads_later names 'decays'.*Did you mean 'decay'"),
    "a hook of initializers": (
        {"compress_initialize": hookimpl(lambda self, model: None)},
        "would never be called here",
    ),
    "an async hook": ({"compress_calibrate": hookimpl(wait)}, "is async and would never be awaited"),
    "a misspelt hook": ({"compress_statistic": hookimpl(lambda self: None)}, r"Did you mean compress_statistics\(\)"),
    "a hook without hookimpl": ({"compress_step": lambda self, clock: None}, "lacks the decorator @hookimpl"),
    "an argument that there is not": (
        {"compress_step": hookimpl(lambda self, epoch: None)},
        "asks for an argument 'epoch'",
    ),
    "a misspelt attribute": ({"change_in_place": True}, "Did you mean 'changes_in_place'"),
    "an argument with a default": ({"compress_step": hookimpl(lambda self, clock=None: None)}, "would never be passed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_registration_refuses(name):
    members, message = REFUSED[name]
    with pytest.raises(PluginError, match=message):
        registered(type("Mine", (Ramp,), members))


def test_registration_refuses_config_type_for_config():
    with pytest.raises(PluginError, match=r"config_type is never read\. Did you mean 'Config'"):
        registered(algorithm(config_type=OtherConfig))


def test_registration_refuses_an_initializer_that_would_never_run():
    late = type("LateStart", (Initializer,), {"name": "late", "Config": Late})
    with pytest.raises(PluginError, match=r"must implement compress_initialize\(\)"):
        registered(Ramp, late)
