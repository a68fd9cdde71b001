"""Fixtures for all tests. They work in a checkout that was never installed."""

from __future__ import annotations

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
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent


def declared_entry_points() -> list[importlib.metadata.EntryPoint]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][ENTRY_POINT_GROUP]
    return [importlib.metadata.EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in table.items()]


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    # The tensors of tests are small: where tests run side by side, one thread for each is best.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def registry():
    """The built-in plugins, from the table in pyproject.toml, and nothing that happens to be installed."""
    fresh = Registry()
    fresh.load_entry_points(declared_entry_points())
    assert not fresh.failures
    with use_registry(fresh):
        yield fresh


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
