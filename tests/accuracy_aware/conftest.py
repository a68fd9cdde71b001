"""Pictures take longer than the trainings of these tests, so only one test draws them."""

import pytest

from compress_core.accuracy_aware import base


@pytest.fixture
def pictures():
    pass


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(base, "has_matplotlib", lambda: False)
