"""Fixtures of checkpoints."""

import pytest

from tests.session.checkpoint_helpers import one_epoch


@pytest.fixture
def saved(registry, tmp_path):
    """The path of a checkpoint after one epoch of all algorithms."""
    path = tmp_path / "original" / "saved.pt"
    path.parent.mkdir()
    path.write_bytes(one_epoch())
    return path
