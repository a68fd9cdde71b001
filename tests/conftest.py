"""Fixtures for all tests. They work in a checkout that was never installed."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tomllib
from pathlib import Path

import hypothesis
import pytest
import torch

from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from compress_core.registry import Registry, use_registry
from tests.soak import pytest_runtest_makereport, pytest_terminal_summary, tried

__all__ = ["pytest_runtest_makereport", "pytest_terminal_summary", "tried"]

# The same examples in every run, so that a commit does not fail by chance; HYPOTHESIS_PROFILE=default draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def declared_entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][ENTRY_POINT_GROUP]
    return tuple(importlib.metadata.EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in table.items())


def with_built_in_plugins() -> Registry:
    """Returns a new registry of the built-in plugins, from the table in pyproject.toml, and of no others."""
    registry = Registry()
    registry.load_entry_points(declared_entry_points())
    assert not registry.failures
    return registry


shared_registry = functools.cache(with_built_in_plugins)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    # The tensors of tests are small: where tests run side by side, one thread for each is best.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def built_in_plugins():
    """The built-in plugins, and nothing that happens to be installed. A test that adds to them asks for `registry`."""
    shared = shared_registry()  # to make one for each test took an eighth of the time of all tests
    loaded = list(shared.plugins)
    with use_registry(shared):
        yield
    if shared.plugins != loaded or shared.failures:
        shared_registry.cache_clear()
        pytest.fail("this test registers plugins for those that follow: let it ask for the fixture 'registry'")


@pytest.fixture
def registry(built_in_plugins):
    """A registry of this test's own, in use, with the built-in plugins in it."""
    with use_registry(with_built_in_plugins()) as own:
        yield own


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
