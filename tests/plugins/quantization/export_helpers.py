"""What tests of quantization share."""

from __future__ import annotations

import numpy as np
import torch

from compress_core.export import ExportReport

ROUNDING = 1e-3  # of the mean absolute output: single values that rounding sent to the neighbouring integer


def agrees(report: ExportReport, tolerance=ROUNDING) -> bool:
    return report.worst(optimized=False).relative_mean < tolerance and report.worst().relative_mean < tolerance


def relative(actual, expected) -> float:
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
