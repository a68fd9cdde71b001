"""The core's wheel, built once."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.packaging.packages import build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("dist"))
