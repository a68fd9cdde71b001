"""Moments of channels that can be pooled over batches, calls of a layer and processes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Number of rows of a matrix that are summed in float32 at a time.
_ROWS = 256
# Number of values that are squared at a time: few enough to stay in the cache.
_BLOCK = 2**18
# Row length from which summing row by row is faster than column by column.
_SHORTEST_ROW = 50
# Above this |mean| / std, squares in float32 are too inexact to keep the variance within 1e-6 of float64.
_LARGEST_OFFSET = 2.0


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel; can be merged.

    Merging is exact (Chan, Golub & LeVeque 1979, equation 2.1): except for rounding in float64, the result does not
    depend on how values were split into parts or in which order these are merged. `Moments.empty` is the neutral
    element.

    Attributes:
        count: Number of values in each channel.
        mean: Their mean; float64, shape (channels,).
        m2: Sum of their squared deviations from the mean; float64, shape (channels,).
    """

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | None = None) -> Moments:
        """Returns the moments of zero values."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    @classmethod
    def of(cls, values: torch.Tensor) -> Moments:
        """Returns the moments of a tensor of shape (batch, channels, ...), over all dimensions but the second.

        float32 on the CPU is summed in short pieces that are merged in float64, everything else is copied to float64.
        Both are within 1e-6 of the population moments.
        """
        channels = values.shape[1]
        count = values.numel() // channels if channels else 0
        if count == 0:
            return cls.empty(channels, values.device)
        if values.dtype == torch.float32 and values.device.type == "cpu":
            return cls._in_float32(values, count)
        return cls._in_float64(values, count)

    @classmethod
    def _in_float32(cls, values: torch.Tensor, count: int) -> Moments:
        mean, variance = _sums(values)
        far = (mean.square() > _LARGEST_OFFSET**2 * variance).nonzero().flatten()
        if len(far):
            # Far from zero, squares cancel and float32 is not exact enough. After subtracting most of the mean, the
            # values of these channels are small and float32 is exact enough.
            bulk = mean[far].to(values.dtype)
            rest, variance[far] = _sums(values[:, far] - bulk.view(1, -1, *[1] * (values.ndim - 2)))
            mean[far] = bulk.double() + rest
        return cls(count, mean, variance * count)

    @classmethod
    def _in_float64(cls, values: torch.Tensor, count: int) -> Moments:
        wide = values.double() if values.device.type != "mps" else values.float()  # MPS has no float64
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(wide, dim=dims, correction=0)
        return cls(count, mean.double(), variance.double() * count)

    def merge(self, other: Moments) -> None:
        """Adds the values of `other` to these moments."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta.square() * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """Population variance of each channel; float64, shape (channels,)."""
        return self.m2 / max(self.count, 1)

    def is_finite(self) -> bool:
        """Returns whether all values so far were finite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())


class Correlation:
    """Correlation of two versions of the same values for each channel, accumulated in pieces.

    Pieces are merged as in `Moments` (Pebay 2008, equation 3.11 for the co-moment).

    Args:
        channels: Number of channels.
        device: Device of the sums.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self._left = Moments.empty(channels, device)
        self._right = Moments.empty(channels, device)
        self._comoment = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds paired values, each of shape (values, channels), float32 or float64."""
        count, before = len(left), self._left.count
        # Both at once and in place: with many thin layers, the number of operations and of large buffers matters.
        apart = torch.stack([left, right])
        first = apart[:, :1].clone()
        apart -= first  # differences are small even if the values are far from zero, so float32 is exact enough
        bulk = apart.mean(1, keepdim=True)
        apart -= bulk
        comoment = (apart[0] * apart[1]).sum(0).double()
        m2 = apart.square_().sum(1).double()
        mean = (bulk.double() + first.double()).squeeze(1)
        shift = (mean[0] - self._left.mean) * (mean[1] - self._right.mean)
        self._comoment += comoment + shift * (before * count / (before + count))
        self._left.merge(Moments(count, mean[0], m2[0]))
        self._right.merge(Moments(count, mean[1], m2[1]))

    def value(self) -> torch.Tensor:
        """Returns Pearson's correlation of each channel; 1 if neither version varies, 0 if only one does."""
        scale = self._left.m2.sqrt() * self._right.m2.sqrt()
        constant = ((self._left.m2 == 0) & (self._right.m2 == 0)).double()
        return torch.where(scale > 0, self._comoment / scale, constant).clamp(-1.0, 1.0)


def sampled_rows(values: torch.Tensor, positions: int) -> torch.Tensor:
    """Returns a few values of each channel, at the same positions in every sample.

    Every sample contributes the same number of values, so that the result does not depend on how samples are batched.

    Args:
        values: Shape (batch, channels, ...).
        positions: Number of positions to take from each sample; all, if it has fewer.

    Returns:
        A copy of shape (values, channels), float32 or float64.
    """
    batch, channels = values.shape[:2]
    available = values[0, 0].numel()
    index = _spread(available, positions).to(values.device)
    if _is_channels_last(values):
        rows = values.movedim(1, -1).reshape(batch, available, channels)[:, index].reshape(-1, channels)
    else:
        # Transposed first: indexing the last dimension is several times slower for few positions.
        by_position = values.reshape(batch * channels, available).t().index_select(0, index)
        rows = by_position.view(-1, batch, channels).transpose(0, 1).reshape(-1, channels)
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


@functools.cache
def _spread(available: int, wanted: int) -> torch.Tensor:
    """Returns up to `wanted` indices below `available`, spread over the rows and columns of an image of any width."""
    if available <= wanted:
        return torch.arange(available)
    # Multiples of the golden ratio do not align with any width.
    fractions = (torch.arange(1, wanted + 1, dtype=torch.float64) * ((5**0.5 - 1) / 2)) % 1.0
    chosen: torch.Tensor = torch.unique((fractions * available).long())
    return chosen


def _sums(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance of each channel in float64, from short float32 sums that are merged in float64.

    A row of a contiguous tensor, or a few hundred rows of a channels_last tensor, are short enough for float32. torch's
    batch-norm kernel, which sums in float64, takes ten times as long.
    """
    channels = values.shape[1]
    count = values.numel() // channels
    if _is_channels_last(values):
        total, squares = _column_sums(values.movedim(1, -1).reshape(-1, channels))
    elif values[0, 0].numel() < _SHORTEST_ROW:
        total, squares = (sums.view(channels, -1).sum(-1) for sums in _column_sums(values.flatten(1)))
    else:
        rows = values.flatten(2)
        total = rows.sum(-1).double().sum(0)
        squares = torch.linalg.vector_norm(rows, dim=-1).double().square().sum(0)
    mean, squares = total / count, squares / count
    return mean, (squares - mean.square()).clamp_min(0)


def _column_sums(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of values and of their squares over dimension 0 in float64, piece by piece.

    Summing down the columns, torch works on whole vectors; summing along many short rows takes several times as long.
    """
    columns = rows.shape[1]
    total = torch.zeros(columns, dtype=torch.float64, device=rows.device)
    squares = total.clone()
    for block in torch.split(rows, max(_BLOCK // columns // _ROWS, 1) * _ROWS):
        whole = len(block) - len(block) % _ROWS
        for pieces in (block[:whole].reshape(-1, _ROWS, columns), block[whole:].unsqueeze(0)):
            if pieces.numel():
                total += pieces.sum(1).double().sum(0)
                squares += (pieces * pieces).sum(1).double().sum(0)
    return total, squares


def _is_channels_last(values: torch.Tensor) -> bool:
    if values.is_contiguous():
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return values.ndim in formats and values.is_contiguous(memory_format=formats[values.ndim])
