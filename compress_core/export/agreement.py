"""Compares what a runtime computes with what the model computes in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress_core.errors import ExportError
from compress_core.export.report import Agreement, ExportReport

_LEVELS = 255  # steps of an 8-bit grid


class DisagreementError(ExportError):
    """The runtime fails on a batch, or computes something else than torch.

    Attributes:
        batch_size: Number of samples in the batch.
        found: What was found, without advice.
        sizes: The sizes that the user has named, in words.
        report: What was measured so far, or None.
    """

    def __init__(
        self, batch_size: int, found: str, advice: str = "", sizes: str = "", report: ExportReport | None = None
    ) -> None:
        super().__init__(found + advice)
        self.batch_size = batch_size
        self.found = found
        self.sizes = sizes
        self.report = report


class RunError(DisagreementError):
    """The runtime fails; its own error is the cause."""


def compared(
    names: Sequence[str], outputs: Sequence[Any], expected: Sequence[torch.Tensor], size: int, optimized: bool
) -> list[Agreement]:
    """Returns the comparison of each output.

    Args:
        names: Names of the outputs.
        outputs: What the runtime has computed.
        expected: What torch has computed.
        size: Number of samples.
        optimized: Whether the runtime was allowed to optimize the graph.

    Raises:
        DisagreementError: An output has another shape.
    """
    return [
        _agreement(name, size, optimized, _as_numpy(tensor), np.asarray(actual))
        for name, tensor, actual in zip(names, expected, outputs, strict=True)
    ]


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _agreement(
    name: str, size: int, optimized: bool, expected: npt.NDArray[Any], actual: npt.NDArray[Any]
) -> Agreement:
    if expected.shape != actual.shape:
        raise DisagreementError(
            size,
            f"output '{name}' has shape {actual.shape} in the runtime and {expected.shape} in torch, "
            f"on a batch of {size}",
        )
    if not expected.size:
        return Agreement(name, size, optimized, 0.0, 0.0, 0.0, 0.0, 0.0)
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    difference = np.asarray(np.abs(wide - other))  # numpy makes a number of an array without dimensions
    only_there = int((np.isnan(other) & ~np.isnan(wide)).sum())
    if only_there:
        raise DisagreementError(
            size,
            f"output '{name}' is NaN in the runtime in {only_there} of {wide.size} values that are numbers in torch, "
            f"on a batch of {size}",
        )
    # The difference of equal infinities is NaN, and masked attention scores are infinite.
    difference[wide == other] = 0.0
    difference[np.isnan(wide) & np.isnan(other)] = 0.0
    difference = np.where(np.isfinite(difference), difference, math.inf)
    finite = wide[np.isfinite(wide)]
    magnitudes = np.abs(finite) if finite.size else np.zeros(1)
    step = (finite.max() - finite.min()) / _LEVELS if finite.size else 0.0
    largest, mean = float(difference.max()), float(difference.mean())
    return Agreement(
        name,
        size,
        optimized,
        largest,
        mean,
        _ratio(largest, float(magnitudes.max())),
        _ratio(mean, float(magnitudes.mean())),
        _ratio(largest, float(step)),
        _top1(expected, actual),
    )


def _ratio(value: float, unit: float) -> float:
    if value == 0:
        return 0.0
    return value / unit if unit > 0 else math.inf


def _top1(expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float | None:
    if expected.ndim < 2 or expected.shape[-1] < 2 or not np.issubdtype(expected.dtype, np.floating):
        return None
    return float((expected.argmax(-1) == actual.argmax(-1)).mean())
