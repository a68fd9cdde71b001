"""Real training at 95 %: learned masks reach their level, and keep more than magnitude after the same epochs."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.learned_sparsity import FACTOR, fitted, perceptron, sections
from compress_core import CompressionStage
from examples.common.datasets import digits
from examples.common.training import accuracy

pytestmark = pytest.mark.slow


def test_learned_masks_at_95_percent_are_ahead_of_magnitude():
    torch.manual_seed(0)
    data, start = digits(), perceptron()
    fitted(start, data, 15, 0)
    found = {}
    for name, section in sections(0.95, 20, FACTOR).items():
        model = copy.deepcopy(start)
        controller = fitted(model, data, 20, 0, section)
        assert controller.algorithms[name].compression_rate > 0.94
        assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
        found[name] = accuracy(model, data.test)
        plain = controller.strip()
        assert accuracy(plain, data.test) == found[name]
        zeros = sum(int((p == 0).sum()) for p in plain.parameters() if p.ndim > 1)
        assert zeros / sum(p.numel() for p in plain.parameters() if p.ndim > 1) > 0.94
    assert found["rb_sparsity"] > found["magnitude_sparsity"] + 3
    assert found["movement_sparsity"] > found["magnitude_sparsity"] + 3
