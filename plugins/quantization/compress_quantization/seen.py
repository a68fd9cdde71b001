"""Compares the ranges of quantizers with the values that reach them, for reports."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from compress_core.data.calibration import CalibrationData
from compress_core.pages import Bars, Block, Picture, Text, histogram_svg
from compress_quantization.calibration import Observed, see_activations, see_weight
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.plan import PlannedQuantizer

# Samples for the histograms of activations.
SAMPLES = 64
# Bins within the range, and on each side of it; the outermost ones have all that is farther out.
_INSIDE, _OUTSIDE = 24, 6


@dataclass
class SeenValues:
    """Counts values by where they are in the range of their quantizer; takes a fixed amount of memory.

    Args:
        module: The quantizer; each channel has its own range.

    Attributes:
        counts: Values in each bin: `_OUTSIDE` bins below the range, `_INSIDE` in it, `_OUTSIDE` above it.
        clipped: Number of values more than half a step outside of the range, which rounding alone does not move there.
        low: The smallest value.
        high: The largest value.
    """

    module: FakeQuantize
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(_INSIDE + 2 * _OUTSIDE, dtype=torch.int64))
    clipped: int = 0
    low: float = math.inf
    high: float = -math.inf

    @property
    def has_seen_values(self) -> bool:
        """Whether there were values."""
        return self.low <= self.high

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Context manager for one batch, as in `ranges.RangeStatistics`."""
        yield

    def update(self, tensor: torch.Tensor) -> None:
        """Counts the values of a tensor; those that are not finite are left out."""
        if not tensor.is_floating_point() or not tensor.numel():
            return
        shape = self.module.shape
        low, high = (end.to(tensor.device, torch.float32) for end in self.module.range())
        smallest, largest = self.module.levels()
        values = tensor.detach().float()
        if values.ndim < len(shape):
            values = values.reshape([1] * (len(shape) - values.ndim) + list(values.shape))
        finite = values.isfinite()
        width = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        position = torch.where(finite, (values - low) / width, 0.5)
        bins = (position * _INSIDE).floor().clamp(-_OUTSIDE, _INSIDE + _OUTSIDE - 1).long() + _OUTSIDE
        # The upper end belongs to the range.
        bins = torch.where(position == 1, _OUTSIDE + _INSIDE - 1, bins)
        self.counts += torch.bincount(bins[finite], minlength=len(self.counts)).cpu()
        half_step = 0.5 / max(largest - smallest, 1)
        self.clipped += int(((position < -half_step) | (position > 1 + half_step)).sum())
        known = values[finite]
        if known.numel():
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))

    def picture(self, name: str) -> Picture:
        """Returns the histogram."""
        svg = histogram_svg(self.counts.tolist(), (_OUTSIDE, _OUTSIDE + _INSIDE))
        return Picture(svg, f"Histogram of {self.total} values that reach {name}, {self.clipped} of them clipped")


def ranges_and_values(
    model: nn.Module, quantizers: Sequence[tuple[PlannedQuantizer, FakeQuantize]], data: CalibrationData | None
) -> list[Block]:
    """Returns a table of the ranges of quantizers, of what reaches them, and of the share that is clipped.

    Weights are taken as they are. Activations are those of a few samples, as in calibration: weights are quantized,
    and activations are not.

    Args:
        model: The model, or a copy that is thrown away.
        quantizers: The quantizers that are on.
        data: The samples; without them only weights are looked at.
    """
    # A gate is not observed: its grid is fixed, and what it rounds is between 0 and 1.
    seen = [(planned, module, SeenValues(module)) for planned, module in quantizers if not planned.is_gate]
    for planned, module, values in seen:
        if planned.group == "weights":
            see_weight(model, Observed(planned, module, values, 1))
    activations = [Observed(p, module, values, SAMPLES) for p, module, values in seen if p.group == "activations"]
    samples = see_activations(model, activations, data) if data is not None and activations else 0
    rows = [_row(planned, module, values) for planned, module, values in seen if values.has_seen_values]
    headers = ("quantizer", "bits", "range", "seen", "clipped", "histogram")
    blocks: list[Block] = []
    if rows:
        blocks += [
            Text(_EXPLAINED.format(samples=samples)),
            Bars("Ranges and what was seen", headers, rows, shares=(4,)),
        ]
    missing = sum(not values.has_seen_values for _, _, values in seen)
    if missing and data is None:
        blocks.append(
            Text(
                f"{missing} quantizers of activations are not compared with data: there is none that could be read "
                "again (an iterator can be read once). Register a DataLoader, or pass init_loader= at creation."
            )
        )
    elif missing:
        blocks.append(Text(f"No value reached {missing} quantizers in {samples} samples of the calibration data."))
    return blocks


_EXPLAINED = (
    "Weights as they reach their quantizer, and activations of {samples} samples of the calibration data (whole "
    "batches), measured as ranges are: with quantized weights, and activations that are not rounded. Clipped is the "
    "share that is more than half a step outside of the range. A histogram shows the values relative to the range, of "
    "each channel if each has its own. Its heights are logarithms, lines mark the ends of the range, and what is "
    "farther out is in the outermost bins."
)


def _row(planned: PlannedQuantizer, module: FakeQuantize, values: SeenValues) -> tuple[object, ...]:
    low, high = module.range()
    return (
        planned.name,
        module.bits,
        f"{float(low.min()):.3g} to {float(high.max()):.3g}",
        f"{values.low:.3g} to {values.high:.3g}",
        values.clipped / max(values.total, 1),
        values.picture(planned.name),
    )
