"""Fixtures for the tests of activation transforms."""

import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
