"""Pictures take longer than the trainings of these tests, so only one test draws them."""

import pytest

from compress_core.accuracy_aware import loops


@pytest.fixture
def pictures():
    pass


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(loops, "has_matplotlib", lambda: False)
